"""T5's ids against transformers' own, on pieces that the test trains itself."""

from __future__ import annotations

import random
import warnings

import pytest

from random_prompts import random_prompt
from small_flow_checkpoints import t5_tokenizer
from tintype.errors import CheckpointError
from tintype.t5_tokenizer import T5Tokenizer


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    folder = tmp_path_factory.mktemp("t5")
    theirs = t5_tokenizer()
    theirs.save_pretrained(folder)
    return theirs, T5Tokenizer(folder, 64)


def test_equals_transformers_on_10000_strings(pair):
    theirs, ours = pair
    rng = random.Random(21)
    prompts = ["", " ", "a", *(random_prompt(rng) for _ in range(10_000))]
    expected = theirs(prompts, padding="max_length", max_length=64, truncation=True)["input_ids"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        actual = [ours(prompt)[0].tolist() for prompt in prompts]
    assert actual == expected


def test_what_does_not_fit_is_quoted_once(pair):
    theirs, ours = pair
    prompt = "red " * 80
    pieces = len(theirs(prompt)["input_ids"]) - 1
    with pytest.warns(UserWarning, match=f"{pieces} tokens and T5 reads 63; dropped: ") as told:
        assert ours(prompt).shape == (1, 64)
    assert len(told) == 1


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"has no tokenizer\.json"):
        T5Tokenizer(tmp_path, 77)
