"""Every scheduler at several step counts on one model: a labelled grid, seconds, and distances to a reference."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from tintype.errors import CheckpointError, RequestError
from tintype.images import Floats, to_pil
from tintype.pipeline import Pipeline
from tintype.schedulers import make_table, names

_MARGIN, _LINE = 4, 14  # pixels
Judge = Callable[[str, int, Any], float]
# The plainest method of each kind of model; in many small steps it follows the model's own path.
_REFERENCES = ("euler", "flow_euler", "edm_euler")


@dataclass(frozen=True)
class Cell:
    """One picture [h, w, 3] in 0..1; `distance` is the root mean square difference to the reference's.

    `accuracy` is the share of what prompts said that is in their pictures, where that was measured.
    """

    scheduler: str
    steps: int
    evaluations: int
    seconds: float
    distance: float
    image: Floats
    accuracy: float | None = None

    def figures(self) -> dict[str, Any]:
        """Everything but the picture, for JSON."""
        listed = {
            "scheduler": self.scheduler,
            "steps": self.steps,
            "evaluations": self.evaluations,
            "seconds": round(self.seconds, 4),
            "distance": round(self.distance, 6),
        }
        return listed if self.accuracy is None else listed | {"accuracy": round(self.accuracy, 4)}


@dataclass(frozen=True)
class Comparison:
    """What was compared, and every cell, a scheduler's step counts beside each other; the reference is the last."""

    model: str
    prompt: str
    seed: int
    guidance_scale: float
    cells: Sequence[Cell]

    def figures(self) -> dict[str, Any]:
        """Everything but the pictures, for JSON."""
        listed = [cell.figures() for cell in self.cells]
        return {
            "model": self.model,
            "prompt": self.prompt,
            "seed": self.seed,
            "guidance_scale": self.guidance_scale,
            "reference": listed[-1],
            "cells": listed[:-1],
        }

    def grid(self) -> Image.Image:
        """Rows are schedulers, columns step counts; each picture has its figures below it."""
        rows = list(dict.fromkeys(cell.scheduler for cell in self.cells[:-1]))
        columns = sorted({cell.steps for cell in self.cells[:-1]})
        height, width = self.cells[0].image.shape[:2]
        across, down = max(width, 110) + _MARGIN, height + 2 * _LINE + _MARGIN
        canvas = Image.new("RGB", (len(columns) * across, (len(rows) + 1) * down), "white")
        draw, font = ImageDraw.Draw(canvas), ImageFont.load_default()
        for cell in self.cells:
            last = cell is self.cells[-1]
            left = 0 if last else columns.index(cell.steps) * across
            top = (len(rows) if last else rows.index(cell.scheduler)) * down
            canvas.paste(to_pil(cell.image), (left, top))
            draw.text((left, top + height), _title(cell, reference=last), "black", font)
            draw.text((left, top + height + _LINE), _measured(cell), "black", font)
        return canvas


def compare(
    pipeline: Pipeline,
    prompt: str,
    *,
    seed: int = 0,
    guidance_scale: float | None = None,
    schedulers: Sequence[str] | None = None,
    steps: Sequence[int] = (5, 10, 20, 50),
    reference_steps: int = 1000,
    on_step: Callable[[int, int], Any] | None = None,
    judge: Judge | None = None,
) -> Comparison:
    """Make a picture with each of `schedulers`, by default all that sample the model, at each of `steps`.

    All begin with the same noise. Methods that add noise on the way reach other pictures than the reference.
    `judge(scheduler, steps, guidance_scale)` measures how true to its prompts a method's pictures are.
    """
    config = pipeline.family.scheduler_config
    plan = _plan(config, schedulers, steps)
    final = next(name for name in _REFERENCES if _runs(name, config, 1))
    plan.append((final, reference_steps))
    counts = [len(make_table(name, config, count)) for name, count in plan]
    asked = {
        "seed": seed,
        "guidance_scale": pipeline.settings(guidance_scale=guidance_scale)["guidance"],
    }
    _picture(pipeline, prompt, final, 1, asked)  # makes the model ready, which is no method's fault
    made, done = [], 0
    for (name, count), evaluations in zip(plan, counts, strict=True):
        note = None if on_step is None else partial(_note, on_step, done, sum(counts))
        made.append(_picture(pipeline, prompt, name, count, asked | {"callback_on_step_end": note}))
        done += evaluations
    reference = made[-1][0]
    judged = [None if judge is None else judge(*key, asked["guidance_scale"]) for key in plan[:-1]]
    cells = [
        Cell(*key, evaluations, seconds, _distance(image, reference), image, accuracy)
        for key, evaluations, (image, seconds), accuracy in zip(
            plan, counts, made, [*judged, None], strict=True
        )
    ]
    return Comparison(pipeline.name, prompt, cells=cells, **asked)


def _picture(
    pipeline: Pipeline, prompt: str, scheduler: str, steps: int, asked: Mapping[str, Any]
) -> tuple[Floats, float]:
    """The picture [h, w, 3] in 0..1, and the seconds that it took."""
    begin = time.perf_counter()
    out = pipeline(
        prompt, scheduler=scheduler, num_inference_steps=steps, output_type="np", **asked
    )
    return np.asarray(out.images[0], np.float32), time.perf_counter() - begin


def _note(on_step: Callable[[int, int], Any], done: int, total: int, step: int, *_: object) -> None:
    on_step(done + step, total)


def _plan(
    config: Mapping[str, Any], schedulers: Sequence[str] | None, steps: Sequence[int]
) -> list[tuple[str, int]]:
    """Which cells there are. One that was asked for by name must run; of all methods, those that have the room."""
    counts = sorted(set(steps))
    if schedulers is not None:
        return [(name, count) for name in schedulers for count in counts]
    fitting = [name for name in names() if _runs(name, config, 1)]
    plan = [(name, count) for name in fitting for count in counts if _runs(name, config, count)]
    for count in set(counts) - {count for _, count in plan}:
        make_table(fitting[0], config, count)  # which says why it cannot
    return plan


def _runs(name: str, config: Mapping[str, Any], steps: int) -> bool:
    try:
        make_table(name, config, steps)
    except (RequestError, CheckpointError):
        return False
    return True


def _distance(image: Floats, reference: Floats) -> float:
    return float(np.sqrt(np.mean((image - reference) ** 2, dtype=np.float64)))


def _title(cell: Cell, *, reference: bool) -> str:
    return f"{'reference: ' if reference else ''}{cell.scheduler} {cell.steps}"


def _measured(cell: Cell) -> str:
    figure = f"rms {cell.distance:.3f}" if cell.accuracy is None else f"{cell.accuracy:.0%} right"
    return f"{cell.seconds:.2f} s, {figure}"
