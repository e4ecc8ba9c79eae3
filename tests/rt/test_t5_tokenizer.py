"""T5's ids against transformers' own, on pieces that the test trains itself."""

from __future__ import annotations

import random
import warnings

import pytest
from transformers import T5Tokenizer as TheirTokenizer
from transformers.convert_slow_tokenizer import T5Converter
from transformers.utils import sentencepiece_model_pb2_new as proto

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
    with pytest.raises(CheckpointError, match=r"has no tokenizer\.json and no spiece\.model"):
        T5Tokenizer(tmp_path, 77)


@pytest.fixture(scope="module")
def sentencepiece(tmp_path_factory):
    """A folder with a sentencepiece model alone, as T5 was first published; transformers writes and reads it."""
    folder = tmp_path_factory.mktemp("spiece")
    vocabulary = t5_tokenizer().get_vocab()
    model = proto.ModelProto()
    for piece in ("<pad>", "</s>", "<unk>"):
        model.pieces.add(piece=piece, score=0.0)
    for number, piece in enumerate(sorted(set(vocabulary) - {"<pad>", "</s>", "<unk>"})):
        model.pieces.add(piece=piece, score=-1.5 - 0.01 * (number % 37))
    model.trainer_spec.unk_id = 2
    (folder / "spiece.model").write_bytes(model.SerializeToString())
    return folder


def test_a_sentencepiece_model_equals_transformers_on_10000_strings(sentencepiece):
    model = proto.ModelProto.FromString((sentencepiece / "spiece.model").read_bytes())
    pieces = [(piece.piece, piece.score) for piece in model.pieces]
    theirs = TheirTokenizer(**T5Converter.convert_from_spm(vocab=pieces))
    ours = T5Tokenizer(sentencepiece, 64)
    rng = random.Random(22)
    prompts = ["", " ", "a  b", "</s>", "gaps <extra_id_0> <extra_id_99>"]
    prompts += [random_prompt(rng) for _ in range(10_000)]
    expected = theirs(prompts, padding="max_length", max_length=64, truncation=True)["input_ids"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        actual = [ours(prompt)[0].tolist() for prompt in prompts]
    assert actual == expected


def test_a_damaged_sentencepiece_model_is_named(sentencepiece, tmp_path):
    whole = (sentencepiece / "spiece.model").read_bytes()
    (tmp_path / "spiece.model").write_bytes(whole[:-3])
    with pytest.raises(CheckpointError, match=r"spiece\.model: unreadable tokenizer"):
        T5Tokenizer(tmp_path, 77)
