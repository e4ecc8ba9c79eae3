"""The trained tokenizer is in CLIP's format: transformers reads it and agrees."""

from __future__ import annotations

import numpy as np
import pytest
from transformers import CLIPTokenizer

from tintype.tokenizer import ClipTokenizer
from tintype.training.postcard import caption, sample_scenes
from tintype.training.tokenizer import train_tokenizer


@pytest.fixture(scope="module")
def captions():
    rng = np.random.default_rng(0)
    return [caption(scene, rng) for scene in sample_scenes(500, 0)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, captions):
    path = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(captions, 300, path)
    return path


def test_transformers_gives_the_same_ids(folder, captions):
    theirs = CLIPTokenizer.from_pretrained(folder)
    ours = ClipTokenizer(folder)
    for text in [*captions[:100], "", "ünknown wörds, 3 of them!"]:
        expected = theirs(text, padding="max_length", max_length=77, truncation=True)["input_ids"]
        assert ours(text)[0].tolist() == expected


def test_the_words_of_the_captions_became_single_tokens(folder):
    ids = ClipTokenizer(folder)("lighthouse castle night")[0]
    assert (ids != ids[-1]).sum() == 1 + 3
