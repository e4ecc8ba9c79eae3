"""`python -m tintype_bench`: the same as `tintype bench`, from a source tree where nothing is installed."""

from __future__ import annotations

import sys

from tintype_bench.cli import main

if __name__ == "__main__":
    sys.exit(main())
