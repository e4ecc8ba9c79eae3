"""The static shapes that a stage was built for, and their names, such as `512x768-b2`."""

from __future__ import annotations

import re
from dataclasses import dataclass

_NAME = re.compile(r"(\d+)x(\d+)-b(\d+)")


@dataclass(frozen=True, order=True)
class Profile:
    """A picture size in pixels and the rows of the graph's batch."""

    width: int
    height: int
    batch: int

    @property
    def name(self) -> str:
        return f"{self.width}x{self.height}-b{self.batch}"

    @property
    def size(self) -> str:
        return f"{self.width}x{self.height}"

    @classmethod
    def parse(cls, name: str) -> Profile | None:
        """The profile that a name says, or None for a stage without a picture size."""
        found = _NAME.fullmatch(name)
        return cls(*(int(number) for number in found.groups())) if found else None


def cut(rows: int, batches: list[int] | None) -> list[int]:
    """Batch sizes that hold `rows` one after the other: the largest that are filled, then the smallest for the rest.

    None for `batches` means that any size runs.
    """
    if batches is None:
        return [rows]
    counts = []
    while rows > 0:
        full = [batch for batch in batches if batch <= rows]
        counts.append(max(full) if full else min(batches))
        rows -= counts[-1]
    return counts
