"""CLIP's byte-pair tokenizer, read from a checkpoint's `tokenizer/` folder."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from tintype.errors import CheckpointError

if TYPE_CHECKING:
    from tokenizers import AddedToken, Tokenizer

CONTEXT = 77  # tokens that CLIP's text encoders were trained on, both ends included
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
        self.length = min(int(settings.get("model_max_length", CONTEXT)), CONTEXT)

    def __call__(self, prompt: str) -> NDArray[np.int64]:
        """Ids int64 [1, length]: begin, the prompt's tokens, end, padding.

        What does not fit is dropped, with one warning that quotes it.
        """
        text = _well_formed(prompt)
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        ids, room = list(encoding.ids), self.length - 2
        if len(ids) > room:
            dropped = text[encoding.offsets[room][0] :]
            warnings.warn(
                f"the prompt has {len(ids)} tokens and the model reads {room}; dropped: {dropped!r}",
                UserWarning,
                stacklevel=2,
            )
        padded = [self._bos, *ids[:room], self._eos]
        padded += [self._pad] * (self.length - len(padded))
        return np.array([padded], np.int64)

    def _id(self, folder: Path, token: Any) -> int:
        content = token["content"] if isinstance(token, dict) else str(token)
        number = self._tokenizer.token_to_id(content)
        if number is None:
            raise CheckpointError(f"{folder}: special token {content!r} is not in the vocabulary")
        return int(number)


def _well_formed(text: str) -> str:
    """Text without lone surrogates, which no UTF-8 holds; each becomes the replacement character."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _settings(folder: Path) -> dict[str, Any]:
    """The two JSON files that name special tokens and padding, the more specific one last."""
    merged: dict[str, Any] = {}
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        path = folder / name
        if path.is_file():
            try:
                merged.update(json.loads(path.read_text(encoding="utf-8")))
            except ValueError as error:
                raise CheckpointError(f"{path}: not JSON: {error}") from error
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
