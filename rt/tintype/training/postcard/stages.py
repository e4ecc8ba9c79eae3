"""The stages of training the models in the box, each reading what the ones before it wrote.

DATA/                    pictures.npy, data.json                  data
OUT/model/               the checkpoint, diffusers layout         clip, autoencoder, denoiser; or flow; or prior,
                                                                  decoder, upsampler
OUT/model/judge/         the judge's weights                      judge
OUT/model/training.json  how each model was fitted, what it does  every fitted stage, accuracy
OUT/model/README.md      the same for people                      accuracy
OUT/work/STAGE/          state to resume from, log.jsonl          every fitted stage
OUT/work/denoiser/       start.txt: what --start copied           denoiser
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tintype.checkpoints import open_checkpoint
from tintype.errors import TintypeError
from tintype.loading import BOX, is_checkpoint, load
from tintype.models.autoencoder_kl import AutoencoderKL
from tintype.models.pixel_unet import PixelUNet
from tintype.tokenizer import ClipTokenizer

from ..save import write_json
from . import assemble
from .autoencoder import CONFIG, encode_all, reconstruction_psnr, train_autoencoder
from .batches import pictures
from .card import write_card
from .clip import judged_features, make_tokenizer, retrieval_accuracy, train_clip
from .dataset import render_many
from .denoiser import new_denoiser, train_denoiser
from .evaluate import prompt_accuracy, prompts
from .flow import flow_config, new_transformer, shortened, train_flow
from .judge import Judge, accuracy, load_judge, save_judge, train_judge
from .recipe import Recipe
from .store import PostcardStore, open_store, write_store
from .unclip import (
    new_decoder,
    new_prior,
    new_upsampler,
    small_pictures,
    train_decoder,
    train_prior,
    train_upsampler,
)

_RECORD = "training.json"
_DATA_SEED, _FRESH_SEED, _PROMPT_SEED = 1, 3, 5
_FRESH, _PROMPTS = 2000, 150
# The figures that are taken over with the parts.
_OF_FLOW, _OF_UNCLIP = ("judge", "clip", "autoencoder"), ("judge", "clip")
# What each family's pictures are asked for with when they are judged.
_ASKED: Mapping[str, Mapping[str, Any]] = {
    "latent_unet": {"num_inference_steps": 20, "scheduler": "dpmpp_2m", "guidance_scale": 4.0},
    "sd3": {"num_inference_steps": 12, "scheduler": "flow_euler", "guidance_scale": 3.0},
    "unclip": {
        "prior_num_inference_steps": 10,
        "prior_guidance_scale": 2.0,
        "num_inference_steps": 20,
        "guidance_scale": 3.0,
        "super_res_num_inference_steps": 5,
        "scheduler": "ddpm",
    },
}


@dataclass(frozen=True)
class Workshop:
    """Where a training run reads and writes, and by which recipe."""

    data: Path
    out: Path
    recipe_name: str
    recipe: Recipe
    start: Path | None = (
        None  # a finished checkpoint: its denoiser goes on, or its other parts serve a flow
    )

    @property
    def model(self) -> Path:
        return self.out / "model"

    def work(self, stage: str) -> Path:
        return self.out / "work" / stage

    def store(self) -> PostcardStore:
        if not (self.data / "data.json").exists():
            raise TintypeError(
                f"{self.data} holds no pictures; run: tintype train data --data {self.data}"
            )
        store = open_store(self.data)
        if len(store.scenes) < self.recipe.encoded:
            raise TintypeError(
                f"{self.data} holds {len(store.scenes)} pictures, and recipe {self.recipe_name} takes "
                f"{self.recipe.encoded}; run: tintype train data --data {self.data} --recipe {self.recipe_name}"
            )
        return store

    def judge(self) -> Judge:
        """The trained reader of attributes."""
        folder = self.model / "judge"
        if not folder.is_dir():
            raise TintypeError(f"{self.model} has no judge yet; run: tintype train judge")
        return load_judge(folder)

    def component(self, name: str, first: str = "clip") -> torch.nn.Module:
        """A trained part, float32, on the host, of the checkpoint that the stage ``first`` begins."""
        if not is_checkpoint(self.model):
            raise TintypeError(
                f"{self.model} is no checkpoint yet; run the stages before: tintype train {first}"
            )
        return open_checkpoint(self.model).component(name, torch.float32, torch.device("cpu"))

    def record(self, name: str, figures: Any) -> None:
        """Add what was measured to the model's training.json."""
        write_json(self.model / _RECORD, self.recorded() | {name: figures})

    def take_over(self, start: Path, names: Sequence[str]) -> None:
        """Record what another checkpoint says of these."""
        for name, figures in _read_record(start).items():
            if name in names:
                self.record(name, figures)

    def recorded(self) -> dict[str, Any]:
        """How this model was trained and what was measured so far."""
        return _read_record(self.model)

    def record_fit(self, stage: str) -> None:
        """Note how a stage was fitted, behind what the checkpoint that it started from says of itself."""
        last = json.loads((self.work(stage) / "log.jsonl").read_text().splitlines()[-1])
        fit = asdict(getattr(self.recipe, stage))
        fit |= {"recipe": self.recipe_name, "steps": last["step"], "seconds": last["seconds"]}
        before = _read_record(self.start).get("fits", {}) if self.start else {}
        fits = self.recorded().get("fits", {})
        self.record("fits", fits | {stage: [*before.get(stage, []), fit]})


def _read_record(model: Path) -> dict[str, Any]:
    path = model / _RECORD
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def data(shop: Workshop) -> None:
    """Render the training pictures."""
    write_store(shop.data, shop.recipe.pictures, _DATA_SEED)


def judge(shop: Workshop) -> None:
    """The reader of attributes, measured on fresh renders."""
    trained = train_judge(shop.store(), shop.recipe.judge, shop.work("judge")).cpu()
    save_judge(trained, shop.model / "judge")
    fresh = _fresh(_FRESH)
    shop.record_fit("judge")
    shop.record("judge", accuracy(trained, lambda rows: pictures(fresh, rows), fresh.scenes))


def clip(shop: Workshop) -> None:
    """Tokenizer, then the text encoder, which learns to say what the judge sees."""
    store, reader = shop.store(), shop.judge()
    tokenizer, vocabulary = make_tokenizer(shop.model / "tokenizer")
    seen = judged_features(reader, store)
    pair = train_clip(
        (seen, store.scenes), tokenizer, vocabulary, shop.recipe.clip, shop.work("clip")
    ).cpu()
    assemble.save_index(shop.model)
    assemble.save_text_encoder(pair.text, shop.model / "text_encoder")
    # Untrained parts make the folder a whole checkpoint from now on.
    assemble.save_autoencoder(AutoencoderKL(CONFIG), shop.model / "vae")
    unet = new_denoiser(shop.recipe.channels, shop.recipe.layers, shop.recipe.denoiser.seed)
    assemble.save_denoiser(unet, shop.model / "unet")
    fresh = _fresh(200)
    found = retrieval_accuracy(pair, judged_features(reader, fresh), fresh.scenes, tokenizer)
    shop.record_fit("clip")
    shop.record("clip", {"retrieval": found, "among": len(fresh.scenes)})


def autoencoder(shop: Workshop) -> None:
    """Encoder and decoder; what the judge still reads after a round trip bounds what a generator can reach."""
    store, reader = shop.store(), shop.judge()
    vae = train_autoencoder(store, shop.recipe.autoencoder, shop.work("autoencoder")).cpu()
    assemble.save_autoencoder(vae, shop.model / "vae")
    fresh = _fresh(500)

    def decoded(rows: slice) -> Tensor:
        return vae.decode(vae.encode(pictures(fresh, rows))[0]).clamp(-1, 1)

    with torch.no_grad():
        read = accuracy(reader, decoded, fresh.scenes)
    shop.record_fit("autoencoder")
    shop.record(
        "autoencoder",
        {
            "psnr_db": reconstruction_psnr(vae, fresh, len(fresh.scenes)),
            "read_after_round_trip": read,
        },
    )


def denoiser(shop: Workshop) -> None:
    """The UNet, on the latents of the pictures; begun anew, or where a finished checkpoint stands."""
    store, recipe = shop.store(), shop.recipe
    if shop.start is not None:
        _begin_from(shop.start, shop)
    vae: Any = shop.component("vae")
    latents = encode_all(vae.to(recipe.denoiser.device), store, recipe.encoded)
    text_encoder: Any = shop.component("text_encoder")
    unet: Any = shop.component("unet")
    train_denoiser(
        unet,
        (latents, store.scenes[: recipe.encoded]),
        text_encoder,
        ClipTokenizer(shop.model / "tokenizer"),
        recipe.denoiser,
        shop.work("denoiser"),
    )
    assemble.save_denoiser(unet.cpu(), shop.model / "unet")
    shop.record_fit("denoiser")


def _begin_from(start: Path, shop: Workshop) -> None:
    """Copy a finished checkpoint to go on from, once; refuse a model that was begun otherwise."""
    note = shop.work("denoiser") / "start.txt"
    if shop.model.exists():
        begun = os.fsdecode(note.read_bytes()) if note.exists() else "no other checkpoint"
        if begun != str(start.resolve()):
            raise TintypeError(
                f"--start {start}: {shop.model} was begun from {begun}; leave --start out to train that one further, "
                "or name another folder with --out"
            )
        return
    partial = shop.out / "model.partial"  # of a run that was interrupted as it copied
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(start, partial, ignore=shutil.ignore_patterns("*.onnx", "bundle.json"))
    note.parent.mkdir(parents=True, exist_ok=True)
    note.write_bytes(os.fsencode(start.resolve()))
    partial.rename(shop.model)


def flow(shop: Workshop) -> None:
    """The flow transformer, on the latents and the text encoder of a finished postcard, in a checkpoint of its own."""
    store, recipe, start = shop.store(), shop.recipe, shop.start or BOX / "postcard"
    parts = open_checkpoint(start)
    vae: Any = parts.component("vae")
    told: Any = parts.component("text_encoder")
    encoder = shortened(told)
    assemble.begin_flow(start, encoder, shop.model)
    shop.take_over(start, _OF_FLOW)
    latents = encode_all(vae.to(recipe.flow.device), store, recipe.encoded)
    config = flow_config(encoder.config.hidden_size, recipe.width, recipe.blocks)
    transformer = new_transformer(config, recipe.flow.seed)
    train_flow(
        transformer,
        (latents, store.scenes[: recipe.encoded]),
        encoder,
        ClipTokenizer(shop.model / "tokenizer"),
        recipe.flow,
        shop.work("flow"),
    )
    assemble.save_transformer(transformer.cpu(), shop.model / "transformer")
    shop.record_fit("flow")


def prior(shop: Workshop) -> None:
    """unCLIP's prior, on what the judge sees in pictures, in a checkpoint whose other parts are not trained yet."""
    store, recipe = shop.store(), shop.recipe
    start = shop.start or BOX / "postcard"
    told: Any = open_checkpoint(start).component("text_encoder")
    encoder = shortened(told)
    assemble.begin_unclip(start, encoder, shop.model)
    shop.take_over(start, _OF_UNCLIP)
    model = new_prior(recipe.prior_blocks, recipe.prior.seed)
    assemble.save_prior(model, shop.model / "prior")
    _save_decoder(shop, new_decoder(recipe.decoder_channels, recipe.decoder.seed))
    _save_upsampler(shop, new_upsampler(recipe.upsampler_channels, recipe.upsampler.seed))
    seen = judged_features(shop.judge(), store.first(recipe.encoded))
    tokenizer, scenes = ClipTokenizer(shop.model / "tokenizer"), store.scenes[: recipe.encoded]
    train_prior(model, (seen, scenes), encoder, tokenizer, recipe.prior, shop.work("prior"))
    assemble.save_prior(model.cpu(), shop.model / "prior")
    shop.record_fit("prior")


def decoder(shop: Workshop) -> None:
    """unCLIP's decoder, on small pictures and what the judge sees in them."""
    store, recipe = shop.store(), shop.recipe
    encoder: Any = shop.component("text_encoder", first="prior")
    seen = judged_features(shop.judge(), store.first(recipe.encoded))
    small = small_pictures(store, recipe.encoded)
    model = new_decoder(recipe.decoder_channels, recipe.decoder.seed)
    tokenizer, scenes = ClipTokenizer(shop.model / "tokenizer"), store.scenes[: recipe.encoded]
    data = (small, seen, scenes)
    train_decoder(model, data, encoder, tokenizer, recipe.decoder, shop.work("decoder"))
    _save_decoder(shop, model.cpu())
    shop.record_fit("decoder")


def upsampler(shop: Workshop) -> None:
    """unCLIP's upsampler, which serves every step of enlarging."""
    store, recipe = shop.store(), shop.recipe
    shop.component("super_res_first", first="prior")  # it is there to be replaced
    model = new_upsampler(recipe.upsampler_channels, recipe.upsampler.seed)
    train_upsampler(model, store, recipe.upsampler, shop.work("upsampler"))
    _save_upsampler(shop, model.cpu())
    shop.record_fit("upsampler")


def _save_decoder(shop: Workshop, model: Any) -> None:
    assemble.save_projection(model["projection"], shop.model / "text_proj")
    assemble.save_pixel_unet(model["unet"], shop.model / "decoder")


def _save_upsampler(shop: Workshop, model: PixelUNet) -> None:
    for name in ("super_res_first", "super_res_last"):
        assemble.save_pixel_unet(model, shop.model / name)


def measure(shop: Workshop) -> None:
    """Prompt accuracy of the finished model on seen and on held-out combinations."""
    reader, pipeline = shop.judge(), load(shop.model)
    asked = {
        name: prompts(_PROMPTS, _PROMPT_SEED, held_out=name == "held_out")
        for name in ("seen", "held_out")
    }
    settings = _ASKED[pipeline.family.kind]
    read = {name: prompt_accuracy(pipeline, reader, p, **settings) for name, p in asked.items()}
    shop.record("prompt_accuracy", {**settings, "prompts": _PROMPTS, **read})
    write_card(shop.model / "README.md", shop.recipe, shop.recorded())


def _fresh(count: int) -> PostcardStore:
    """Renders that no training saw."""
    return PostcardStore(*render_many(count, _FRESH_SEED))


STAGES: Mapping[str, Callable[[Workshop], None]] = {
    "data": data,
    "judge": judge,
    "clip": clip,
    "autoencoder": autoencoder,
    "denoiser": denoiser,
    "accuracy": measure,
    "flow": flow,
    "prior": prior,
    "decoder": decoder,
    "upsampler": upsampler,
}
_POSTCARD = ("data", "judge", "clip", "autoencoder", "denoiser", "accuracy")


def run(stage: str, shop: Workshop, say: Callable[[str], None]) -> None:
    """Run one stage, or with "postcard" all that are not done, in order."""
    for name in _POSTCARD if stage == "postcard" else [stage]:
        done = shop.out / "work" / f"{name}.done"
        if stage == "postcard" and done.exists():
            continue
        started = time.perf_counter()
        say(f"{name}: started")
        STAGES[name](shop)
        done.parent.mkdir(parents=True, exist_ok=True)
        done.touch()
        say(f"{name}: done in {time.perf_counter() - started:.0f} s")
