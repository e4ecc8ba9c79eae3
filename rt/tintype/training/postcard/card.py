"""The model card: what the model in the box is, how it was made, and what was measured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from .recipe import FITTED, Recipe
from .scene import ATTRIBUTES, Scene

_HEAD = """# {title}

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
{recipe}
Captions are emptied one time in ten. Weights are stored in half precision. `training.json` holds every setting and
figure of this page.

"""
_RECIPES = {
    "denoiser": """
The judge is a classifier of renders. The text encoder is fitted to its features, locked, by contrast among look-alikes;
then it is frozen. UNet {channels}, {layers} layer(s) a level, velocity prediction on Stable Diffusion's noise schedule.
""",
    "flow": """
Autoencoder, text encoder and judge are postcard's. A joint text-image transformer in the form of Stable Diffusion 3,
{blocks} blocks {width} wide, on 2x2 patches of the latents, predicts the velocity of straight paths from picture to
noise; every time counts the same. Its text is the encoder's last layer but one, and the end token's last state.
""",
    "prior": """
Text encoder and judge are postcard's. In DALL-E 2's form: a causal transformer, {prior_blocks} blocks, draws what the
judge would see in a picture of the text; a UNet, {decoder_channels}, draws 32x32 pixels of that and the text; another,
{upsampler_channels}, enlarges them. All predict what is clean on the cosine schedule; the decoder says how much noise a
step adds.
""",
}
_RETRAIN = {
    "denoiser": """
Once more, from nothing:

    tintype train postcard --data DATA --out OUT --recipe {name}
    tintype export OUT/model -o BUNDLE --steps 20 --guidance {guidance:g}
""",
    "flow": """
Once more, beside a finished postcard:

    tintype train data --data DATA --out OUT --recipe {name}
    tintype train flow --data DATA --out OUT --recipe {name}
    tintype train accuracy --data DATA --out OUT --recipe {name}
    tintype export OUT/model -o BUNDLE --steps {steps} --guidance {guidance:g}
""",
    "prior": """
Once more, beside a finished postcard:

    tintype train data --data DATA --out OUT --recipe {name}
    for stage in prior decoder upsampler accuracy; do tintype train $stage --data DATA --out OUT --recipe {name}; done
    tintype export OUT/model -o BUNDLE --steps {steps} --guidance {guidance:g}
""",
}
_FIGURES = """
## Figures

How often a judge, a classifier trained on renders alone, reads from a picture what the prompt said. {prompts} prompts a
column that state every attribute, {steps} `{scheduler}` steps, guidance {guidance:g}, image i from seed i. `overall`
is the mean without the sky, which is decoration.

{rows}

{round_trip}Of {among} fresh pictures, {retrieval:.0f}% find their caption among all {among} by CLIP's measure.
"""
_TITLES = {"prior": "Postcard-unclip", "flow": "Postcard-flow", "denoiser": "Postcard"}


def write_card(path: Path, recipe: Recipe, record: Mapping[str, Any]) -> None:
    """Write the card to ``path`` from what the training stages recorded."""
    accuracy, fits = record["prompt_accuracy"], record["fits"]
    kind = next(each for each in _TITLES if each in fits)
    text = _HEAD.format(
        title=_TITLES[kind],
        attributes="; ".join(f"{a} ({', '.join(map(str, v))})" for a, v in ATTRIBUTES.items()),
        pictures=recipe.pictures,
        encoded=recipe.encoded,
        recipe=_RECIPES[kind].format(
            layers=recipe.layers,
            blocks=recipe.blocks,
            width=recipe.width,
            prior_blocks=recipe.prior_blocks,
            **{
                name: "/".join(map(str, getattr(recipe, name)))
                for name in ("channels", "decoder_channels", "upsampler_channels")
            },
        ),
    )
    text += _fits(fits) + _RETRAIN[kind].format(
        name=fits[kind][-1]["recipe"],
        guidance=accuracy["guidance_scale"],
        steps=accuracy["num_inference_steps"],
    )
    path.write_text(text + _figures(record), encoding="utf-8")


def _fits(fits: Mapping[str, Any]) -> str:
    lines = [
        "| model | seed | steps | batch | AdamW rate | Muon rate | seconds |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in FITTED:
        for fit in fits.get(name, []):
            cells = (name, fit["seed"], fit["steps"], fit["batch_size"], fit["learning_rate"])
            muon = fit["matrix_rate"] or "-"
            row = " | ".join(map(str, (*cells, muon, round(fit["seconds"]))))
            lines.append(f"| {row} |")
    return "\n".join(lines) + "\n"


def _figures(record: Mapping[str, Any]) -> str:
    accuracy, clip = record["prompt_accuracy"], record["clip"]
    columns = {"judge, fresh renders": record["judge"]}
    round_trip = ""
    if "autoencoder" in record:
        columns["after the autoencoder"] = record["autoencoder"]["read_after_round_trip"]
        psnr = record["autoencoder"]["psnr_db"]
        round_trip = f"The autoencoder's round trip has {psnr:.1f} dB PSNR. "
    columns |= {"generated, seen": accuracy["seen"], "generated, held out": accuracy["held_out"]}
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
        round_trip=round_trip,
        among=clip["among"],
        retrieval=100 * clip["retrieval"],
    )
