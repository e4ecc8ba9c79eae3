"""TensorRT engines are built for real, without a GPU; running them is not tested here."""

from __future__ import annotations

import argparse
import re
import shutil
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace

import onnx
import pytest
import torch

from small_checkpoints import save_smallest
from tintype.bundle import open_bundle
from tintype.errors import BackendUnavailable, BundleError, RequestError
from tintype_export import bundle as exporting
from tintype_export import tensorrt as building
from tintype_export.bundle import ExportConfig, export_bundle
from tintype_export.cli import register
from tintype_export.report import Report
from tintype_export.tensorrt import build_engines, check_gpus

trt = pytest.importorskip("tensorrt_rtx")
GPUS = ("sm_89", "sm_120")
SMALL = {"width": 16, "height": 16}
ENCODE = {"encode": {"b1": "encode/b1.onnx"}}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return save_smallest(tmp_path_factory.mktemp("smallest") / "checkpoint")


def test_every_profile_is_built_for_every_gpu(tiny_copy):
    bundle, said = open_bundle(tiny_copy), []
    engines = build_engines(tiny_copy, bundle.stages, GPUS, said.append)
    assert tuple(engines) == GPUS
    for gpu, entry in engines.items():
        assert (entry["package"], entry["version"]) == ("tensorrt_rtx", trt.__version__)
        for stage, profiles in bundle.stages.items():
            named = {profile: f"{stage}/{profile}.{gpu}.engine" for profile in profiles}
            assert entry["stages"][stage] == named
    first, second = ((tiny_copy / f"encode/b1.{gpu}.engine").read_bytes() for gpu in GPUS)
    assert min(len(first), len(second)) > 514 * 8 * 4  # the embedding alone
    assert first != second
    assert [line.split(":")[0] for line in said if line.startswith("encode/b1")] == [
        "encode/b1.sm_89.engine",
        "encode/b1.sm_120.engine",
    ]


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
@pytest.mark.usefixtures("traced_once")
def test_an_exported_stage_is_built_in_its_precision(source, tmp_path, monkeypatch, precision):
    """The decoder, which has every kind of layer but cross attention."""
    decode = {"decode": ["16x16-b1"]}
    monkeypatch.setattr(exporting, "profiles_of", lambda *_: decode)
    # A bundle of one stage makes no picture to verify.
    nothing = Report("none", precision, "nothing", "nothing", [], None)
    monkeypatch.setattr(exporting, "verify", lambda *_: nothing)
    products, parse = set(), building._parse

    def watched(*arguments):
        log, network = parse(*arguments)
        products.update(convolutions(network))
        return log, network

    monkeypatch.setattr(building, "_parse", watched)
    config = ExportConfig(((16, 16),), precision, None, SMALL, "tensorrt", ("sm_89",))
    folder = export_bundle(source, tmp_path / "bundle", config)
    bundle = open_bundle(folder)
    (relative,) = bundle.engines["sm_89"]["stages"]["decode"].values()
    assert bundle.files[relative]["size"] == (folder / relative).stat().st_size
    assert products == {{"fp32": trt.float32, "fp16": trt.float16, "bf16": trt.bfloat16}[precision]}
    assert sorted(path.name for path in folder.glob("**/*.onnx")) == ["16x16-b1.onnx"]
    assert bundle.provenance["options"]["gpus"] == ["sm_89"]


def convolutions(network):
    """The types that a network's convolutions give."""
    layers = (network.get_layer(number) for number in range(network.num_layers))
    return {each.get_output(0).dtype for each in layers if each.type == trt.LayerType.CONVOLUTION}


def test_a_node_that_tensorrt_lacks_is_named_in_one_line(tiny_copy):
    path = tiny_copy / "encode" / "b1.onnx"
    model = onnx.load(path, load_external_data=False)
    model.graph.node[0].op_type, model.graph.node[0].name = "Conjure", "the_rabbit"
    path.write_bytes(model.SerializeToString())
    with pytest.raises(BundleError, match=r"encode/b1.onnx: .*the_rabbit \(Conjure\)") as raised:
        build_engines(tiny_copy, ENCODE, GPUS, print)
    assert len(str(raised.value).splitlines()) == 1


def test_weights_that_are_not_there_are_an_error_of_the_graph(tiny_copy):
    shutil.rmtree(tiny_copy / "weights")
    with pytest.raises(BundleError, match=r"encode/b1\.onnx"):
        build_engines(tiny_copy, ENCODE, ("sm_89",), print)


def test_a_build_that_fails_says_what_the_builder_says(tiny_copy, monkeypatch):
    log = building._Log(trt)
    empty = log.builder.create_network(0)  # has no output
    monkeypatch.setattr(building, "_parse", lambda *_: (log, empty))
    with pytest.raises(
        BundleError, match=r"encode/b1\.sm_89\.engine cannot be built: .+"
    ) as raised:
        build_engines(tiny_copy, ENCODE, ("sm_89",), print)
    assert len(str(raised.value).splitlines()) == 1


def test_gpus_are_checked_before_any_work(source, tmp_path):
    with pytest.raises(RequestError, match=r"needs --gpu, one or several of .*sm_89"):
        check_gpus(())
    config = ExportConfig(((16, 16),), "fp32", None, SMALL, "tensorrt", ("sm_12",))
    with pytest.raises(RequestError, match="gpu='sm_12' is unknown; choose from .*sm_89"):
        export_bundle(source, tmp_path / "bundle", config)
    assert not (tmp_path / "bundle").exists()


def test_an_absent_package_names_the_extras(monkeypatch):
    monkeypatch.setattr(building, "PACKAGES", ("no_such_tensorrt",))
    with pytest.raises(BackendUnavailable, match=r'pip install "tintype\[tensorrt-rtx\]"'):
        check_gpus(GPUS)


@pytest.fixture
def enterprise(monkeypatch, tmp_path):
    """A package like `tensorrt`, which builds for this machine's GPU: tensorrt_rtx but for its list of GPUs."""
    played = ModuleType("played_tensorrt")
    vars(played).update({k: v for k, v in vars(trt).items() if k != "ComputeCapability"})
    played.__name__, played.__spec__ = "played_tensorrt", ModuleSpec("played_tensorrt", None)
    monkeypatch.setitem(sys.modules, "played_tensorrt", played)
    monkeypatch.setattr(building, "PACKAGES", ("tensorrt_rtx", "played_tensorrt"))
    monkeypatch.setattr(building, "Device", lambda: SimpleNamespace(architecture="sm_90"))
    monkeypatch.setenv("TINTYPE_CACHE", str(tmp_path / "cache"))
    return played


def test_each_gpu_is_built_for_by_the_package_that_can(tiny_copy, enterprise):
    engines = build_engines(tiny_copy, ENCODE, ("sm_89", "sm_90"), print)
    packages = {gpu: entry["package"] for gpu, entry in engines.items()}
    assert packages == {"sm_89": "tensorrt_rtx", "sm_90": "played_tensorrt"}
    assert (tiny_copy / "encode/b1.sm_90.engine").stat().st_size > 514 * 8 * 4


@pytest.mark.filterwarnings("ignore:.*Timing cache operations are no-ops")
def test_what_a_build_measured_is_found_by_the_next(tiny_copy, enterprise, tmp_path):
    build_engines(tiny_copy, ENCODE, ("sm_89", "sm_90"), print)
    (timings,) = (tmp_path / "cache").rglob("*.timings")
    assert timings.name == f"played_tensorrt-{trt.__version__}-sm_90.timings"
    assert timings.stat().st_size
    known = []
    config = SimpleNamespace(
        create_timing_cache=known.append,
        set_timing_cache=lambda cache, ignore_mismatch: True,
        get_timing_cache=lambda: SimpleNamespace(serialize=lambda: b"more"),
    )
    before = timings.read_bytes()
    with building._remembered_timings(config, timings):
        pass
    assert (known, timings.read_bytes()) == ([before], b"more")


def test_a_package_for_this_machines_gpu_says_so_where_there_is_none(enterprise, monkeypatch):
    def absent():
        raise BackendUnavailable("no GPU")

    monkeypatch.setattr(building, "Device", absent)
    monkeypatch.setattr(building, "PACKAGES", ("played_tensorrt",))
    with pytest.raises(BackendUnavailable, match="finds none here; install tensorrt_rtx"):
        check_gpus(GPUS)


@pytest.mark.skipif(torch.cuda.is_available(), reason="builds them where there is a GPU")
def test_engines_without_weights_say_that_building_them_takes_a_gpu(tiny_copy):
    with pytest.raises(BundleError, match="beside an NVIDIA GPU: .*leave --weightless"):
        build_engines(tiny_copy, ENCODE, ("sm_89",), print, weightless=True)


def test_the_command_takes_several_gpus():
    parser = argparse.ArgumentParser()
    register(parser.add_subparsers())
    words = ["export", "model", "-o", "b", "--target", "tensorrt", "--gpu", *GPUS]
    assert parser.parse_args(words).gpu == list(GPUS)


def test_an_error_that_may_mean_no_memory_says_so():
    named = building._hint("Could not find any implementation for node {ForeignNode[x]}")
    assert re.fullmatch(r"; this often means that memory ran out, of which .* is free: .*", named)
    assert not building._hint("Assertion failed: axis < rank")
