"""The C++ kernels, or the reason why this installation has none."""

from __future__ import annotations

import importlib
from types import ModuleType

module: ModuleType | None
try:
    module = importlib.import_module("tintype_kernels._native")
except ImportError as error:
    module, reason = None, f"the C++ extension is not usable: {error}"
else:
    reason = ""
