"""A bundle is written whole or not at all: kills, full disks, other people's folders."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from remembered_traces import save_traces
from small_checkpoints import save_smallest
from tintype import bundle as bundles
from tintype.bundle import MANIFEST, open_bundle
from tintype.checkpoints import open_checkpoint
from tintype.cli import main
from tintype.errors import BundleError, RequestError
from tintype_export import bundle as exporting
from tintype_export import cli, storage, writing
from tintype_export.bundle import ExportConfig, export_bundle
from tintype_export.storage import precision, store_weights
from tintype_export.writing import copy_described, replaced, require_room, sweep, written_whole

KILLS = int(os.environ.get("TINTYPE_KILLS", "4"))  # 30 is what docs/measurements.md reports
CONFIG = ExportConfig(sizes=((16, 16),), defaults={"width": 16, "height": 16})


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
@pytest.mark.usefixtures("traced_once")
def test_a_killed_export_leaves_no_half_bundle_and_the_next_one_cleans_up(tmp_path):
    export_bundle(save_smallest(tmp_path / "source"), tmp_path / "once", CONFIG)
    save_traces(tmp_path / "traces")
    command = [sys.executable, str(Path(__file__).with_name("killed_exports.py")), str(tmp_path)]
    tests = str(Path(__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": tests, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, str(KILLS)], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [line.split() for line in done.stdout.splitlines()]
    left = [words[1:] for words in lines if words[0] == "left"]
    assert len(left) == KILLS
    assert any("hidden" in words for words in left), "no kill fell into the export"
    assert lines[-1] == ["names", "bundle"]


@pytest.mark.parametrize("moment", ["store_weights", "save", "verify", "save_manifest"])
@pytest.mark.usefixtures("traced_once")
def test_a_full_disk_is_named_and_nothing_is_left(tmp_path, monkeypatch, moment):
    source = save_smallest(tmp_path / "checkpoint")

    def fail(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(exporting, moment, fail)
    with pytest.raises(BundleError, match="is full; free some space"):
        export_bundle(source, tmp_path / "bundle", CONFIG)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def test_a_disk_that_is_too_small_is_refused_before_any_work(tmp_path, monkeypatch):
    source = save_smallest(tmp_path / "checkpoint")
    usage = type("Usage", (), {"free": 1_000_000})
    monkeypatch.setattr(writing.shutil, "disk_usage", lambda folder: usage)
    with pytest.raises(BundleError, match=r"needs about .* of disk and .* has 1\.0 MB free"):
        export_bundle(source, tmp_path / "deep" / "bundle", CONFIG)
    assert not (tmp_path / "deep").exists()


def test_room_is_looked_for_where_the_target_will_be(tmp_path):
    assert require_room(tmp_path / "not" / "yet" / "there", 1) > 0


@pytest.mark.parametrize("manifest", [None, '{"private": true}', "not even JSON"])
def test_another_folder_is_not_replaced(tmp_path, manifest):
    folder = tmp_path / "photos"
    folder.mkdir()
    (folder / "cat.png").write_bytes(b"cat")
    if manifest is not None:
        (folder / MANIFEST).write_text(manifest)
    with pytest.raises(RequestError, match="which is not of a bundle"), written_whole(folder):
        pass
    assert (folder / "cat.png").read_bytes() == b"cat"


def test_a_bundle_with_somebodys_file_in_it_is_not_replaced(tiny_copy):
    (tiny_copy / "notes").mkdir()
    (tiny_copy / "notes" / "mine.txt").write_text("x")
    with pytest.raises(RequestError, match=r"notes/mine\.txt"), written_whole(tiny_copy):
        pass
    assert (tiny_copy / "notes" / "mine.txt").read_text() == "x"


def test_folders_that_others_hid_are_left_alone(tmp_path):
    other = tmp_path / ".bundle.4194000"
    other.mkdir()
    sweep(tmp_path / "bundle")
    assert other.is_dir()


def test_the_root_of_a_disk_is_not_replaced(tmp_path):
    root = Path(tmp_path.anchor)
    assert require_room(root, 1) > 0
    with (
        pytest.raises(RequestError, match="is the root of a disk; name another folder"),
        written_whole(root),
    ):
        pass


def test_what_is_replaced_is_said_before(tiny_copy, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cli, "export_bundle", lambda *_: tiny_copy)
    assert main(["export", "postcard", "-o", str(tiny_copy), "--precision", "int8"]) == 0
    line = "holds a bundle in fp32 of 32x32, 48x32; the new one takes its place when it is whole"
    assert capsys.readouterr().err == f"{tiny_copy} {line}\n"
    assert main(["export", "postcard", "-o", str(tmp_path / "none")]) == 0
    assert capsys.readouterr().err == ""


def test_a_bundle_without_sizes_is_said_to_be_replaced_too(tiny_copy):
    manifest = json.loads((tiny_copy / MANIFEST).read_text())
    manifest["stages"] = {"encode": manifest["stages"]["encode"]}
    (tiny_copy / MANIFEST).write_text(json.dumps(manifest | {"precision": "int8"}))
    assert "holds a bundle in int8; the new one" in replaced(tiny_copy)


def test_a_file_is_not_replaced(tmp_path):
    (tmp_path / "notes").write_text("x")
    with pytest.raises(RequestError, match="is a file"), written_whole(tmp_path / "notes"):
        pass


def test_an_older_bundle_stays_until_the_new_one_is_whole(tiny_copy):
    before = (tiny_copy / MANIFEST).read_text()
    half = written_whole(tiny_copy)
    (half.__enter__() / MANIFEST).write_text("{}")
    assert (tiny_copy / MANIFEST).read_text() == before
    assert not half.__exit__(KeyboardInterrupt, KeyboardInterrupt(), None)
    assert (tiny_copy / MANIFEST).read_text() == before
    with written_whole(tiny_copy) as work:
        (work / MANIFEST).write_text("{}")
    assert [path.name for path in tiny_copy.iterdir()] == [MANIFEST]
    assert [path.name for path in tiny_copy.parent.iterdir()] == [tiny_copy.name]


def test_a_bundle_that_a_killed_export_had_moved_aside_comes_back(tiny_copy):
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()  # a number that nobody has now
    tiny_copy.rename(tiny_copy.with_name(f".bundle.{process.pid}.tintype.old"))
    sweep(tiny_copy)
    assert open_bundle(tiny_copy).name == "tiny"


def test_the_folder_of_an_export_that_still_runs_is_left_alone(tmp_path):
    running = tmp_path / f".bundle.{os.getppid()}.tintype"
    running.mkdir()
    sweep(tmp_path / "bundle")
    assert running.is_dir()


@pytest.mark.usefixtures("traced_once")
def test_every_file_is_hashed_once(tmp_path, monkeypatch):
    source, hashed = save_smallest(tmp_path / "checkpoint"), []
    plain_copy, plain_hash = copy_described, bundles._sha256

    def copied(source_file, target_file):
        hashed.append(target_file.name)
        return plain_copy(source_file, target_file)

    def sha256(path):
        hashed.append(path.name)
        return plain_hash(path)

    monkeypatch.setattr(storage, "copy_described", copied)
    monkeypatch.setattr(bundles, "_sha256", sha256)
    folder = export_bundle(source, tmp_path / "bundle", CONFIG)
    assert len(hashed) == sum(path.is_file() for path in folder.rglob("*")) - 1  # the manifest
    monkeypatch.undo()
    open_bundle(folder, remember=False)


def test_weights_that_are_there_twice_are_copied_once(tmp_path):
    source = save_smallest(tmp_path / "checkpoint")
    (source / "unet" / "diffusion_pytorch_model.fp16.safetensors").write_bytes(b"another form")
    (source / "whole.ckpt").write_bytes(b"a pickle")
    names = storage.wanted_files(open_checkpoint(source))
    assert [name for name in names if name.startswith("unet")] == [
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
    ]
    assert {"model_index.json", "tokenizer/tokenizer_config.json"} <= set(names)
    assert "whole.ckpt" not in names


def test_a_component_is_stored_in_shards_that_hold_all_of_it(tmp_path, monkeypatch):
    checkpoint = open_checkpoint(save_smallest(tmp_path / "source"))
    whole = store_weights(checkpoint, tmp_path / "whole", precision("fp16"))
    most = 20_000
    monkeypatch.setattr(writing, "_SHARD", most)
    sharded = store_weights(checkpoint, tmp_path / "sharded", precision("fp16"))
    assert not any("-of-" in name for name in whole.files)
    for component, tensors in whole.tensors.items():
        (expected,) = (tmp_path / "whole/weights").glob(f"{component}.safetensors")
        shards = sorted((tmp_path / "sharded/weights").glob(f"{component}-*"))
        loaded = [load_file(path) for path in shards]
        assert len(loaded) > 1
        assert all(
            len(each) == 1 or sum(t.nbytes for t in each.values()) <= most for each in loaded
        )
        together = {name: tensor for each in loaded for name, tensor in each.items()}
        one = load_file(expected)
        assert together.keys() == one.keys() == tensors.keys() == sharded.tensors[component].keys()
        assert all(torch.equal(together[name], one[name]) for name in one)


def test_the_working_folder_itself_can_be_the_target(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with written_whole(Path()) as work:
        (work / "a").write_text("b")
    assert (tmp_path / "a").read_text() == "b"
