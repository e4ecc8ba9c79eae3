"""What a source may be, and what is said of one that cannot be loaded."""

from __future__ import annotations

import gc
import shutil
import weakref
from pathlib import Path

import pytest

import tintype
from tintype import backends, loading
from tintype.errors import BackendUnavailable, CheckpointError, RequestError


def test_a_folder_that_is_neither(tmp_path):
    with pytest.raises(CheckpointError, match=r"neither bundle\.json nor model_index\.json"):
        tintype.load(tmp_path)


def test_a_source_that_is_nothing():
    with pytest.raises(
        CheckpointError, match="not a folder, a file, a hub id or a model in the box"
    ):
        tintype.load("no such thing")


def test_a_name_in_the_box_is_a_bundle_of_the_package(tiny_bundle, tmp_path, monkeypatch):
    shutil.copytree(tiny_bundle, tmp_path / "sample")
    monkeypatch.setattr(loading, "BOX", tmp_path)
    assert loading.boxed() == ["sample"]
    assert tintype.load("sample").name == "tiny"


def test_a_hub_bundle_is_fetched_into_a_folder_of_its_own(tiny_bundle, tmp_path, monkeypatch):
    asked = []

    def download(hub_id, allow_patterns, local_dir=None):
        asked.append((hub_id, local_dir))
        return str(tiny_bundle)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    monkeypatch.setenv("TINTYPE_CACHE", str(tmp_path))
    assert tintype.load("someone/tiny").name == "tiny"
    assert asked == [
        ("someone/tiny", None),
        ("someone/tiny", tmp_path / "hub" / "someone" / "tiny"),
    ]


def test_an_unreachable_hub_is_a_checkpoint_error(monkeypatch):
    def download(*arguments, **options):
        raise OSError("no route to the hub")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    with pytest.raises(CheckpointError, match="someone/model is neither.*no route"):
        tintype.load("someone/model")


def test_unknown_backends_list_those_that_exist(tiny_bundle):
    with pytest.raises(
        RequestError, match="'warp' is unknown.*auto, onnxruntime, openvino, tensorrt, torch"
    ):
        tintype.load(tiny_bundle, backend="warp")
    with pytest.raises(RequestError, match="'torch' does not run a bundle.*auto, onnxruntime"):
        tintype.load(tiny_bundle, backend="torch")


def test_an_absent_package_names_its_extra(tiny_bundle, monkeypatch):
    monkeypatch.setattr(backends, "available", lambda name: False)
    with pytest.raises(BackendUnavailable, match=r'pip install "tintype\[cpu\]"'):
        tintype.load(tiny_bundle)
    with pytest.raises(BackendUnavailable, match=r'pip install "tintype\[cpu\]"'):
        tintype.load(tiny_bundle, backend="onnxruntime")
    assert all(state.startswith("absent") for state in backends.report().values())


@pytest.mark.parametrize(
    ("device", "error"), [("cuda", BackendUnavailable), ("warp", RequestError)]
)
def test_devices_that_onnxruntime_lacks(tiny_bundle, device, error):
    with pytest.raises(error, match=f"device='{device}'"):
        tintype.load(tiny_bundle, device=device)


def test_a_dtype_that_the_bundle_is_not_in(tiny_bundle):
    assert tintype.load(tiny_bundle, dtype="float32").name == "tiny"
    with pytest.raises(RequestError, match="exported in fp32"):
        tintype.load(tiny_bundle, dtype="float16")


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_what_a_pipeline_holds_goes_with_it(tiny_bundle, backend):
    pytest.importorskip(backend)
    pipe = tintype.load(tiny_bundle, backend=backend)
    pipe("a", num_inference_steps=1)
    held = weakref.ref(pipe.family.backend)
    gc.disable()  # which would come by some time, gigabytes later
    try:
        del pipe
        assert held() is None
    finally:
        gc.enable()


def test_graphs_are_for_torch_and_engines(tiny_bundle):
    with pytest.raises(RequestError, match="execution='graph' is for checkpoints on torch"):
        tintype.load(tiny_bundle, backend="onnxruntime", execution="graph")


def test_sources_may_be_paths_or_strings(tiny_bundle):
    assert tintype.load(Path(tiny_bundle)).name == tintype.load(str(tiny_bundle)).name == "tiny"
