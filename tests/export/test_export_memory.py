"""What keeping a flow transformer in int4 takes: a shard and its result at most, whatever the model's size.

The test's own model has 35 million parameters; `TINTYPE_FLUX=FOLDER pytest -s` does the same for a FLUX.1 in diffusers'
layout, of twelve billion, and prints what docs/measurements.md reports.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import memory_held
from tintype_bench import random_weights
from tintype_bench.shapes import find_shape
from tintype_export.calibration import give_back_memory

NARROW = {
    "attention_head_dim": 128,
    "axes_dims_rope": [16, 56, 56],
    "num_attention_heads": 2,
    "num_layers": 8,
    "num_single_layers": 16,
}
# Only the process itself can tell what it holds that is not in files.
MEASURED = """
import json, sys, threading, time
from pathlib import Path
import torch
from memory_held import held
from tintype.checkpoints import open_checkpoint
from tintype_export.quantisation import plan, write_quantised

def watch():
    while True:
        seen.append(max(seen.pop(), held()))
        time.sleep(0.02)

checkpoint = open_checkpoint(Path(sys.argv[1]))
quantised = plan(checkpoint, "int4", 64, None, print)["transformer"]
before, begin = held(), time.perf_counter()
seen = [before]
threading.Thread(target=watch, daemon=True).start()
weights = checkpoint.components["transformer"].weights
write_quantised(weights, Path(sys.argv[2]), quantised, torch.float32)
print(json.dumps({"held": seen[0] - before, "seconds": time.perf_counter() - begin}))
"""


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkpoint in bfloat16, its transformer in several shards."""
    if folder := os.environ.get("TINTYPE_FLUX"):
        return Path(folder)
    # So few bytes would be lost in what the allocator keeps for later.
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "65536")
    monkeypatch.setattr(random_weights, "_SHARD_BYTES", 10_000_000)
    tiny = find_shape("flux1-dev", tiny=True)
    transformer = tiny.parts["transformer"]
    narrow = replace(transformer, config={**transformer.config, **NARROW})
    shape = replace(tiny, parts={**tiny.parts, "transformer": narrow})
    random_weights.write_checkpoint(shape, tmp_path / "checkpoint", torch.bfloat16)
    return tmp_path / "checkpoint"


def sizes(folder: Path, pattern: str) -> list[int]:
    return [path.stat().st_size for path in sorted(folder.glob(pattern))]


@memory_held.told
def test_no_more_than_a_shard_and_its_result_is_held(source: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", MEASURED, str(source), str(tmp_path / "transformer")]
    found = [str(Path(memory_held.__file__).parent), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, found))}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    told = json.loads(done.stdout.splitlines()[-1])
    shards = sizes(source / "transformer", "*.safetensors")
    written = sizes(tmp_path, "transformer-*.safetensors")
    print(told, "shards", shards, "written", written)
    assert len(shards) == len(written) > 1
    assert told["held"] < min(max(shards) + max(written), 0.7 * sum(written))


@memory_held.told
@pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc", reason="another C library returns it by itself"
)
def test_memory_that_was_freed_between_what_is_kept_is_given_back():
    before = memory_held.held()
    pairs = [(torch.ones(30_000), torch.ones(100)) for _ in range(1000)]
    kept = [small for _, small in pairs]
    del pairs
    give_back_memory()
    assert memory_held.held() - before < 10e6  # of 120
    assert len(kept) == 1000
