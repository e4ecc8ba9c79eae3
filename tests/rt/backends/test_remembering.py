"""What a graph makes of a picture's texts alone: cut out of it, worked out once a picture, and never out of date."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import helper

import tintype
from tintype.backends import onnxruntime, remembering
from tintype.backends.onnxruntime import OnnxRuntimeBackend
from tintype.backends.remembering import parted
from tintype.bundle import open_bundle
from tiny_bundle import F32, denoise_inputs
from tolerances import TINY_GRAPH, relative_error

CALL = ("denoise", "32x32-b1")


def graph_of(folder, stage="denoise", profile="32x32-b1"):
    return (folder / stage / f"{profile}.onnx").read_bytes()


def faces(message):
    """The names of a graph's inputs and outputs, and the kinds of its nodes, each of which reads what is there."""
    graph = onnx.ModelProto.FromString(message).graph
    inputs = {value.name for value in graph.input}
    outputs = {value.name for value in graph.output}
    stored = {tensor.name for tensor in graph.initializer}
    known = inputs | stored
    for node in graph.node:
        assert known.issuperset(node.input)
        known.update(node.output)
    assert known >= outputs
    assert {name for node in graph.node for name in node.input} >= inputs | stored
    return inputs, outputs, [node.op_type for node in graph.node]


@pytest.fixture
def told(monkeypatch):
    """The texts that onnxruntime's sessions are told from now on, one after the other, where nothing else is."""
    seen, run = [], onnxruntime._run

    def noted(session, given):
        if given.keys() == {"encoder_hidden_states"}:
            seen.append(given["encoder_hidden_states"].copy())
        return run(session, given)

    monkeypatch.setattr(onnxruntime, "_run", noted)
    return seen


def test_each_part_has_the_nodes_that_it_needs(tiny_bundle):
    parts = parted(graph_of(tiny_bundle))
    assert faces(parts.remember) == (
        {"encoder_hidden_states"}, {"told"}, ["ReduceMean", "MatMul", "Reshape"]
    )  # fmt: skip
    assert faces(parts.recall) == (
        {"sample", "timestep", "told"},
        {"model_output"},
        ["Conv", "Div", "Reshape", "Add", "Add", "Tanh"],
    )
    assert parts.told == parts.unread == {"encoder_hidden_states"}


def test_a_text_that_both_parts_read_goes_to_both(tiny_bundle):
    model = onnx.ModelProto.FromString(graph_of(tiny_bundle))
    reader = helper.make_node("Concat", ["local", "encoder_hidden_states"], ["beside"], axis=0)
    model.graph.node.append(reader)
    model.graph.output.append(helper.make_tensor_value_info("beside", F32, None))
    parts = parted(model.SerializeToString())
    assert faces(parts.remember)[:2] == ({"encoder_hidden_states"}, {"told"})
    assert faces(parts.recall)[:2] == (
        {"sample", "timestep", "encoder_hidden_states", "told"}, {"model_output", "beside"}
    )  # fmt: skip
    assert (parts.told, parts.unread) == ({"encoder_hidden_states"}, set())


@pytest.mark.parametrize("why", ["other stage", "undescribed", "no product", "holds a graph"])
def test_graphs_that_cannot_be_parted_or_need_not_stay_whole(tiny_bundle, why):
    model = onnx.ModelProto.FromString(graph_of(tiny_bundle))
    if why == "other stage":
        model = onnx.ModelProto.FromString(graph_of(tiny_bundle, "encode", "b1"))
    elif why == "undescribed":
        del model.graph.value_info[:]
    elif why == "no product":
        (product,) = (node for node in model.graph.node if node.op_type == "MatMul")
        product.op_type = "Mul"
    else:
        model.graph.node.append(helper.make_node("If", ["pooled"], ["found"]))
    assert parted(model.SerializeToString()) is None


@pytest.mark.parametrize("name", ["onnxruntime", "openvino"])
def test_the_parts_give_what_the_whole_graph_gives(tiny_bundle, monkeypatch, name):
    if name == "openvino":
        pytest.importorskip("openvino")
    run = tintype.load(tiny_bundle, backend=name).family.backend.run
    in_two = [run(*CALL, denoise_inputs(seed))["model_output"] for seed in (0, 1, 0)]
    monkeypatch.setattr(remembering, "parted", lambda graph: None)
    run = tintype.load(tiny_bundle, backend=name).family.backend.run
    whole = [run(*CALL, denoise_inputs(seed))["model_output"] for seed in (0, 1, 0)]
    assert relative_error(np.stack(in_two), np.stack(whole)) < TINY_GRAPH
    assert in_two[0].tobytes() == in_two[2].tobytes() != in_two[1].tobytes()


def test_a_text_is_worked_out_once_a_picture(tiny_bundle, told):
    pipe = tintype.load(tiny_bundle)
    pipe("a", num_inference_steps=5)
    assert len(told) == 1
    pipe("b", num_inference_steps=5)
    assert len(told) == 2
    pipe("b", num_inference_steps=3, seed=4)  # as it was just told
    assert len(told) == 2


def test_a_text_that_its_owner_writes_to_is_read_again(tiny_bundle, told):
    backend, given = OnnxRuntimeBackend(open_bundle(tiny_bundle)), denoise_inputs()
    before = backend.run(*CALL, given)["model_output"]
    given["encoder_hidden_states"] += 1
    after = backend.run(*CALL, given)["model_output"]
    assert len(told) == 2
    fresh = OnnxRuntimeBackend(open_bundle(tiny_bundle)).run(*CALL, given)["model_output"]
    assert after.tobytes() == fresh.tobytes() != before.tobytes()


def test_a_text_that_could_not_be_worked_out_leaves_nothing_behind(tiny_bundle):
    backend, given = OnnxRuntimeBackend(open_bundle(tiny_bundle)), denoise_inputs()
    expected = backend.run(*CALL, given)["model_output"]
    with pytest.raises(Exception, match="encoder_hidden_states"):
        backend.run(*CALL, given | {"encoder_hidden_states": np.zeros((1, 5, 8), np.float32)})
    assert backend.run(*CALL, given)["model_output"].tobytes() == expected.tobytes()


def test_a_missing_text_is_an_error_though_one_was_told_before(tiny_bundle):
    backend, given = OnnxRuntimeBackend(open_bundle(tiny_bundle)), denoise_inputs()
    backend.run(*CALL, given)
    del given["encoder_hidden_states"]
    with pytest.raises(Exception, match="told"):
        backend.run(*CALL, given)
