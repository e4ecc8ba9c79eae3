"""Tracing is most of an export's time; tests of what surrounds it trace each stage once."""

from __future__ import annotations

import pickle

import onnx
import onnx_ir as ir

from tintype_export.graphs import trace

_KNOWN = {}


def remembered_trace(stage, inputs):
    """`trace` for stages of one and the same checkpoint's architecture, whose weights are pointed to afterwards."""
    shapes = [tuple(each.shape) for each in inputs.values()]
    key = f"{type(stage).__name__} {stage.dtype} {shapes}"
    if key not in _KNOWN:
        _KNOWN[key] = ir.to_proto(trace(stage, inputs)).SerializeToString()
    return ir.from_proto(onnx.ModelProto.FromString(_KNOWN[key]))


def save_traces(path):
    """Keep what is remembered for another process of the same tests."""
    path.write_bytes(pickle.dumps(_KNOWN))


def load_traces(path):
    """Remember what another process has traced."""
    _KNOWN.update(pickle.loads(path.read_bytes()))
