"""Tintype's kernels: each op has a plain reference and faster forms that must agree with it. Imports without torch."""

from tintype_kernels.dispatch import KernelUnavailable, implementation
from tintype_kernels.philox import philox_uint32
from tintype_kernels.scheduler_step import Row, scheduler_step

__all__ = ["KernelUnavailable", "Row", "implementation", "philox_uint32", "scheduler_step"]
