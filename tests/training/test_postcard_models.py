"""Every model in the box can be trained: a few steps of the real code on a handful of pictures."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from itertools import pairwise

import diffusers
import numpy as np
import pytest
import torch

from tintype import load
from tintype.models.autoencoder_kl import AutoencoderKL
from tintype.models.clip import CLIPTextEncoder
from tintype.training.loop import FitConfig
from tintype.training.postcard import stages
from tintype.training.postcard.autoencoder import CONFIG, encode_all, whiten
from tintype.training.postcard.batches import LookAlikes
from tintype.training.postcard.clip import text_config
from tintype.training.postcard.dataset import sample_scenes
from tintype.training.postcard.flow import flow_config, new_transformer, shortened
from tintype.training.postcard.judge import Judge, accuracy
from tintype.training.postcard.recipe import FITTED, RECIPES
from tintype.training.postcard.scene import ATTRIBUTES
from tintype.training.postcard.store import open_store, write_store

_FIT = FitConfig(steps=2, batch_size=4, learning_rate=1e-3, log_every=1)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_store(folder, 40, seed=1)
    return open_store(folder)


def test_the_store_holds_the_scenes_it_was_drawn_from(store):
    from tintype.training.postcard import render

    assert np.array_equal(store.pictures[3], render(store.scenes[3]))


def test_whitening_levels_the_latents_and_leaves_the_pictures(store):
    torch.manual_seed(0)
    vae = AutoencoderKL(CONFIG).eval()
    before = encode_all(vae, store, 8)
    decoded = vae.decode(before)
    whiten(vae, store, 40)
    after = encode_all(vae, store, 40)
    assert after.mean(dim=(0, 2, 3)).abs().max() < 0.02
    assert (after.std(dim=(0, 2, 3)) - 1).abs().max() < 0.02
    again = vae.decode(encode_all(vae, store, 8))
    assert (again - decoded).norm() / decoded.norm() < 0.02  # bfloat16 encoding on both sides


def test_an_untrained_judge_reads_by_chance(store):
    torch.manual_seed(0)
    images = torch.from_numpy(np.array(store.pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1
    read = accuracy(Judge().eval(), lambda rows: images[rows], store.scenes)
    assert read["overall"] < 0.5


def test_the_recipe_makes_a_checkpoint_that_draws(tmp_path, monkeypatch):
    recipe = replace(
        RECIPES["small"],
        pictures=40,
        encoded=16,
        channels=(32, 64),
        width=64,
        blocks=2,
        prior_blocks=2,
        decoder_channels=(32, 64),
        upsampler_channels=(16, 32),
        **dict.fromkeys(FITTED, _FIT),
    )
    monkeypatch.setattr(stages, "_FRESH", 10)
    shop = stages.Workshop(tmp_path / "data", tmp_path / "out", "small", recipe)
    monkeypatch.setattr(stages, "make_tokenizer", _small_tokenizer)
    monkeypatch.setattr(
        stages, "_fresh", lambda count: stages.PostcardStore(*stages.render_many(10, 3, workers=1))
    )
    monkeypatch.setattr(stages, "_PROMPTS", 2)
    few = {
        kind: {name: 2 if name.endswith("steps") else each for name, each in asked.items()}
        for kind, asked in stages._ASKED.items()
    }
    monkeypatch.setattr(stages, "_ASKED", few)
    stages.run("postcard", shop, lambda line: None)
    record = json.loads((shop.model / "training.json").read_text())
    assert math.isfinite(record["autoencoder"]["psnr_db"])
    assert set(record["prompt_accuracy"]) >= {"seen", "held_out"}
    assert [len(fits) for fits in record["fits"].values()] == [1, 1, 1, 1]

    further = replace(shop, out=tmp_path / "further", start=shop.model)
    stages.run("denoiser", further, lambda line: None)
    stages.run("accuracy", further, lambda line: None)
    card = (further.model / "README.md").read_text()
    assert card.count("\n| denoiser |") == 2
    assert card.count("\n| clip |") == 1

    beside = replace(shop, out=tmp_path / "flow", start=shop.model)
    stages.run("flow", beside, lambda line: None)
    stages.run("accuracy", beside, lambda line: None)
    card = (beside.model / "README.md").read_text()
    assert card.startswith("# Postcard-flow")
    assert "2 blocks 64 wide" in card
    encoded = {"prompt": "a red lighthouse", "seed": 1, "num_inference_steps": 2}
    assert load(beside.model)(**encoded, output_type="np").images.shape == (1, 128, 128, 3)

    cascade = replace(shop, out=tmp_path / "unclip", start=shop.model)
    for stage in ("prior", "decoder", "upsampler", "accuracy"):
        stages.run(stage, cascade, lambda line: None)
    card = (cascade.model / "README.md").read_text()
    assert card.startswith("# Postcard-unclip")
    assert "a UNet, 32/64, draws 32x32 pixels" in card
    drawn = load(cascade.model)(
        **few["unclip"], prompt="a red lighthouse", seed=1, output_type="np"
    )
    assert drawn.images.shape == (1, 128, 128, 3)
    # What was trained is what is stored, diffusers' own loader included.
    theirs = diffusers.PriorTransformer.from_pretrained(cascade.model / "prior")
    assert theirs.clip_std.min() > 0
    for name in ("decoder", "super_res_first", "super_res_last"):
        kind = diffusers.UNet2DConditionModel if name == "decoder" else diffusers.UNet2DModel
        _, found = kind.from_pretrained(cascade.model / name, output_loading_info=True)
        assert not any(found.values())


def test_a_shortened_text_encoder_says_the_same_of_a_caption():
    torch.manual_seed(0)
    whole = CLIPTextEncoder(text_config(300)).eval()
    ids = torch.randint(1, 298, (2, 77))
    ids[:, 40:] = 299
    with torch.no_grad():
        expected, actual = whole(ids), shortened(whole)(ids[:, :48])
    torch.testing.assert_close(actual.penultimate, expected.penultimate[:, :48])
    torch.testing.assert_close(actual.pooled, expected.pooled)


def test_an_untrained_flow_hands_its_input_on():
    transformer = new_transformer(flow_config(32, 64, 2), seed=0)
    latents, text, pooled = torch.randn(1, 4, 16, 16), torch.randn(1, 48, 32), torch.randn(1, 32)
    with torch.no_grad():
        assert not transformer(latents, torch.tensor([500.0]), text, pooled).any()


def test_look_alikes_come_in_groups_that_agree():
    scenes = sample_scenes(5000, seed=2)
    sampler = LookAlikes(scenes, size=100, seed=3)
    rows = sampler.rows(step=0)
    assert len(rows) == 100
    assert np.array_equal(rows, sampler.rows(step=0))

    def agreement(ordered):
        shared = [
            sum(getattr(a, name) == getattr(b, name) for name in ATTRIBUTES)
            for a, b in pairwise(ordered)
        ]
        return np.mean(shared)

    # Four attributes agree within a group by design, and one group follows another a few times.
    assert agreement([scenes[r] for r in rows]) > 4 > agreement(scenes)


def _small_tokenizer(folder):
    from tintype.training.postcard.clip import make_tokenizer

    return make_tokenizer(folder, captions=200, merges=100)
