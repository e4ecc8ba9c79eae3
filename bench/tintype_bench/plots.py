"""Plots as inline SVG: no script, no network, and colours that the page's own light or dark style gives."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape

_BAR, _GAP, _LABELS, _PLOT, _VALUES = 22, 8, 250, 440, 230
_WIDTH, _HEIGHT, _MARGIN = 640, 320, 56


@dataclass(frozen=True)
class Bar:
    """One runner: its median and quartiles, and what the machine could do at best."""

    label: str
    median: float
    lower: float
    upper: float
    floor: float
    ours: bool
    text: str


@dataclass(frozen=True)
class Mark:
    """A point of a plot with axes."""

    x: float
    y: float
    label: str
    ours: bool


def bars(rows: Sequence[Bar]) -> str:
    """Horizontal bars, shorter is better; a whisker for the quartiles, a tick for the machine's limit."""
    most = max(row.upper for row in rows)
    height = len(rows) * (_BAR + _GAP) + _GAP
    parts = [
        _bar(row, _GAP + number * (_BAR + _GAP), _PLOT / most) for number, row in enumerate(rows)
    ]
    return _svg(_LABELS + _PLOT + _VALUES, height, parts)


def _bar(row: Bar, top: float, scale: float) -> str:
    middle, end = top + _BAR / 2, _LABELS + row.median * scale
    lower, upper = (_LABELS + value * scale for value in (row.lower, row.upper))
    kind = "ours" if row.ours else "peer"
    parts = [
        _text(_LABELS - 10, middle + 4, row.label, "end", "own" if row.ours else ""),
        f'<rect class="{kind}" x="{_LABELS}" y="{top}" width="{end - _LABELS:.1f}" height="{_BAR}" rx="3"/>',
        _path(lower, middle, upper, middle, "whisker"),
        _text(max(end, upper) + 8, middle + 4, row.text, "start"),
    ]
    if row.floor > 0:
        x = _LABELS + row.floor * scale
        parts.append(_path(x, top - 2, x, top + _BAR + 2, "floor"))
    return "".join(parts)


@dataclass(frozen=True)
class Axes:
    """A plot with logarithmic axes of these names; ``ticks`` writes a value."""

    x_name: str
    y_name: str
    x_tick: Callable[[float], str]
    y_tick: Callable[[float], str]

    def draw(
        self,
        marks: Sequence[Mark],
        lines: Mapping[str, Sequence[tuple[float, float]]],
    ) -> str:
        """Marks under named lines, which are then ceilings, or lines alone, each in a colour of its own."""
        points = [(m.x, m.y) for m in marks] + [p for line in lines.values() for p in line]
        across = _Scale.of([x for x, _ in points], _MARGIN + 20, _WIDTH - 20)
        up = _Scale.of([y for _, y in points], _HEIGHT - _MARGIN, 20)
        parts = [self._frame(across, up)]
        for number, (name, line) in enumerate(lines.items()):
            kind = "ceiling" if marks else f"series{number % 4}"
            parts.append(_line(name, [(across(x), up(y)) for x, y in line], kind))
        parts += [_mark(mark, across(mark.x), up(mark.y)) for mark in marks]
        return _svg(_WIDTH + 180, _HEIGHT, parts)

    def _frame(self, across: _Scale, up: _Scale) -> str:
        bottom, left = _HEIGHT - _MARGIN, _MARGIN + 20
        parts = [
            _path(left, bottom, _WIDTH - 20, bottom, "axis"),
            _path(left, 20, left, bottom, "axis"),
            _text((left + _WIDTH) / 2, _HEIGHT - 8, self.x_name, "middle", "name"),
            _text(left, 14, self.y_name, "start", "name"),
        ]
        parts += [_text(across(v), bottom + 18, self.x_tick(v), "middle") for v in across.ticks()]
        for value in up.ticks():
            parts.append(_path(left, up(value), _WIDTH - 20, up(value), "grid"))
            parts.append(_text(left - 8, up(value) + 4, self.y_tick(value), "end"))
        return "".join(parts)


@dataclass(frozen=True)
class _Scale:
    """A logarithmic axis from a value to pixels."""

    low: float
    high: float
    begin: float
    end: float

    @classmethod
    def of(cls, values: Sequence[float], begin: float, end: float) -> _Scale:
        return cls(math.log(min(values) / 1.3), math.log(max(values) * 1.3), begin, end)

    def __call__(self, value: float) -> float:
        share = (math.log(value) - self.low) / (self.high - self.low)
        return self.begin + share * (self.end - self.begin)

    def ticks(self) -> list[float]:
        """1, 2 and 5 times powers of ten, or the powers alone where those would crowd."""
        first, last = (math.floor(math.log10(math.exp(v))) for v in (self.low, self.high))
        steps = (1, 2, 5) if last - first < 3 else (1,)
        found = [s * 10.0**power for power in range(first, last + 1) for s in steps]
        return [value for value in found if self.low <= math.log(value) <= self.high]


def _line(name: str, points: Sequence[tuple[float, float]], kind: str) -> str:
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    x, y = points[-1]
    return f'<polyline class="{kind}" points="{path}"/>{_text(x + 8, y + 4, name, "start")}'


def _mark(mark: Mark, x: float, y: float) -> str:
    kind = "ours" if mark.ours else "peer"
    title = f"<title>{escape(mark.label)}</title>"
    return f'<circle class="{kind}" cx="{x:.1f}" cy="{y:.1f}" r="5">{title}</circle>'


def _text(x: float, y: float, text: str, anchor: str, kind: str = "") -> str:
    about = f' class="{kind}"' if kind else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{about}>{escape(text)}</text>'


def _path(x: float, y: float, x_end: float, y_end: float, kind: str) -> str:
    return f'<path class="{kind}" d="M{x:.1f} {y:.1f}L{x_end:.1f} {y_end:.1f}"/>'


def _svg(width: float, height: float, parts: Sequence[str]) -> str:
    content = "".join(parts)
    return f'<svg viewBox="0 0 {width:.0f} {height:.0f}" role="img">{content}</svg>'
