"""Plots as inline SVG: no script, no network, and colours that the page's own light or dark style gives."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape

# In pixels: of bars, their height and distance, and the widths of names, bars and values.
_BAR, _GAP, _LABELS, _PLOT, _VALUES = 22, 8, 250, 440, 230
# Of a plot with axes, its frame, and what is left for the names of lines and below it.
_LEFT, _RIGHT, _TOP, _BOTTOM, _NAMES, _BELOW = 76, 620, 20, 264, 200, 56
_SERIES = 4  # colours that the page has for lines
_LETTER = 14  # the height of a line of text


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


def bars(rows: Sequence[Bar], name: str) -> str:
    """Horizontal bars, shorter is better; a whisker for the quartiles, a tick for the machine's limit."""
    most = max(row.upper for row in rows)
    height = len(rows) * (_BAR + _GAP) + _GAP
    parts = [
        _bar(row, _GAP + number * (_BAR + _GAP), _PLOT / most) for number, row in enumerate(rows)
    ]
    return svg(name, _LABELS + _PLOT + _VALUES, height, parts)


def _bar(row: Bar, top: float, scale: float) -> str:
    middle, end = top + _BAR / 2, _LABELS + row.median * scale
    lower, upper = (_LABELS + value * scale for value in (row.lower, row.upper))
    kind = "ours" if row.ours else "peer"
    parts = [
        text(_LABELS - 10, middle + 4, row.label, "end", "own" if row.ours else ""),
        f'<rect class="{kind}" x="{_LABELS}" y="{top}" width="{end - _LABELS:.1f}" height="{_BAR}" rx="3"/>',
        _path(lower, middle, upper, middle, "whisker"),
        text(max(end, upper) + 8, middle + 4, row.text, "start"),
    ]
    if row.floor > 0:
        x = _LABELS + row.floor * scale
        parts.append(_path(x, top - 2, x, top + _BAR + 2, "floor"))
    return "".join(parts)


@dataclass(frozen=True)
class Axes:
    """A plot of this name with logarithmic axes of these names; ``ticks`` write a value."""

    name: str
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
        across = _Scale.of([x for x, _ in points], _LEFT, _RIGHT)
        up = _Scale.of([y for _, y in points], _BOTTOM, _TOP)
        kinds = ["ceiling" if marks else f"series{n % _SERIES}" for n in range(len(lines))]
        placed = [
            _Line(name, kind, [(across(x), up(y)) for x, y in sorted(line)])
            for (name, line), kind in zip(lines.items(), kinds, strict=True)
        ]
        parts = [self._frame(across, up), *(line.draw() for line in placed), *_names(placed)]
        parts += [_mark(mark, across(mark.x), up(mark.y)) for mark in marks]
        return svg(self.name, _RIGHT + _NAMES, _BOTTOM + _BELOW, parts)

    def _frame(self, across: _Scale, up: _Scale) -> str:
        parts = [
            _path(_LEFT, _BOTTOM, _RIGHT, _BOTTOM, "axis"),
            _path(_LEFT, _TOP, _LEFT, _BOTTOM, "axis"),
            text((_LEFT + _RIGHT) / 2, _BOTTOM + _BELOW - 8, self.x_name, "middle", "name"),
            text(_LEFT, _TOP - 6, self.y_name, "start", "name"),
        ]
        parts += [text(across(v), _BOTTOM + 18, self.x_tick(v), "middle") for v in across.ticks()]
        for value in up.ticks():
            parts.append(_path(_LEFT, up(value), _RIGHT, up(value), "grid"))
            parts.append(text(_LEFT - 8, up(value) + 4, self.y_tick(value), "end"))
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


@dataclass(frozen=True)
class _Line:
    """A line whose points are in pixels."""

    name: str
    kind: str
    points: Sequence[tuple[float, float]]

    def draw(self) -> str:
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in self.points)
        return f'<polyline class="{self.kind}" points="{path}"/>'


def _names(lines: Sequence[_Line]) -> Iterator[str]:
    """Each name at the end of its line, moved down where another's is."""
    free = -math.inf
    for line in sorted(lines, key=lambda line: line.points[-1][1]):
        x, y = line.points[-1]
        free = max(y + 4, free + _LETTER)
        yield text(x + 8, free, line.name, "start", line.kind)


def _mark(mark: Mark, x: float, y: float) -> str:
    kind = "ours" if mark.ours else "peer"
    title = f"<title>{escape(mark.label)}</title>"
    return f'<circle class="{kind}" cx="{x:.1f}" cy="{y:.1f}" r="5">{title}</circle>'


def text(x: float, y: float, words: str, anchor: str, kind: str = "") -> str:
    """A text at a place in pixels."""
    about = f' class="{kind}"' if kind else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{about}>{escape(words)}</text>'


def _path(x: float, y: float, x_end: float, y_end: float, kind: str) -> str:
    return f'<path class="{kind}" d="M{x:.1f} {y:.1f}L{x_end:.1f} {y_end:.1f}"/>'


def svg(name: str, width: float, height: float, parts: Sequence[str]) -> str:
    """The picture of these parts, in pixels, with a name for whoever does not see it."""
    box = f"0 0 {width:.0f} {height:.0f}"
    return f'<svg viewBox="{box}" role="img" aria-label="{escape(name)}">{"".join(parts)}</svg>'
