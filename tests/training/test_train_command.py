"""`tintype train` where what a stage reads is absent, half there, or another recipe's: a line that says what to run."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tintype.cli import BAD_USAGE, FAILED, main
from tintype.errors import TintypeError
from tintype.loading import BOX
from tintype.training import cli
from tintype.training.postcard import stages, store
from tintype.training.postcard.recipe import RECIPES


@pytest.fixture(autouse=True)
def _registered(monkeypatch):
    """The command as the entry point brings it, whatever was installed when."""
    monkeypatch.setattr("tintype.cli._register_plugins", lambda sub, name: cli.register(sub))


def train(stage, data, out, *options):
    return main(["train", stage, "--data", str(data), "--out", str(out), *options])


@pytest.fixture
def data(tmp_path):
    """A few pictures."""
    store.write_store(tmp_path / "data", 4, seed=1)
    return tmp_path / "data"


@pytest.mark.parametrize("device", ["warp", "meta", "mps", "cuda:99"])
def test_a_device_that_does_not_train_is_bad_usage(tmp_path, capsys, device):
    assert train("judge", tmp_path, tmp_path, "--device", device) == BAD_USAGE
    assert capsys.readouterr().err.startswith(f"tintype: --device {device}")


def test_fewer_pictures_than_the_recipe_takes_are_told_before_training(data, tmp_path, capsys):
    assert train("judge", data, tmp_path / "out", "--recipe", "large") == FAILED
    said = "holds 4 pictures, and recipe large takes 200000; run: tintype train data"
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("damage", ["no JSON", "no count", "other count", "cut", "absent"])
def test_a_damaged_data_set_is_told(data, tmp_path, capsys, damage):
    pictures, settings = data / "pictures.npy", data / "data.json"
    if damage == "cut":
        pictures.write_bytes(pictures.read_bytes()[:100_000])
    elif damage == "absent":
        pictures.unlink()
    else:
        count = {"count": 5} if damage == "other count" else {}
        rest = {"seed": 1, "size": 128, "held_out": False}
        settings.write_text("{" if damage == "no JSON" else json.dumps(rest | count))
    assert train("judge", data, tmp_path / "out") == FAILED
    assert "holds no whole data set" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("pictures", "found"),
    [
        (np.zeros((4, 64, 64, 3), np.uint8), "uint8 [4, 64, 64, 3]"),
        (np.zeros((4, 128, 128), np.uint8), "uint8 [4, 128, 128]"),
        (np.zeros((4, 128, 128, 3), np.float32), "float32 [4, 128, 128, 3]"),
    ],
)
def test_pictures_of_another_shape_or_type_are_told(data, tmp_path, capsys, pictures, found):
    np.save(data / "pictures.npy", pictures)
    assert train("judge", data, tmp_path / "out") == FAILED
    said = f"holds no whole data set (pictures.npy is {found}, expected uint8 [4, 128, 128, 3])"
    assert said in capsys.readouterr().err


def test_pictures_that_were_being_drawn_again_are_not_taken_for_whole(data, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(store, "render_scenes", interrupted)
    with pytest.raises(KeyboardInterrupt):
        store.write_store(data, 4, seed=1)
    assert not (data / "data.json").exists()


@pytest.mark.parametrize(
    ("stage", "said"),
    [
        ("clip", "has no judge yet; run: tintype train judge"),
        ("autoencoder", "has no judge yet; run: tintype train judge"),
        ("denoiser", "is no checkpoint yet; run the stages before"),
        ("accuracy", "has no judge yet; run: tintype train judge"),
    ],
)
def test_a_stage_without_those_before_it_says_which(
    data, tmp_path, monkeypatch, capsys, stage, said
):
    few = RECIPES["small"]
    monkeypatch.setitem(RECIPES, "small", replace(few, encoded=4))
    assert train(stage, data, tmp_path / "out") == FAILED
    assert said in capsys.readouterr().err.splitlines()[-1]


def test_a_checkpoint_is_taken_over_whole_or_not_at_all(data, tmp_path, monkeypatch):
    def interrupted(_, target, **__):
        target.mkdir(parents=True)
        raise KeyboardInterrupt

    def encode(*_):
        raise KeyboardInterrupt

    shop = stages.Workshop(
        data, tmp_path / "out", "small", replace(RECIPES["small"], encoded=4), BOX / "postcard"
    )
    with monkeypatch.context() as patch:
        patch.setattr(stages.shutil, "copytree", interrupted)
        with pytest.raises(KeyboardInterrupt):
            stages.denoiser(shop)
    assert not shop.model.exists()
    monkeypatch.setattr(stages, "encode_all", encode)
    with pytest.raises(KeyboardInterrupt):
        stages.denoiser(shop)
    assert (shop.model / "model_index.json").is_file()


class _Encoding(Exception):
    """A denoiser's training has come as far as the latents."""


@pytest.fixture
def shop(data, tmp_path, monkeypatch):
    """Where a denoiser starts from a copy of postcard, and stops at the latents."""

    def encode(*_):
        raise _Encoding

    monkeypatch.setattr(stages, "encode_all", encode)
    start = shutil.copytree(BOX / "postcard", tmp_path / "start")
    few = replace(RECIPES["small"], encoded=4)
    return stages.Workshop(data, tmp_path / "out", "small", few, start)


def test_a_start_is_taken_up_again_by_any_of_its_names_and_without_it(shop, monkeypatch):
    with pytest.raises(_Encoding):
        stages.denoiser(shop)
    monkeypatch.chdir(shop.start.parent)
    for start in (shop.start, Path("start"), None):
        with pytest.raises(_Encoding):
            stages.denoiser(replace(shop, start=start))


def test_a_model_that_was_not_begun_from_a_start_is_not_taken_for_it(shop):
    with pytest.raises(_Encoding):
        stages.denoiser(shop)
    other = replace(shop, start=BOX / "postcard")
    with pytest.raises(
        TintypeError, match="postcard: .*out/model was begun from .*start; "
    ) as told:
        stages.denoiser(other)
    assert len(str(told.value).splitlines()) == 1
    (shop.work("denoiser") / "start.txt").unlink()  # as where the stages before made the model
    with pytest.raises(
        TintypeError, match="start: .*out/model was begun from no other checkpoint; "
    ):
        stages.denoiser(shop)
