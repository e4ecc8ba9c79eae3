"""The postcard data set: scenes, pictures and captions agree with each other."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from tintype.training.postcard import (
    ATTRIBUTES,
    WORDS,
    Scene,
    caption,
    caption_with_stated,
    contact_sheet,
    full_caption,
    is_held_out,
    labels,
    render,
    render_many,
    sample_scenes,
)
from tintype.training.postcard.scene import valid_skies

SCENE = Scene("coast", "noon", "clear", "none", "lighthouse", "red", 1, "left", seed=7)


@pytest.fixture(scope="module")
def train() -> list[Scene]:
    return sample_scenes(3000, 1)


@pytest.fixture(scope="module")
def held() -> list[Scene]:
    return sample_scenes(600, 1, held_out=True)


def triple(scene: Scene) -> tuple[str, str, str]:
    return scene.subject, scene.colour, scene.place


def test_held_out_scenes_never_meet_training_scenes(train, held):
    assert not any(map(is_held_out, train))
    assert all(map(is_held_out, held))
    assert not {triple(s) for s in train} & {triple(s) for s in held}


def test_about_a_twelfth_of_the_triples_is_held_out(train, held):
    kept, out = len({triple(s) for s in train}), len({triple(s) for s in held})
    assert kept + out == 7 * 7 * 6
    assert 0.06 < out / (kept + out) < 0.10


@pytest.mark.parametrize("first", ["subject", "colour", "place"])
@pytest.mark.parametrize("second", ["subject", "colour", "place"])
def test_every_pair_of_held_out_attributes_stays_in_training(train, first, second):
    pairs = {(getattr(s, first), getattr(s, second)) for s in train}
    expected = len(ATTRIBUTES[first]) * (len(ATTRIBUTES[second]) if first != second else 1)
    assert len(pairs) == expected


def test_every_value_is_drawn(train):
    for name, values in ATTRIBUTES.items():
        assert {getattr(s, name) for s in train} == set(values)


def test_the_sky_fits_time_and_weather(train):
    assert all(s.sky in valid_skies(s.time, s.weather) for s in train)
    assert not any(s.sky == "sun" and s.time == "night" for s in train)


def test_labels_index_the_attributes(train):
    indices = labels(train[:50])
    assert set(indices) == set(ATTRIBUTES)
    for name, values in ATTRIBUTES.items():
        assert [values[i] for i in indices[name]] == [getattr(s, name) for s in train[:50]]


def test_a_scene_is_always_the_same_picture():
    first, second = render(SCENE), render(SCENE)
    assert first.shape == (128, 128, 3)
    assert first.dtype == np.uint8
    assert first.flags.writeable
    np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize("size", [32, 64, 100])
def test_other_sizes_show_the_same_scene(size):
    picture = render(SCENE, size)
    assert picture.shape == (size, size, 3)
    mean = render(SCENE).mean((0, 1))
    np.testing.assert_allclose(picture.mean((0, 1)), mean, atol=4)


@pytest.mark.parametrize("name", list(ATTRIBUTES))
def test_every_attribute_shows(name):
    base = replace(SCENE, time="dusk")  # every kind of sky is possible at dusk
    pictures = [render(replace(base, **{name: value})) for value in ATTRIBUTES[name]]
    for i, a in enumerate(pictures):
        for b in pictures[i + 1 :]:
            changed = np.abs(a.astype(int) - b.astype(int)).max(-1) > 24
            assert changed.mean() > 0.008


def test_the_seed_changes_the_layout_only():
    assert (render(SCENE) != render(replace(SCENE, seed=8))).any()


@pytest.mark.parametrize(
    ("position", "low", "high"),
    [("left", 0.2, 0.36), ("centre", 0.44, 0.56), ("right", 0.64, 0.8)],
)
@pytest.mark.parametrize("count", [1, 2, 3])
def test_position_is_where_the_colour_is(position, low, high, count):
    scene = replace(SCENE, place="city", weather="snow", position=position, count=count)
    picture = render(scene).astype(int)
    red = (picture[..., 0] > 150) & (picture[..., 1:].max(-1) < 90)
    assert low < np.nonzero(red)[1].mean() / 128 < high


def test_workers_and_count_do_not_change_the_pictures():
    alone, scenes = render_many(40, 3, size=32, workers=1)
    shared, same = render_many(40, 3, size=32, workers=2)
    fewer, _ = render_many(5, 3, size=32, workers=1)
    assert scenes == same
    np.testing.assert_array_equal(alone, shared)
    np.testing.assert_array_equal(alone[:5], fewer)


def says(text: str, name: str, value: object) -> bool:
    padded = " " + text.lower().replace(",", " ").replace(".", " ") + " "
    plural = "s" if name == "subject" else ""
    words = WORDS[name][value]
    return any(f" {w} " in padded or f" {w}{plural} " in padded for w in words)


def test_captions_state_what_they_claim(train):
    rng = np.random.default_rng(0)
    for scene in train:
        text, stated = caption_with_stated(scene, rng)
        assert {"subject", "count"} <= stated <= set(ATTRIBUTES)
        assert all(says(text, name, getattr(scene, name)) for name in stated), text
        assert len(text.split()) < 40


def test_captions_state_nothing_else(train):
    rng = np.random.default_rng(1)
    for scene in train:
        text, stated = caption_with_stated(scene, rng)
        for name in ("colour", "position"):
            wrong = [v for v in ATTRIBUTES[name] if v != getattr(scene, name) or name not in stated]
            assert not any(says(text, name, v) for v in wrong), text


def test_full_captions_leave_nothing_out(train):
    rng = np.random.default_rng(2)
    for scene in train:
        text = full_caption(scene, rng)
        assert all(says(text, name, getattr(scene, name)) for name in ATTRIBUTES), text
        assert len(text.split()) < 40


def test_captions_vary_and_follow_the_generator():
    drawn = [caption(SCENE, np.random.default_rng(i)) for i in range(200)]
    assert drawn == [caption(SCENE, np.random.default_rng(i)) for i in range(200)]
    assert len(set(drawn)) > 150


def test_natural_wording_is_reachable():
    scene = replace(SCENE, time="dusk")
    rng = np.random.default_rng(3)
    wanted = "a red lighthouse on a rocky coast at dusk"
    assert any(caption(scene, rng).lower().rstrip(".") == wanted for _ in range(8000))


def test_contact_sheet_has_a_cell_for_each_scene(train):
    sheet = contact_sheet(train[:5], 3, size=32, captions=True)
    assert sheet.size == (3 * 36 + 4, 2 * (36 + 44) + 4)
