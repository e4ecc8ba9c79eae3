"""Kernels are interpreted here. Triton reads the variable once, when an op's file is imported, so it is set first."""

import os

os.environ["TRITON_INTERPRET"] = "1"
