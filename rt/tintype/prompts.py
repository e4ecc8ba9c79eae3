"""Weights inside a prompt, in the syntax of the field's web interfaces: `(word)`, `(word:1.3)`, `[word]`.

A round bracket multiplies its content's weight by 1.1 or by the number, a square one divides it by 1.1; they nest.
A backslash makes a bracket an ordinary character.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from tintype.errors import RequestError

STEP = 1.1
_NUMBER = r":\s*[+-]?(?:\d+\.?\d*|\.\d+)\s*(?=\))"
_PARTS = re.compile(rf"\\[()\[\]\\]|[()\[\]]|{_NUMBER}|[^\\()\[\]:]+|[\\:]")
_CLOSES = {")": "(", "]": "["}

Fragments = Sequence[tuple[str, float]]


def fragments(prompt: str) -> Fragments:
    """The prompt's text in pieces, each with its weight; unbalanced brackets are a RequestError."""
    pieces: list[tuple[str, float]] = []
    opened: list[tuple[str, int]] = []  # bracket, and the first piece inside it
    factor: float | None = None
    for part in _PARTS.findall(prompt):
        if part in ("(", "["):
            opened.append((part, len(pieces)))
        elif part in _CLOSES:
            if not opened or opened[-1][0] != _CLOSES[part]:
                raise _unbalanced(prompt, part)
            _, first = opened.pop()
            weight = factor if factor is not None else STEP if part == ")" else 1 / STEP
            pieces[first:] = [(text, old * weight) for text, old in pieces[first:]]
            factor = None
        elif re.fullmatch(_NUMBER.removesuffix(r"(?=\))"), part) and _in_round(opened):
            factor = float(part[1:])
        else:
            pieces.append((part[1:] if len(part) == 2 and part[0] == "\\" else part, 1.0))
    if opened:
        raise _unbalanced(prompt, opened[-1][0])
    return _merged(pieces)


def _in_round(opened: Sequence[tuple[str, int]]) -> bool:
    return bool(opened) and opened[-1][0] == "("


def _merged(pieces: Fragments) -> Fragments:
    """Neighbours of one weight together, so that no word is cut where there was no bracket."""
    merged: list[tuple[str, float]] = []
    for text, weight in pieces:
        if merged and merged[-1][1] == weight:
            merged[-1] = (merged[-1][0] + text, weight)
        else:
            merged.append((text, weight))
    return merged or [("", 1.0)]


def _unbalanced(prompt: str, bracket: str) -> RequestError:
    return RequestError(
        f"prompt {prompt!r}: the bracket {bracket!r} has no partner; write \\{bracket} for the character itself"
    )
