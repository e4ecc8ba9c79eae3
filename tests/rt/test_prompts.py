"""Weights in brackets and long prompts: the syntax, the windows, and what they do to the text encoder's output."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import tintype
from tintype.errors import RequestError
from tintype.families.conditioning import Reading, TextSide
from tintype.prompts import fragments
from tintype.tokenizer import ClipTokenizer
from tolerances import TINY_GRAPH, relative_error


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a red fox", [("a red fox", 1)]),
        ("", [("", 1)]),
        ("a (red) fox", [("a ", 1), ("red", 1.1), (" fox", 1)]),
        ("a (red:1.3) fox", [("a ", 1), ("red", 1.3), (" fox", 1)]),
        ("a (red: 0.5 ) fox", [("a ", 1), ("red", 0.5), (" fox", 1)]),
        ("a [red] fox", [("a ", 1), ("red", 1 / 1.1), (" fox", 1)]),
        ("((red)) fox", [("red", 1.1**2), (" fox", 1)]),
        ("(a [red:1.5] (fox:2))", [("a ", 1.1), ("red:1.5", 1.0), (" ", 1.1), ("fox", 2.2)]),
        (r"\(red\) a\b", [(r"(red) a\b", 1)]),
        ("at 5:30 (now:1.2)", [("at 5:30 ", 1), ("now", 1.2)]),
        ("(a:b:1.5)", [("a:b", 1.5)]),
        ("(red:1.5", None),
        ("red)", None),
        ("(red]", None),
        ("[red", None),
    ],
)
def test_the_syntax(prompt, expected):
    if expected is None:
        with pytest.raises(RequestError, match="has no partner"):
            fragments(prompt)
        return
    found = fragments(prompt)
    assert [text for text, _ in found] == [text for text, _ in expected]
    np.testing.assert_allclose([w for _, w in found], [w for _, w in expected], rtol=1e-12)


@given(st.text())
def test_any_text_is_read_or_refused(prompt):
    escaped = prompt.translate({ord(character): f"\\{character}" for character in "()[]\\"})
    assert "".join(text for text, _ in fragments(escaped)) == prompt
    try:
        fragments(prompt)
    except RequestError:
        assert set(prompt) & set("()[]")


@pytest.fixture
def side(tiny_pipeline):
    family = tiny_pipeline.family
    return TextSide(family.backend, family.tokenizers, family.kind, family.defaults)


def test_brackets_are_plain_text_unless_asked_for(tiny_pipeline, side):
    plain, weighted = (side.encode("a (red) fox", {}, Reading(w)).hidden for w in (False, True))
    assert not np.array_equal(plain, weighted)
    with pytest.raises(RequestError, match="has no partner"):
        tiny_pipeline("a (red fox", prompt_weighting=True)
    tiny_pipeline("a (red fox")


def test_a_weight_scales_a_tokens_distance_from_the_empty_prompt(side):
    """Of "a b c" the middle token alone is moved."""
    blank = side.encode("", {}, Reading()).hidden
    plain = side.encode("a b c", {}, Reading()).hidden
    heavy = side.encode("a (b:1.5) c", {}, Reading(weighted=True)).hidden
    expected = plain.copy()
    expected[:, 2] = blank[:, 2] + 1.5 * (plain[:, 2] - blank[:, 2])
    assert relative_error(heavy, expected) < TINY_GRAPH
    assert (
        side.encode("a (b:1.0) c", {}, Reading(weighted=True)).hidden.tobytes() == plain.tobytes()
    )


def test_windows_hold_all_tokens(tiny_bundle):
    tokenizer = ClipTokenizer(tiny_bundle / "tokenizer")
    text = "word " * 50  # four letters a word
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        windows = tokenizer.windows([(text, 1.0), ("end", 2.0)], long=True)
    assert len(windows) == 3
    inner = np.concatenate([window.ids[0, 1:-1] for window in windows])
    letters = tokenizer.windows([(text[:90], 1.0)])[0].ids[0, 1:73]
    np.testing.assert_array_equal(inner[:72], letters)
    weights = np.concatenate([window.weights[1:-1] for window in windows])
    assert weights[:203].tolist() == [1.0] * 200 + [2.0] * 3
    assert all(window.ids.shape == (1, 77) for window in windows)


def test_what_a_weighted_prompt_drops_is_quoted(tiny_bundle):
    tokenizer = ClipTokenizer(tiny_bundle / "tokenizer")
    with pytest.warns(UserWarning, match="79 tokens and the model reads 75; dropped: 'wxyz'"):
        (window,) = tokenizer.windows([("ab" * 37, 1.0), ("cwxyz", 1.3)])
    assert window.weights[75] == np.float32(1.3)


def test_a_static_bundle_refuses_a_second_window(tiny_pipeline):
    with pytest.raises(RequestError, match="takes 2 windows.*run the checkpoint on torch"):
        tiny_pipeline("word " * 30, long_prompts=True)
    tiny_pipeline("short", long_prompts=True)


def test_a_long_prompt_is_read_whole_on_torch(saved):
    pipe = tintype.load(saved("sd1"))
    settings = {"num_inference_steps": 1, "width": 32, "height": 32, "seed": 0}
    request = {**settings, "output_type": "latent", "long_prompts": True}
    long = "red " * 100
    ends = [pipe(long + end, **request).images for end in ("blue", "green")]
    assert not np.array_equal(*ends)
    text = pipe.family.text
    whole = text.encode(long, {}, Reading(long=True))
    # each window is encoded by itself, and the shorter prompt is filled up with empty ones
    first, second = (text.encode("red " * count, {}, Reading()).hidden for count in (75, 25))
    np.testing.assert_array_equal(whole.hidden, np.concatenate([first, second], axis=1))
    negative, _ = text.same_length([text.encode("blue", {}, Reading()), whole])
    np.testing.assert_array_equal(negative.hidden[:, 77:], text.encode("", {}, Reading()).hidden)
