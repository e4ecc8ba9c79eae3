"""Tracing is most of an export's time; tests of what surrounds it trace each stage once."""

from __future__ import annotations

import pickle

import onnx
import onnx_ir as ir

from tintype_export.graphs import trace

# What a guided picture of the smallest checkpoint is made by: the fewest graphs that an export can be tried with.
GUIDED = {"encode": ["b1"], "denoise": ["16x16-b2"], "decode": ["16x16-b1"]}
_KNOWN = {}


def remembered_trace(stage, inputs):
    """`trace` for stages whose weights are pointed to afterwards; those of the same classes and shapes are alike."""
    own = [(name, tuple(each.shape)) for name, each in stage.state_dict().items()]
    shapes = [tuple(each.shape) for each in inputs.values()]
    parts = [type(each).__name__ for each in (stage, *stage.children())]
    key = f"{' of '.join(parts)} {stage.dtype} {shapes} {own}"
    if key not in _KNOWN:
        model = trace(stage, inputs)
        _hollow(model, {name for name, _ in stage.named_parameters()})
        _KNOWN[key] = ir.to_proto(model).SerializeToString()
    return ir.from_proto(onnx.ModelProto.FromString(_KNOWN[key]))


def _hollow(model, parameters):
    """An export traces weights that are nowhere, which are saved as what a graph says of weights elsewhere."""
    for name in parameters & set(model.graph.initializers):
        value = model.graph.initializers[name]
        shape, dtype = value.const_value.shape, value.const_value.dtype
        value.const_value = ir.ExternalTensor("nowhere", 0, 0, dtype, shape=shape, name=name)


def save_traces(path):
    """Keep what is remembered for another process of the same tests."""
    path.write_bytes(pickle.dumps(_KNOWN))


def load_traces(path):
    """Remember what another process has traced."""
    _KNOWN.update(pickle.loads(path.read_bytes()))
