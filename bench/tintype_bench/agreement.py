"""Whether a runner did the same work: its output beside a float32 reference, before anything is timed."""

from __future__ import annotations

import base64
import hashlib
import io
import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tintype.errors import TintypeError
from tintype_bench.protocol import WorkerFailed, WorkerProcess
from tintype_bench.runners import Pictures
from tintype_bench.work import Runner, Work
from tintype_export.quality import EQUAL_DB, psnr

# Least decibels beside float32. Pictures: PSNR; float32 differs by its order of summation alone. Fewer bits are only
# held to the same work here, since guidance amplifies roundings: on random weights diffusers' own bfloat16 is at 30 to
# 41 dB, another prompt's picture at 19 to 23. How good a precision is, the tables say.
# A component: signal over difference of one call, in which bfloat16 is at 41 dB and other inputs are below 0.
PICTURE_DB = {"fp32": 50.0, "fp16": 25.0, "bf16": 25.0, "int8": 25.0, "fp8": 25.0}
COMPONENT_DB = {"fp32": 60.0, "fp16": 25.0, "bf16": 25.0, "int8": 15.0, "fp8": 15.0}
_THUMBNAIL = 160  # pixels


def agreement_db(output: Pictures, reference: Pictures, work: Work) -> float:
    """Decibels of agreement; 0, as of unrelated pictures, where the shapes differ or the output is not finite."""
    if output.shape != reference.shape or not np.isfinite(output).all():
        return 0.0
    return _signal_db(output, reference) if work.component else psnr(output, reference)


def least_db(work: Work, runner: Runner) -> float:
    """What the runner's precision is held to."""
    return (COMPONENT_DB if work.component else PICTURE_DB)[runner.precision]


def thumbnail(pictures: Pictures) -> str:
    """The first picture, small, as base64 of a JPEG."""
    from PIL import Image

    image = Image.fromarray(np.uint8(np.clip(pictures[0], 0, 1) * 255 + 0.5))
    image.thumbnail((_THUMBNAIL, _THUMBNAIL))
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=88)
    return base64.b64encode(stream.getvalue()).decode()


def find_reference(work: Work, own: Runner, folder: Path) -> tuple[Pictures, str]:
    """The reference output and who made it: diffusers where it runs, else ours. Kept in `folder`."""
    key = hashlib.sha256(json.dumps([asdict(work), own.device]).encode()).hexdigest()[:24]
    kept, name = folder / f"{key}.npy", folder / f"{key}.txt"
    if kept.is_file() and name.is_file():
        return np.asarray(np.load(kept)), name.read_text(encoding="utf-8")
    failures = []
    for runner in _candidates(work, own):
        try:
            with WorkerProcess(runner) as worker:
                worker.load(work)
                output = worker.output()
        except WorkerFailed as error:
            failures.append(f"{runner.label}: {error}")
            continue
        folder.mkdir(parents=True, exist_ok=True)
        np.save(kept, output)
        name.write_text(runner.label, encoding="utf-8")
        return output, runner.label
    raise TintypeError(f"nobody makes the reference: {'; '.join(failures)}")


def _candidates(work: Work, own: Runner) -> Iterator[Runner]:
    """Of the largest models a device may hold no float32; the rows then name a 16-bit reference."""
    if not work.checkpoint:
        yield own
        return
    for precision in ("fp32", "bf16"):
        yield Runner("diffusers", precision, device=own.device)
        yield Runner("tintype", precision, "torch", own.device)


def _signal_db(output: NDArray[np.float32], reference: NDArray[np.float32]) -> float:
    expected = np.asarray(reference, np.float64)
    error = float(np.sum((output - expected) ** 2))
    return min(EQUAL_DB, 10 * float(np.log10(np.sum(expected**2) / error))) if error else EQUAL_DB
