"""From process start to PNG on disk, in fresh processes, with the share of each part.

Each run is a new interpreter that imports everything, loads the model, makes one picture through the command
line's own code and leaves; one run before the counted ones warms the file cache and the hash memory.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

PROMPT = "a red lighthouse on a rocky coast at dusk"
STEPS = 20
PARTS = ("interpreter", "import", "load", "encode", "denoise", "decode", "save", "other")

# The imports that the command makes on its way, made first so that they are timed as such.
_CHILD = """
import json, sys, time
begun = time.monotonic()
import tintype.cli, tintype.commands.generate, tintype.loading, tintype.png, tintype.tokenizer
import tintype.backends.onnxruntime, tokenizers
imported = time.monotonic()
status = tintype.cli.main(sys.argv[1:])
print(json.dumps({"begun": begun, "imported": imported, "ended": time.monotonic()}))
sys.exit(status)
"""


def measure(model: str, runs: int) -> dict[str, Any]:
    """Seconds of each part and of the whole: the median of `runs` fresh processes, and every run."""
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "picture.png"
        samples = [_run_once(model, target) for _ in range(runs + 1)][1:]
    names = (*PARTS, "total")
    return {
        "model": model,
        "steps": STEPS,
        "median": {name: statistics.median(sample[name] for sample in samples) for name in names},
        "runs": samples,
    }


def table(result: dict[str, Any]) -> str:
    """The medians as text, with each part's share of the total."""
    median = result["median"]
    lines = [f"{'part':12} {'seconds':>8} {'share':>6}"]
    for name in (*PARTS, "total"):
        lines.append(f"{name:12} {median[name]:8.3f} {100 * median[name] / median['total']:5.1f}%")
    return "\n".join(lines)


def _run_once(model: str, target: Path) -> dict[str, float]:
    target.unlink(missing_ok=True)
    arguments = [
        "generate",
        PROMPT,
        "-m",
        model,
        "-o",
        str(target),
        "--steps",
        str(STEPS),
        "--seed",
        "0",
        "--json",
    ]
    # The monotonic clock is the system's, so the child's readings compare with ours.
    begin = time.monotonic()
    child = subprocess.run(
        [sys.executable, "-c", _CHILD, *arguments], capture_output=True, text=True, check=False
    )
    if child.returncode or not target.is_file():
        raise RuntimeError(f"the measured process failed:\n{child.stderr}")
    report, clock = (json.loads(line) for line in child.stdout.splitlines())
    parts: dict[str, float] = {
        "interpreter": clock["begun"] - begin,
        "import": clock["imported"] - clock["begun"],
        **report["timings"],
        "total": clock["ended"] - begin,
    }
    parts["other"] = parts["total"] - sum(parts[name] for name in PARTS if name != "other")
    return parts
