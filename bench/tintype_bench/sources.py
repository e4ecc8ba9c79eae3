"""Where a case's weights are: a shape's random ones are made, and bundles exported, once, in the cache."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

from tintype.backends.compiled import one_line
from tintype.bundle import is_bundle, open_bundle
from tintype.errors import RequestError, TintypeError
from tintype.loading import is_checkpoint, resolve
from tintype_bench.cases import Case
from tintype_bench.shapes import SHAPES, Shape, find_shape
from tintype_bench.work import PROMPT, Runner, Work
from tintype_kernels.cache import cache_folder

VARIABLE = "TINTYPE_BENCH_CACHE"
_T = TypeVar("_T")
_EDITION = 2  # of what is made of a shape, so that nothing older is taken for it
_NEEDS_GRAPHS = ("onnxruntime", "openvino")


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


@dataclass(frozen=True)
class Sources:
    """Finds and makes what runners load. ``tiny`` takes the tiny form of every shape."""

    folder: Path
    tiny: bool = False
    draw_on: str = "cpu"
    say: Callable[[str], None] = _tell
    _refused: dict[Path, str] = field(default_factory=dict, repr=False)

    def work(self, case: Case) -> Work:
        """The case as every runner is told it."""
        checkpoint = self._checkpoint(case.model)
        return Work(
            checkpoint="" if checkpoint is None else str(checkpoint),
            width=case.width,
            height=case.height,
            batch=case.batch,
            steps=case.steps,
            guidance=case.guidance,
            component=case.component,
            prompt=case.prompt,
            scheduler=case.scheduler,
            noise=case.noise,
        )

    def ready(self, runner: Runner, case: Case) -> Runner:
        """The runner with the bundle that it reads, where it reads one."""
        if runner.kind not in _NEEDS_GRAPHS and runner.backend not in _NEEDS_GRAPHS:
            return runner
        # OpenVINO computes float32 graphs in bfloat16 where asked, so those serve both.
        precision = "fp32" if runner.precision == "bf16" else runner.precision
        return replace(runner, bundle=str(self._bundle(case, precision)))

    def _checkpoint(self, model: str) -> Path | None:
        if model not in SHAPES:
            path = resolve(model)
            return path if is_checkpoint(path) or path.is_file() else None
        folder = self.folder / f"{model}{'-tiny' if self.tiny else ''}-{_EDITION}"
        if not is_checkpoint(folder):
            self._make_checkpoint(model, folder)
        return folder

    def _make_checkpoint(self, model: str, folder: Path) -> None:
        self.say(f"making random weights of {model}, bfloat16, in {folder}")
        apart(_make_checkpoint, find_shape(model, tiny=self.tiny), folder, self.draw_on)

    def _bundle(self, case: Case, precision: str) -> Path:
        """A bundle that has the case's size: the model's own where it is one, or an export."""
        if case.model not in SHAPES:
            own = resolve(case.model)
            if is_bundle(own) and open_bundle(own).precision == precision:
                return own
        checkpoint = self._checkpoint(case.model)
        if checkpoint is None or not checkpoint.is_dir():
            raise RequestError(
                f"{case.model} has no {precision} bundle and is no checkpoint folder to export one from"
            )
        name = f"{checkpoint.name}-{precision}-{case.width}x{case.height}"
        target = self.folder / "bundles" / name
        if target in self._refused:
            raise TintypeError(self._refused[target])
        if not is_bundle(target):
            self._export(checkpoint, target, precision, (case.width, case.height))
        return target

    def _export(
        self, checkpoint: Path, target: Path, precision: str, size: tuple[int, int]
    ) -> None:
        self.say(f"exporting {checkpoint.name} in {precision} to {target}")
        try:
            apart(_export, checkpoint, target, precision, size, checkpoint.parent == self.folder)
        except Exception as error:  # told to every runner that asks for it, and not tried again
            self._refused[target] = f"its bundle cannot be exported: {one_line(error)}"
            raise TintypeError(self._refused[target]) from error


def apart(function: Callable[..., _T], *arguments: Any) -> _T:
    """What it gives in a process of its own, whose memory is given back before anything is timed."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def _make_checkpoint(shape: Shape, folder: Path, device: str) -> None:
    import torch

    from tintype_bench.random_weights import write_checkpoint
    from tintype_export.writing import written_whole

    with written_whole(folder) as work:
        write_checkpoint(shape, work, torch.bfloat16, device)


def _export(
    checkpoint: Path, target: Path, precision: str, size: tuple[int, int], is_random: bool
) -> None:
    """The bundle as export writes it, unverified: the bench compares every runner's output with its own reference."""
    from tintype.bundle import save_manifest
    from tintype.checkpoints import open_checkpoint
    from tintype_export.bundle import ExportConfig, quantisation, write_bundle
    from tintype_export.calibration import Calibration
    from tintype_export.writing import written_whole

    # Every layer of random weights sees the same unit variance, so a look at one short picture is enough.
    seen = Calibration(prompts=(PROMPT,), steps=2, shown=1) if is_random else Calibration()
    defaults = {"width": size[0], "height": size[1]}
    config = ExportConfig((size,), precision, defaults=defaults, calibration=seen)
    opened = open_checkpoint(checkpoint)
    with written_whole(target) as folder:
        quantised = quantisation(opened, config, _tell)
        save_manifest(write_bundle(opened, folder, config, quantised, _tell)[1])


def default_folder() -> Path:
    """Where made weights and exports are kept; `TINTYPE_BENCH_CACHE` or `--cache` says otherwise."""
    return Path(os.environ.get(VARIABLE) or cache_folder() / "bench")
