"""How large int8 codes of weights may be for a runtime on this CPU to add their products up."""

from __future__ import annotations

from collections.abc import Callable

LARGEST_CODE = 127
# An x86 CPU without VNNI adds two products, of an input's 8 bits and a weight's, in 16: 2 * 255 * 64 still fits.
LARGEST_IN_16_BITS = 64
SIDE = 64  # of a product that is large enough to be computed as one in a model is


def largest_code_on_cpu(adds_codes: Callable[[int], bool]) -> int | None:
    """The largest that the runtime adds products of codes of right; None where that is all of them."""
    return None if adds_codes(LARGEST_CODE) else LARGEST_IN_16_BITS
