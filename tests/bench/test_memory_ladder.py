"""The memory ladder: a row a setting, none of them twice."""

from __future__ import annotations

import json
import subprocess
import sys

from tintype.memory import settings


def test_every_setting_has_a_row_and_those_that_are_there_are_left_alone(tmp_path):
    told = tmp_path / "memory.json"
    command = [sys.executable, "-m", "tintype_bench.memory_ladder", "sd3-medium", "--tiny"]
    command += [
        "--device",
        "cpu",
        "--dtype",
        "bfloat16",
        "--json",
        str(told),
        "--cache",
        str(tmp_path),
    ]
    first = subprocess.run(command, capture_output=True, text=True, check=True)
    rows = json.loads(told.read_text())["rows"]
    assert len(first.stdout.splitlines()) == len(rows) == len(settings())
    assert all(row["predicted"] > 0 and row["measured"] is None for row in rows)
    by_offload = {row["offload"]: row["predicted"] for row in rows if not row["vae_tiling"]}
    assert by_offload[None] > by_offload["model"] >= by_offload["sequential"]
    told.write_text(json.dumps({"rows": rows[1:]}))
    again = subprocess.run(command, capture_output=True, text=True, check=True)
    assert again.stdout.splitlines() == first.stdout.splitlines()[:1]
