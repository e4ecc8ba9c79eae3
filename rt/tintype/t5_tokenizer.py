"""T5's sentence pieces, read from a checkpoint's `tokenizer.json`."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tintype.errors import CheckpointError
from tintype.prompts import Fragments
from tintype.tokenizer import Window, well_formed

_END, _PADDING = "</s>", "<pad>"


class T5Tokenizer:
    """Turns a prompt into ids: its pieces, the end token, padding up to `length`."""

    def __init__(self, folder: Path, length: int) -> None:
        from tokenizers import Tokenizer

        path = folder / "tokenizer.json"
        if not path.is_file():
            raise CheckpointError(
                f"{folder} has no tokenizer.json; save it with transformers' T5TokenizerFast, which writes one"
            )
        try:
            self._tokenizer = Tokenizer.from_file(str(path))
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
        return [Window(np.array([ids], np.int64), np.array(weights, np.float32))]

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
