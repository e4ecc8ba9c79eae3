"""CLIP's byte-pair tokenizer, read from a checkpoint's `tokenizer/` folder."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tintype.checkpoints.files import read_json
from tintype.errors import CheckpointError
from tintype.prompts import Fragments

if TYPE_CHECKING:
    from tokenizers import AddedToken, Tokenizer

CONTEXT = 77  # tokens that CLIP's text encoders were trained on, both ends included
_LEAST = 3  # one of them the prompt's
_SPECIAL = {
    "bos_token": "<|startoftext|>",
    "eos_token": "<|endoftext|>",
    "unk_token": "<|endoftext|>",
    "pad_token": "<|endoftext|>",
}
# Special tokens, English contractions, words, single digits, runs of anything else (CLIP, Radford et al. 2021).
_PIECES = (
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d"
    r"|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
)


class Window(NamedTuple):
    """What a text encoder reads at once: ids int64 [1, length], each token's weight float32 [length], and how many of
    them come before the padding."""

    ids: NDArray[np.int64]
    weights: NDArray[np.float32]
    own: int


class ClipTokenizer:
    """Turns a prompt into the fixed-length ids that a CLIP text encoder takes."""

    def __init__(self, folder: Path) -> None:
        settings = _settings(folder)
        special = {name: settings.get(name) or default for name, default in _SPECIAL.items()}
        try:
            self._tokenizer = _open(folder, special)
        except CheckpointError:
            raise
        except Exception as error:  # the tokenizers library raises plain Exception
            raise CheckpointError(f"{folder}: unreadable tokenizer: {error}") from error
        self._bos, self._eos, self._pad = (
            self._id(folder, special[name]) for name in ("bos_token", "eos_token", "pad_token")
        )
        self.length = _length(folder, settings.get("model_max_length"))

    def __call__(self, prompt: str) -> NDArray[np.int64]:
        """Ids int64 [1, length]: begin, the prompt's tokens, end, padding.

        What does not fit is dropped, with one warning that quotes it.
        """
        return self.windows([(prompt, 1.0)])[0].ids

    def windows(self, fragments: Fragments, *, long: bool = False) -> list[Window]:
        """The text of all fragments as windows of the model's length: one, or with `long` as many as it takes."""
        room = self.length - 2
        ids: list[int] = []
        weights: list[float] = []
        dropped = ""
        for fragment, weight in fragments:
            text = well_formed(fragment)
            encoding = self._tokenizer.encode(text, add_special_tokens=False)
            free = room - len(ids)
            if len(encoding.ids) > max(free, 0):
                dropped += text[encoding.offsets[max(free, 0)][0] :]
            ids += encoding.ids
            weights += [weight] * len(encoding.ids)
        if dropped and not long:
            warnings.warn(
                f"the prompt has {len(ids)} tokens and the model reads {room}; dropped: {dropped!r}",
                UserWarning,
                stacklevel=3,
            )
        last = len(ids) if long else min(len(ids), room)
        starts = range(0, max(last, 1), room)
        return [self._window(ids[i : i + room], weights[i : i + room]) for i in starts]

    def _window(self, ids: list[int], weights: list[float]) -> Window:
        padding = self.length - 2 - len(ids)
        framed = [self._bos, *ids, self._eos, *[self._pad] * padding]
        return Window(
            np.array([framed], np.int64),
            np.array([1.0, *weights, *[1.0] * (padding + 1)], np.float32),
            self.length - padding,
        )

    def _id(self, folder: Path, token: Any) -> int:
        content = token.get("content") if isinstance(token, dict) else token
        number = self._tokenizer.token_to_id(content) if isinstance(content, str) else None
        if number is None:
            raise CheckpointError(f"{folder}: special token {content!r} is not in the vocabulary")
        return int(number)


def _length(folder: Path, most: Any) -> int:
    """How many tokens the model reads; what is published for an encoder that says nothing is astronomical."""
    length = CONTEXT if most is None else most
    if isinstance(length, bool) or not isinstance(length, int | float) or not length >= _LEAST:
        raise CheckpointError(
            f"{folder}: model_max_length={most!r} is not a number of at least {_LEAST}; a CLIP reads {CONTEXT} tokens"
        )
    return int(min(length, CONTEXT))


def well_formed(text: str) -> str:
    """Text without lone surrogates, which no UTF-8 holds; each becomes the replacement character."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _settings(folder: Path) -> dict[str, Any]:
    """The two JSON files that name special tokens and padding, the more specific one last."""
    merged: dict[str, Any] = {}
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        path = folder / name
        if path.is_file():
            merged.update(read_json(path))
    return merged


def _open(folder: Path, special: dict[str, Any]) -> Tokenizer:
    from tokenizers import Tokenizer

    whole = folder / "tokenizer.json"
    if whole.is_file():
        tokenizer = Tokenizer.from_file(str(whole))
        tokenizer.no_padding()
        tokenizer.no_truncation()
        return tokenizer
    for name in ("vocab.json", "merges.txt"):
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder}: neither tokenizer.json nor {name} is there")
    return _build(folder, special)


def _build(folder: Path, special: dict[str, Any]) -> Tokenizer:
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers

    unknown = special["unk_token"]
    tokenizer = Tokenizer(
        models.BPE.from_file(
            str(folder / "vocab.json"),
            str(folder / "merges.txt"),
            unk_token=unknown["content"] if isinstance(unknown, dict) else unknown,
            end_of_word_suffix="</w>",
        )
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PIECES), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.add_special_tokens([_added(token) for token in special.values()])
    return tokenizer


def _added(token: Any) -> AddedToken:
    from tokenizers import AddedToken

    if not isinstance(token, dict):
        return AddedToken(str(token), special=True)
    flags = {
        name: bool(token.get(name)) for name in ("single_word", "lstrip", "rstrip", "normalized")
    }
    return AddedToken(token["content"], special=True, **flags)
