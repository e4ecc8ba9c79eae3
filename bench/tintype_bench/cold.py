"""From process start to PNG on disk, in fresh processes, with the share of each part.

Each run is a new interpreter that imports everything, loads the model, makes one picture through the command
line's own code and leaves; one run before the counted ones warms the file cache and the hash memory. diffusers does the
same with the same folder, in turns with ours.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tintype.errors import TintypeError
from tintype.loading import is_checkpoint, open_source, resolve
from tintype_bench.conditions import conditions
from tintype_bench.footprint import footprint
from tintype_bench.spread import spread
from tintype_bench.work import PROMPT

STEPS = 20
RUNS = 5
PEER = "diffusers"
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


# What a user of diffusers writes; float32, since it does not widen weights that are stored in 16 bits by itself.
_PEER_CHILD = """
import json, sys, time
begun = time.monotonic()
import diffusers, torch
imported = time.monotonic()
folder, prompt, target, steps, guidance, width, height = sys.argv[1:]
pipe = diffusers.DiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32)
loaded = time.monotonic()
made = pipe(
    prompt,
    num_inference_steps=int(steps),
    guidance_scale=float(guidance),
    width=int(width),
    height=int(height),
)
drawn = time.monotonic()
made.images[0].save(target)
ended = time.monotonic()
clock = {"begun": begun, "imported": imported, "loaded": loaded, "drawn": drawn, "ended": ended}
print(json.dumps(clock))
"""


def run(options: argparse.Namespace) -> None:
    """Measure each model, print, and write where asked."""
    sizes = footprint()
    results = []
    for model in options.model or ["postcard"]:
        peers = options.peer is None or PEER in options.peer
        results.append(measure(model, options.runs or RUNS, peers=peers))
        print(table(results[-1]))
    largest = [f"{name} {megabytes:.0f}" for name, megabytes in list(sizes.items())[:6]]
    print(f"slim installation {sum(sizes.values()):.0f} MB:", ", ".join(largest))
    if options.json:
        report = {"suite": "cold", "conditions": conditions(), "slim_megabytes": sizes}
        text = json.dumps({**report, "models": results}, indent=1) + "\n"
        options.json.write_text(text, encoding="utf-8")


def measure(model: str, runs: int, *, peers: bool = True) -> dict[str, Any]:
    """Seconds of each part and of the whole: the median of `runs` fresh processes, and every run."""
    asked, reason = _peer_arguments(model) if peers else (None, "not asked for")
    own, theirs = [], []
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "picture.png"
        for number in range(runs + 1):
            own.append(_run_once(model, target))
            if asked is not None and reason == "":
                sample, reason = _run_peer(asked, target)
                theirs += [] if sample is None else [sample]
            if number == 0:
                own, theirs = [], []
    return {
        "model": model,
        "steps": STEPS,
        **_summary(own),
        PEER: _peer_result(own, theirs, reason),
    }


def _summary(samples: list[dict[str, float]]) -> dict[str, Any]:
    median = {name: statistics.median(s[name] for s in samples) for name in samples[0]}
    total = asdict(spread([sample["total"] for sample in samples]))
    return {"median": median, "total": total, "runs": samples}


def _peer_result(
    own: list[dict[str, float]], theirs: list[dict[str, float]], reason: str
) -> dict[str, Any]:
    """Its medians and how many times slower it is, or why there are none."""
    if not theirs:
        return {"status": "failed", "reason": reason}
    ratios = [their["total"] / our["total"] for our, their in zip(own, theirs, strict=False)]
    return {"status": "timed", "ratio": statistics.median(ratios), **_summary(theirs)}


def table(result: Mapping[str, Any]) -> str:
    """The medians as text, with each part's share of the total."""
    lines = [f"{result['model']}: tintype", *_parts(result["median"])]
    peer = result[PEER]
    if peer["status"] != "timed":
        return "\n".join([*lines, f"{PEER}: {peer['reason']}"])
    return "\n".join(
        [*lines, f"{PEER}, {peer['ratio']:.2f} times as long", *_parts(peer["median"])]
    )


def _parts(median: Mapping[str, float]) -> list[str]:
    lines = [f"{'part':12} {'seconds':>8} {'share':>6}"]
    for name, seconds in median.items():
        lines.append(f"{name:12} {seconds:8.3f} {100 * seconds / median['total']:5.1f}%")
    return lines


def _peer_arguments(model: str) -> tuple[list[str] | None, str]:
    """The command line of diffusers' process, or why it has none."""
    from importlib.util import find_spec

    if find_spec(PEER) is None:
        return None, 'absent: pip install "tintype[bench]"'
    folder = resolve(model)
    if not folder.is_dir() or not is_checkpoint(folder):
        return None, f"{model} is no folder in its layout"
    settings = open_source(folder).defaults | _own_defaults(folder)
    asked = [str(settings[name]) for name in ("guidance_scale", "width", "height")]
    return [str(folder), PROMPT, str(STEPS), *asked], ""


def _own_defaults(folder: Path) -> dict[str, Any]:
    """What ours would take: a bundle's own settings where there is one."""
    from tintype.bundle import is_bundle, open_bundle

    return open_bundle(folder).defaults if is_bundle(folder) else {}


def _run_peer(asked: list[str], target: Path) -> tuple[dict[str, float] | None, str]:
    """One fresh process of diffusers; None and the reason where it fails."""
    target.unlink(missing_ok=True)
    folder, prompt, *settings = asked
    begin = time.monotonic()
    command = [sys.executable, "-c", _PEER_CHILD, folder, prompt, str(target), *settings]
    child = subprocess.run(command, capture_output=True, text=True, check=False)
    if child.returncode or not target.is_file():
        return None, "".join(child.stderr.strip().splitlines()[-1:])
    clock = json.loads(child.stdout.splitlines()[-1])
    return {
        "interpreter": clock["begun"] - begin,
        "import": clock["imported"] - clock["begun"],
        "load": clock["loaded"] - clock["imported"],
        "draw": clock["drawn"] - clock["loaded"],
        "save": clock["ended"] - clock["drawn"],
        "total": clock["ended"] - begin,
    }, ""


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
        raise TintypeError(f"the measured process failed:\n{child.stderr}")
    report, clock = (json.loads(line) for line in child.stdout.splitlines())
    parts: dict[str, float] = {
        "interpreter": clock["begun"] - begin,
        "import": clock["imported"] - clock["begun"],
        **report["timings"],
        "total": clock["ended"] - begin,
    }
    parts["other"] = parts["total"] - sum(parts[name] for name in PARTS if name != "other")
    return {name: parts[name] for name in (*PARTS, "total")}
