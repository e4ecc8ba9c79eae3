"""Our ids against transformers' CLIPTokenizer, on a vocabulary that the test trains itself."""

from __future__ import annotations

import json
import random
import warnings

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import CLIPTokenizer

from random_prompts import BOS, CORPUS, EOS, random_prompt
from tintype.errors import CheckpointError
from tintype.tokenizer import ClipTokenizer


def train_vocabulary():
    """CLIP's byte alphabet, with and without the end-of-word mark, and some merges."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=900, initial_alphabet=alphabet, end_of_word_suffix="</w>", show_progress=False
    )
    tokenizer.train_from_iterator([CORPUS.replace(" ", "\n")] * 3, trainer)
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    tokens = [*alphabet, *(letter + "</w>" for letter in alphabet)]
    tokens += [left + right for left, right in merges]
    vocabulary = {token: number for number, token in enumerate(dict.fromkeys([*tokens, BOS, EOS]))}
    return vocabulary, merges


def write_folder(folder, pad, token_form):
    vocabulary, merges = train_vocabulary()
    (folder / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    tokens = {"bos_token": BOS, "eos_token": EOS, "unk_token": EOS}
    if token_form == "dict":
        flags = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": True}
        tokens = {name: {"content": token, **flags} for name, token in tokens.items()}
    tokens["pad_token"] = pad
    (folder / "special_tokens_map.json").write_text(json.dumps(tokens))
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, **tokens}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module", params=[(EOS, "text"), (EOS, "dict"), ("!", "dict")], ids=str)
def folder(request, tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("tokenizer"), *request.param)


def test_equals_transformers_on_10000_strings(folder):
    theirs = CLIPTokenizer.from_pretrained(folder)
    ours = ClipTokenizer(folder)
    rng = random.Random(20)
    prompts = ["", " ", "a", *(random_prompt(rng) for _ in range(10_000))]
    expected = theirs(prompts, padding="max_length", max_length=77, truncation=True)["input_ids"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        actual = [ours(prompt)[0].tolist() for prompt in prompts]
    assert actual == expected


def test_tokenizer_json_gives_the_same_ids(folder, tmp_path):
    theirs = CLIPTokenizer.from_pretrained(folder)
    theirs.save_pretrained(tmp_path)
    assert (tmp_path / "tokenizer.json").is_file()
    assert not (tmp_path / "vocab.json").is_file()
    ours, direct = ClipTokenizer(tmp_path), ClipTokenizer(folder)
    for prompt in ("", "a red lighthouse", "it's 12 o'clock 🎈", EOS):
        np.testing.assert_array_equal(ours(prompt), direct(prompt))


def test_long_prompt_is_cut_with_one_warning_that_quotes_the_rest(folder):
    prompt = " ".join(["balloons"] * 30 + [str(i) for i in range(80)])
    with pytest.warns(UserWarning, match="dropped") as caught:
        ids = ClipTokenizer(folder)(prompt)
    assert len(caught) == 1
    assert ids.shape == (1, 77)
    assert ids.dtype == np.int64
    message = str(caught[0].message)
    dropped = message.split("dropped: ")[1].strip("'")
    assert prompt.endswith(dropped)
    kept = prompt[: -len(dropped)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        np.testing.assert_array_equal(ClipTokenizer(folder)(kept), ids)


def test_lone_surrogate_is_replaced(folder):
    ours = ClipTokenizer(folder)
    np.testing.assert_array_equal(ours("a \ud800 b"), ours("a \ufffd b"))


def test_missing_and_broken_files_are_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"vocab\.json"):
        ClipTokenizer(tmp_path)
    write_folder(tmp_path, EOS, "text")
    (tmp_path / "vocab.json").write_text("{")
    with pytest.raises(CheckpointError, match="unreadable tokenizer"):
        ClipTokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(CheckpointError, match="not readable JSON"):
        ClipTokenizer(tmp_path)


@pytest.mark.parametrize("length", [0, 2, -1, True, "long", [77], float("nan")])
def test_a_length_that_holds_no_prompt_is_named(tmp_path, length):
    write_folder(tmp_path, EOS, "text")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"model_max_length": length}))
    with pytest.raises(CheckpointError, match="model_max_length=.* is not a number of at least 3"):
        ClipTokenizer(tmp_path)


@pytest.mark.parametrize(("length", "read"), [(None, 77), (1e30, 77), (10**30, 77), (20, 20)])
def test_a_length_that_is_left_open_is_clips(tmp_path, length, read):
    write_folder(tmp_path, EOS, "text")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"model_max_length": length}))
    assert ClipTokenizer(tmp_path)("a").shape == (1, read)


@pytest.mark.parametrize("token", [7, ["x"], {"content": None}, {"content": 5}])
def test_a_special_token_that_is_no_text_is_named(tmp_path, token):
    write_folder(tmp_path, EOS, "text")
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"eos_token": token}))
    with pytest.raises(CheckpointError, match="special token|unreadable tokenizer"):
        ClipTokenizer(tmp_path)
