"""A bundle that is not what its manifest says is refused, and by name."""

from __future__ import annotations

import json
import os
import re

import onnx
import pytest

import tintype
from tintype import bundle as bundles
from tintype.backends.onnx_weights import weight_files
from tintype.bundle import MANIFEST, open_bundle
from tintype.errors import BundleError
from tintype_kernels.cache import cache_folder
from tiny_bundle import WEIGHTS, write_manifest


def edit(folder, **changes):
    path = folder / MANIFEST
    manifest = json.loads(path.read_text())
    manifest.update(changes)
    path.write_text(json.dumps({k: v for k, v in manifest.items() if v is not None}))


def rewrite_manifest(folder):
    """Say again what is in the folder, after a change."""
    manifest = json.loads((folder / MANIFEST).read_text())
    kept = ("name", "family", "stages", "scheduler", "defaults")
    write_manifest(folder, **{name: manifest[name] for name in kept})


def test_a_sound_bundle_opens(tiny_bundle):
    bundle = open_bundle(tiny_bundle)
    assert (bundle.name, bundle.family, bundle.precision) == ("tiny", "latent_unet", "fp32")
    assert set(bundle.stages) == {"encode", "denoise", "decode", "encode_image"}
    assert WEIGHTS in bundle.files


def test_missing_file(tiny_copy):
    (tiny_copy / WEIGHTS).unlink()
    with pytest.raises(BundleError, match=f"{WEIGHTS} is missing"):
        open_bundle(tiny_copy)


def test_truncated_file(tiny_copy):
    path = tiny_copy / WEIGHTS
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(BundleError, match="has .* bytes, expected"):
        open_bundle(tiny_copy)


def test_changed_byte_is_found_even_after_a_good_load(tiny_copy):
    open_bundle(tiny_copy)
    path = tiny_copy / WEIGHTS
    blob = bytearray(path.read_bytes())
    blob[-1] ^= 1
    path.write_bytes(bytes(blob))
    stat = path.stat()
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1_000_000))
    with pytest.raises(BundleError, match="sha256"):
        open_bundle(tiny_copy)


def test_hashes_are_remembered_between_loads(tiny_bundle, monkeypatch):
    open_bundle(tiny_bundle)
    assert (cache_folder() / "verified.json").is_file()
    monkeypatch.setattr(bundles, "_sha256", lambda path: pytest.fail(f"hashed {path} again"))
    open_bundle(tiny_bundle)


def test_an_unusable_cache_only_costs_time(tiny_bundle, tmp_path, monkeypatch):
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    monkeypatch.setenv("TINTYPE_CACHE", str(blocked / "cache"))
    open_bundle(tiny_bundle)
    open_bundle(tiny_bundle)


def test_newer_format(tiny_copy):
    edit(tiny_copy, format=bundles.FORMAT + 1)
    with pytest.raises(BundleError, match="upgrade tintype"):
        open_bundle(tiny_copy)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"name": "x"}'])
def test_manifest_that_is_none(tiny_copy, text):
    (tiny_copy / MANIFEST).write_text(text)
    with pytest.raises(BundleError, match=MANIFEST):
        open_bundle(tiny_copy)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"format": 0}, "no format"),
        ({"format": True}, "no format"),
        ({"stages": []}, "stages"),
        ({"stages": {"encode": "b1"}}, "stages"),
        ({"stages": {"encode": {"b1": 5}}}, "stages"),
        ({"files": "x"}, "files"),
        ({"files": {"a": "b"}}, "file 'a'"),
        ({"files": {"a": {"size": 1}}}, "file 'a'"),
        ({"scheduler": []}, "scheduler"),
        ({"tokenizers": [5]}, "tokenizers"),
        ({"engines": {"sm_89": {}}}, "engines of sm_89"),
        ({"family": "warp"}, "family 'warp'"),
        ({"precision": 8}, "precision"),
    ],
    ids=str,
)
def test_a_manifest_of_other_kinds_is_named_in_one_line(tiny_copy, fields, named):
    edit(tiny_copy, **fields)
    with pytest.raises(BundleError, match=named) as raised:
        open_bundle(tiny_copy)
    assert len(str(raised.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"stages": {}}, "1 tokenizers for 0 text encoders"),
        ({"stages": {"encode": {"b1": "encode/b1.onnx"}}}, "no stage decode"),
        ({"tokenizers": []}, "0 tokenizers for 1 text encoders"),
        ({"defaults": {}}, "no width, height, guidance_scale"),
    ],
    ids=str,
)
def test_a_bundle_of_parts_makes_no_picture(tiny_copy, fields, named):
    edit(tiny_copy, **fields)
    with pytest.raises(BundleError, match=named):
        tintype.load(tiny_copy)


def test_a_manifest_that_is_too_deep_is_no_json(tiny_copy):
    (tiny_copy / MANIFEST).write_text("[" * 100_000)
    with pytest.raises(BundleError, match="not valid JSON"):
        open_bundle(tiny_copy)


def test_a_name_that_no_file_can_have_is_refused(tiny_copy):
    files = json.loads((tiny_copy / MANIFEST).read_text())["files"]
    edit(tiny_copy, files={"a\0b": {"size": 1, "sha256": "0"}, **files})
    with pytest.raises(BundleError, match="is no name of a file"):
        open_bundle(tiny_copy)


def test_a_file_beside_a_tokenizers_own_is_refused(tiny_copy):
    """Readers of tokenizers look for several files, so that one put there would be read."""
    (tiny_copy / "tokenizer" / "tokenizer.json").write_text("{}")
    with pytest.raises(BundleError, match=r"tokenizer/tokenizer\.json is not among"):
        open_bundle(tiny_copy)


def test_a_bundle_is_found_wherever_the_process_goes(tiny_copy, tmp_path, monkeypatch):
    monkeypatch.chdir(tiny_copy.parent)
    pipeline = tintype.load(tiny_copy.name)
    monkeypatch.chdir(tmp_path.parent)
    assert pipeline("a red boat", num_inference_steps=1).images


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_a_bundle_that_was_moved_is_an_error_of_the_bundle(tiny_copy, backend):
    pytest.importorskip(backend)
    pipeline = tintype.load(tiny_copy, backend=backend)
    tiny_copy.rename(tiny_copy.parent / "moved")
    with pytest.raises(BundleError, match="was the bundle moved"):
        pipeline("a red boat", num_inference_steps=1)


@pytest.mark.parametrize("field", ["family", "stages", "files", "tokenizers"])
def test_manifest_without_a_field(tiny_copy, field):
    edit(tiny_copy, **{field: None})
    with pytest.raises(BundleError, match=f"lacks {field}"):
        open_bundle(tiny_copy)


@pytest.mark.parametrize(
    "path", ["../outside", "/etc/hostname", "weights/../../outside", "a\\..\\b"]
)
def test_paths_that_leave_the_folder(tiny_copy, path):
    (tiny_copy.parent / "outside").write_text("x")
    files = json.loads((tiny_copy / MANIFEST).read_text())["files"]
    edit(tiny_copy, files={path: {"size": 1, "sha256": "0"}, **files})
    with pytest.raises(BundleError, match="leads out of the bundle"):
        open_bundle(tiny_copy)


def test_links_that_leave_the_folder(tiny_copy):
    outside = tiny_copy.parent / "outside.safetensors"
    (tiny_copy / WEIGHTS).rename(outside)
    (tiny_copy / WEIGHTS).symlink_to(outside)
    with pytest.raises(BundleError, match="leads out of the bundle"):
        open_bundle(tiny_copy)


def test_tokenizer_folder_may_not_leave_the_folder(tiny_copy):
    edit(tiny_copy, tokenizers=["../tokenizer"])
    with pytest.raises(BundleError, match="leads out of the bundle"):
        tintype.load(tiny_copy)


def test_a_stage_must_be_among_the_listed_files(tiny_copy):
    stages = json.loads((tiny_copy / MANIFEST).read_text())["stages"]
    edit(tiny_copy, stages={**stages, "encode": {"b1": "encode/b9.onnx"}})
    with pytest.raises(BundleError, match=r"encode/b9\.onnx is not among"):
        open_bundle(tiny_copy)


def test_a_graph_that_is_no_graph_is_named(tiny_copy):
    target = tiny_copy / "encode" / "b1.onnx"
    target.write_bytes(b"not onnx")
    rewrite_manifest(tiny_copy)
    with pytest.raises(BundleError, match=r"encode/b1\.onnx does not load"):
        tintype.load(tiny_copy)("x")


@pytest.mark.parametrize("where", ["initializer", "attribute", "function", "subgraph"])
@pytest.mark.parametrize("location", ["../outside", "/etc/hostname", "weights/unlisted"])
def test_a_graph_may_not_read_files_that_the_manifest_lacks(tiny_copy, where, location):
    target = tiny_copy / "encode" / "b1.onnx"
    target.write_bytes(graph_that_reads(location, where).SerializeToString())
    rewrite_manifest(tiny_copy)
    with pytest.raises(BundleError, match=f"points to '{re.escape(location)}'"):
        tintype.load(tiny_copy)("x")


def graph_that_reads(location, where):
    """A model whose one external tensor is in the place that `where` names."""
    tensor = onnx.TensorProto(name="w", data_type=1, dims=[1], data_location=1)
    tensor.external_data.add(key="location", value=location)
    constant = onnx.helper.make_node("Constant", [], ["y"], value=tensor)
    model = onnx.ModelProto(ir_version=10)
    if where == "initializer":
        model.graph.initializer.append(tensor)
    elif where == "attribute":
        model.graph.node.append(constant)
    elif where == "function":
        model.functions.add(name="f").node.append(constant)
    else:
        branch = onnx.GraphProto(node=[constant])
        model.graph.node.append(onnx.helper.make_node("If", ["c"], ["y"], then_branch=branch))
    return model


def test_weight_files_equal_what_onnx_reads(tiny_bundle):
    for path in tiny_bundle.rglob("*.onnx"):
        model = onnx.load(path, load_external_data=False)
        expected = {
            entry.value
            for tensor in model.graph.initializer
            for entry in tensor.external_data
            if entry.key == "location"
        }
        assert weight_files(path.read_bytes()) == expected
    assert expected


def test_write_manifest_refuses_a_stage_without_a_file(tiny_copy):
    with pytest.raises(BundleError, match="does not exist"):
        write_manifest(
            tiny_copy,
            name="x",
            family="latent_unet",
            stages={"encode": {"b1": "encode/none.onnx"}},
            scheduler={},
            defaults={},
        )
