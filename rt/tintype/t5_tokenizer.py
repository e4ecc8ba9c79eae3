"""T5's sentence pieces, read from a checkpoint's `tokenizer.json` or from its `spiece.model`."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from tintype.checkpoints.files import read_json
from tintype.errors import CheckpointError
from tintype.prompts import Fragments
from tintype.protobuf import fields, payloads
from tintype.tokenizer import Window, well_formed

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_END, _PADDING, _UNKNOWN = "</s>", "<pad>", "<unk>"
# Field numbers of sentencepiece_model.proto: of a model, of a piece, of a normaliser.
_PIECE, _NORMALIZER = 1, 3
_TEXT, _SCORE = 1, 2
_CHARACTERS = 2  # which characters become which others


class T5Tokenizer:
    """Turns a prompt into ids: its pieces, the end token, padding up to `length`."""

    def __init__(self, folder: Path, length: int) -> None:
        path = next((folder / n for n in _READERS if (folder / n).is_file()), None)
        if path is None:
            raise CheckpointError(
                f"{folder} has no {' and no '.join(_READERS)}; download the checkpoint again"
            )
        try:
            self._tokenizer = _READERS[path.name](path)
        except Exception as error:  # the tokenizers library raises plain Exception
            raise CheckpointError(f"{path}: unreadable tokenizer: {error}") from error
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self._end, self._padding = (self._id(path, token) for token in (_END, _PADDING))
        self.length = length

    def __call__(self, prompt: str) -> NDArray[np.int64]:
        """Ids int64 [1, length]. What does not fit is dropped, with one warning that quotes it."""
        return self.windows([(prompt, 1.0)])[0].ids

    def windows(self, fragments: Fragments, *, long: bool = False) -> list[Window]:
        """The text of all fragments in the one window that T5 has, however long CLIP's windows may get."""
        room = self.length - 1
        pieces = [
            (token, weight, text, begin)
            for text, weight in ((well_formed(each), weight) for each, weight in fragments)
            for token, begin in self._encoded(text)
        ]
        if len(pieces) > room:
            *_, text, begin = pieces[room]
            warnings.warn(
                f"the prompt has {len(pieces)} tokens and T5 reads {room}; dropped: {text[begin:]!r}",
                UserWarning,
                stacklevel=3,
            )
        kept = pieces[:room]
        padding = room - len(kept)
        ids = [*(token for token, *_ in kept), self._end, *[self._padding] * padding]
        weights = [*(weight for _, weight, *_ in kept), *[1.0] * (padding + 1)]
        own = len(ids) - padding
        return [Window(np.array([ids], np.int64), np.array(weights, np.float32), own)]

    def _encoded(self, text: str) -> Iterator[tuple[int, int]]:
        """Each piece's id, and where in the text it begins."""
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        for token, (begin, _) in zip(encoding.ids, encoding.offsets, strict=True):
            yield token, begin

    def _id(self, path: Path, token: str) -> int:
        number = self._tokenizer.token_to_id(token)
        if number is None:
            raise CheckpointError(f"{path}: special token {token!r} is not in the vocabulary")
        return int(number)


def _from_json(path: Path) -> Tokenizer:
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(path))


def _from_sentencepiece(path: Path) -> Tokenizer:
    """The tables of a sentencepiece model as the tokenizers package has them, and T5's sentinels behind them."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

    model = memoryview(path.read_bytes())
    sentinels = [f"<extra_id_{i}>" for i in range(_sentinels(path.parent))]
    pieces = [_piece(piece) for piece in payloads(model, _PIECE)]
    pieces += [(sentinel, 0.0) for sentinel in reversed(sentinels)]
    names = [name for name, _ in pieces]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=names.index(_UNKNOWN)))
    rules = [r for spec in payloads(model, _NORMALIZER) for r in payloads(spec, _CHARACTERS)]
    if rules and len(rules[0]):
        tokenizer.normalizer = normalizers.Precompiled(bytes(rules[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(prepend_scheme="always")]
    )
    tokenizer.add_special_tokens([_END, _UNKNOWN, _PADDING, *sentinels])
    return tokenizer


def _piece(message: memoryview) -> tuple[str, float]:
    """A piece's text and the logarithm of its probability."""
    found = {field.number: field for field in fields(message)}
    text = found[_TEXT].payload
    return bytes(text or b"").decode(), found[_SCORE].float32 if _SCORE in found else 0.0


def _sentinels(folder: Path) -> int:
    """How many of the words that T5 was trained to fill gaps with."""
    settings = folder / "tokenizer_config.json"
    return int(read_json(settings).get("extra_ids", 100)) if settings.is_file() else 100


# In the order in which they are preferred.
_READERS = {"tokenizer.json": _from_json, "spiece.model": _from_sentencepiece}
