"""The model card: what the model in the box is, how it was made, and what was measured."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from ..loop import FitConfig
from .recipe import FITTED, Recipe
from .scene import ATTRIBUTES, Scene

_HEAD = """# Postcard

A small text-to-image model: 128x128 illustrated landscapes from a sentence. It was trained from nothing by this
project's own code on pictures that this project draws (`tintype.training.postcard`), so weights, data and code are
all under the project's licence.

It knows {attributes}. It draws nothing else, and what a prompt leaves out it makes up.

## Data

{pictures:,} drawn scenes (seed 1), each with a fresh caption at every visit, synonyms and omissions included; the
denoiser saw the first {encoded:,}. Combinations of subject, colour and place for which
`(5 * subject + 3 * colour + 7 * place) % 12 == 0` (indices in the order of `tintype.training.postcard.ATTRIBUTES`)
never occur in training: they are the held-out combinations below.

## Recipe

`{name}`: UNet {channels}, {layers} layer(s) a level, velocity prediction on Stable Diffusion's noise schedule,
captions emptied one time in ten. Weights are stored in half precision. Everything starts from seed 0.

"""
_RETRAIN = """
Once more, from nothing:

    tintype train postcard --data DATA --out OUT --recipe {name}
    tintype export OUT/model -o BUNDLE --steps 20 --guidance {guidance:g}
"""
_FIGURES = """
## Figures

How often a judge, a classifier trained on renders alone, reads from a picture what the prompt said. {prompts} prompts a
column that state every attribute, {steps} `{scheduler}` steps, guidance {guidance:g}, image i from seed i. `overall`
is the mean without the sky, which is decoration.

{rows}

The autoencoder's round trip has {psnr:.1f} dB PSNR. CLIP finds a picture's caption among {among} in {retrieval:.0f}%
of cases.
"""


def write_card(
    path: Path, name: str, recipe: Recipe, work: Path, figures: Mapping[str, Any]
) -> None:
    """Write the card to ``path`` from the run's logs in ``work`` and its figures."""
    accuracy = figures["prompt_accuracy"]
    text = _HEAD.format(
        attributes="; ".join(f"{a} ({', '.join(map(str, v))})" for a, v in ATTRIBUTES.items()),
        pictures=recipe.pictures,
        encoded=recipe.encoded,
        name=name,
        channels="/".join(map(str, recipe.channels)),
        layers=recipe.layers,
    )
    text += _fits(recipe, work) + _RETRAIN.format(name=name, guidance=accuracy["guidance_scale"])
    path.write_text(text + _figures(figures), encoding="utf-8")


def _fits(recipe: Recipe, work: Path) -> str:
    lines = [
        "| model | steps | batch | AdamW rate | Muon rate | seconds |",
        "|---|---|---|---|---|---|",
    ]
    for name in FITTED:
        fit: FitConfig = getattr(recipe, name)
        last = json.loads((work / name / "log.jsonl").read_text().splitlines()[-1])
        muon = fit.matrix_rate or "-"
        lines.append(
            f"| {name} | {last['step']} | {fit.batch_size} | {fit.learning_rate} | {muon} | {last['seconds']:.0f} |"
        )
    return "\n".join(lines) + "\n"


def _figures(figures: Mapping[str, Any]) -> str:
    accuracy, clip = figures["prompt_accuracy"], figures["clip"]
    columns = {
        "judge, fresh renders": figures["judge"],
        "after the autoencoder": figures["autoencoder"]["read_after_round_trip"],
        "generated, seen": accuracy["seen"],
        "generated, held out": accuracy["held_out"],
    }
    names = [f.name for f in fields(Scene) if f.name != "seed"] + ["overall"]
    rows = ["| attribute | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for name in names:
        rows.append(
            f"| {name} | " + " | ".join(f"{100 * c[name]:.1f}%" for c in columns.values()) + " |"
        )
    return _FIGURES.format(
        prompts=accuracy["prompts"],
        steps=accuracy["num_inference_steps"],
        scheduler=accuracy["scheduler"],
        guidance=accuracy["guidance_scale"],
        rows="\n".join(rows),
        psnr=figures["autoencoder"]["psnr_db"],
        among=clip["among"],
        retrieval=100 * clip["retrieval"],
    )
