"""An engine is not trusted until it is compared: bundle against float32 torch, stage by stage and whole."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import groupby
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray

from tintype.backends import Arrays
from tintype.backends.torch import TorchBackend
from tintype.bundle import Bundle
from tintype.checkpoints import Checkpoint
from tintype.errors import BundleError, RequestError
from tintype.families.conditioning import STAGES, Conditioning, joined
from tintype.loading import bundle_pipeline, checkpoint_pipeline
from tintype.models.stages import stage_component
from tintype.pipeline import Pipeline
from tintype.request import CASCADE

from .pictures import shown
from .profiles import example_inputs
from .quality import psnr, ssim
from .report import BUDGETS, Budget, PictureReport, Report, StageReport

# What pictures are asked for with when the judge reads them, as when the model in the box was measured.
_READ = {"num_inference_steps": 20, "scheduler": "dpmpp_2m", "guidance_scale": 4.0}
_READ_SEED = 5
_PROMPT, _SEED, _STEPS = "a red lighthouse on a rocky coast at dusk", 7, 8
# Block by block, so that a model of any size can be compared with.
_REFERENCE: dict[str, Any] = {"device": "cpu", "dtype": "float32", "offload": "sequential"}
_PRODUCTS = ("Conv", "ConvTranspose", "Gemm", "MatMul")


def verify(
    bundle: Bundle, checkpoint: Checkpoint, backend: str = "auto", prompts: int = 0
) -> Report:
    """Compare the bundle with ``checkpoint`` on float32 torch, every stage at every profile, and a picture.

    With ``prompts`` the judge beside the checkpoint reads that many pictures of held-out prompts.
    """
    engine = bundle_pipeline(bundle, backend).family.backend
    stages = list(_stage_reports(bundle, checkpoint, backend))
    finite = all(stage.finite for stage in stages)
    return Report(
        backend=engine.name,
        precision=bundle.precision,
        computed_in=str(getattr(engine, "dtype", "unknown")),
        reference=f"torch {torch.__version__}, float32, of {checkpoint.source.name}",
        stages=stages,
        picture=_picture_report(bundle, checkpoint, backend) if finite else None,
        written=bundle.provenance.get("options", {}).get("computed", "float32"),
        accuracy=_accuracy(bundle, checkpoint, backend, prompts) if prompts and finite else None,
    )


def _accuracy(bundle: Bundle, checkpoint: Checkpoint, backend: str, count: int) -> dict[str, float]:
    """The judge's readings of pictures that the bundle draws."""
    from tintype.training.postcard.evaluate import prompt_accuracy, prompts
    from tintype.training.postcard.judge import load_judge

    folder = checkpoint.source / "judge"
    if not folder.is_dir():
        raise RequestError(
            f"{checkpoint.source} has no judge; prompt accuracy is read for models in the box, such as postcard"
        )
    pipe = bundle_pipeline(bundle, backend)
    asked = prompts(count, _READ_SEED, held_out=True)
    return prompt_accuracy(pipe, load_judge(folder), asked, **_READ)


def budget_of(bundle: Bundle) -> Budget:
    """What the bundle was exported to keep to."""
    usual = BUDGETS.get(bundle.precision, BUDGETS["fp32"])
    asked = bundle.provenance.get("options", {}).get("tolerance_db", usual.psnr_db)
    return Budget(float(asked), usual.stage_error)


def require(report: Report, budget: Budget, suspects: str = "") -> None:
    """Raises BundleError where the report is over budget: the stage at fault, and the layers that are suspected."""
    if not (faults := report.faults(budget)):
        return
    layers = f"; layers in codes that do most to their stages: {suspects}" if suspects else ""
    raise BundleError("; ".join(faults[:2]) + layers)


def _stage_reports(bundle: Bundle, checkpoint: Checkpoint, backend: str) -> Iterator[StageReport]:
    """A block of the reference and one graph of the bundle are in memory at a time.

    Stages behind the text encoders are told what those said: scales that were found on texts do not fit noise.
    """
    component = partial(stage_component, components=checkpoint.components)
    texts: dict[str, Conditioning] = {}
    for _, stages in groupby(bundle.stages, component):
        reference = TorchBackend(checkpoint, **_REFERENCE)
        for stage in stages:
            names, told = reference.inputs(stage), None
            if texts and stage not in STAGES:
                told = joined(checkpoint.family, texts, checkpoint.defaults)
            for profile, relative in bundle.stages[stage].items():
                engine = bundle_pipeline(bundle, backend).family.backend
                inputs = example_inputs(checkpoint, names, stage, profile, seed=1, told=told)
                actual = engine.run(stage, profile, inputs)
                expected = reference.run(stage, profile, inputs)
                if stage in STAGES:
                    said = expected["encoder_hidden_states"], expected.get("text_embeds")
                    texts[stage] = Conditioning(*said)
                if (given := _shapes(actual)) != (wanted := _shapes(expected)):
                    raise RequestError(
                        f"{checkpoint.source} is not what {bundle.folder} was exported from: stage {stage} at "
                        f"{profile} gives {wanted}, and the bundle's {given}; name the checkpoint that it came from"
                    )
                found = _difference(actual, expected)
                yield StageReport(stage, profile, _computes(bundle, relative), **found)


def _shapes(outputs: Arrays) -> str:
    return ", ".join(f"{name} {list(outputs[name].shape)}" for name in sorted(outputs))


def _difference(actual: Arrays, expected: Arrays) -> dict[str, Any]:
    """How the outputs of a stage, taken as one vector, differ."""
    a = np.concatenate([actual[name].ravel() for name in expected]).astype(np.float64)
    e = np.concatenate([expected[name].ravel() for name in expected]).astype(np.float64)
    if not np.isfinite(a).all():
        lost = {"relative_error": float("inf"), "cosine": 0.0, "worst": float("inf")}
        return {**lost, "worst_at": _place(expected, ~np.isfinite(a)), "finite": False}
    difference = np.abs(a - e)
    return {
        "relative_error": float(np.linalg.norm(difference) / np.linalg.norm(e)),
        "cosine": float(a @ e / (np.linalg.norm(a) * np.linalg.norm(e))),
        "worst": float(difference.max()),
        "worst_at": _place(expected, difference),
        "finite": True,
    }


def _place(outputs: Arrays, score: NDArray[Any]) -> str:
    """The output and index of the highest score, such as image[0, 3, 5, 2]."""
    position = int(np.argmax(score))
    for name, array in outputs.items():
        if position < array.size:
            index = np.unravel_index(position, array.shape)
            return f"{name}[{', '.join(str(int(i)) for i in index)}]"
        position -= array.size
    raise AssertionError("a position past the last output")


def _computes(bundle: Bundle, relative: str) -> list[str]:
    """The element types that a graph's products have, as far as it says."""
    graph = ir.load(bundle.path(relative)).graph
    types = {node.outputs[0].dtype for node in graph if node.op_type in _PRODUCTS}
    return sorted(str(dtype.numpy()) for dtype in types if dtype is not None)


def _picture_report(bundle: Bundle, checkpoint: Checkpoint, backend: str) -> PictureReport:
    settings = {
        "width": bundle.defaults["width"],
        "height": bundle.defaults["height"],
        "guidance_scale": bundle.defaults["guidance_scale"],
        "scheduler": bundle.defaults.get("scheduler"),
        "num_inference_steps": _STEPS,
    }
    settings |= {name: bundle.defaults[name] for name in CASCADE if name in bundle.defaults}
    engine = bundle_pipeline(bundle, backend)
    settings |= shown(engine.family, settings["width"], settings["height"])
    picture, latents = _drawn(engine, _SEED, settings)
    other, _ = _drawn(engine, _SEED + 1, settings)
    del engine
    whole = checkpoint_pipeline(checkpoint, **_REFERENCE)
    expected, steps = _drawn(whole, _SEED, settings)
    pairs = zip(latents, steps, strict=True)
    return PictureReport(
        size=f"{settings['width']}x{settings['height']}",
        steps=_STEPS,
        seed=_SEED,
        psnr_db=psnr(picture, expected),
        ssim=ssim(picture, expected),
        other_seed_db=psnr(other, expected),
        other_seed_ssim=ssim(other, expected),
        latents_error=[float(np.linalg.norm(a - e) / np.linalg.norm(e)) for a, e in pairs],
    )


def _drawn(
    pipe: Pipeline, seed: int, settings: dict[str, Any]
) -> tuple[NDArray[Any], list[NDArray[Any]]]:
    """A picture [1, h, w, 3] and its latents after every step."""
    steps: list[NDArray[Any]] = []

    def keep(step: int, total: int, latents: NDArray[Any]) -> None:
        steps.append(np.array(latents))

    made = pipe(_PROMPT, seed=seed, output_type="np", callback_on_step_end=keep, **settings)
    return np.asarray(made.images), steps
