"""A prompt to CLIP's ids, beside transformers: `pytest bench/test_tokenizer.py`."""
# ruff: noqa: ANN001, ANN201

from __future__ import annotations

import pytest

from tintype.loading import BOX
from tintype.tokenizer import ClipTokenizer

FOLDER = BOX / "postcard" / "tokenizer"
PROMPTS = {
    "short": "a red lighthouse on a rocky coast at dusk",
    "long": "two white sailing boats under a full moon, " * 12,
}


@pytest.mark.filterwarnings("ignore:the prompt")
@pytest.mark.parametrize("length", PROMPTS)
@pytest.mark.parametrize("who", ["tintype", "transformers"])
def test_tokenize(benchmark, length, who):
    benchmark.group = f"a {length} prompt"
    prompt = PROMPTS[length]
    if who == "tintype":
        benchmark(ClipTokenizer(FOLDER), prompt)
    else:
        theirs = pytest.importorskip("transformers").CLIPTokenizer.from_pretrained(FOLDER)
        options = {"padding": "max_length", "max_length": 77, "truncation": True}
        benchmark(theirs, prompt, **options)


@pytest.mark.parametrize("who", ["tintype", "transformers"])
def test_load(benchmark, who):
    benchmark.group = "loading a tokenizer"
    if who == "tintype":
        benchmark(ClipTokenizer, FOLDER)
    else:
        benchmark(pytest.importorskip("transformers").CLIPTokenizer.from_pretrained, FOLDER)
