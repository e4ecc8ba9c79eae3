"""The command line as a user meets it: files, exit statuses, one-line errors, one JSON object."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.metadata import EntryPoint

import numpy as np
import pytest
from PIL import Image

import small_flow_checkpoints
import tintype
from tintype import cli
from tintype.cli import main
from tintype.png import read_png

PROMPT = "a red lighthouse"


def generate(bundle, *arguments):
    return main(["generate", PROMPT, "-m", str(bundle), *arguments])


def test_generate_writes_the_picture_with_its_settings(
    tiny_bundle, tiny_pipeline, tmp_path, capsys
):
    target = tmp_path / "out.png"
    arguments = ["--seed", "7", "--steps", "3", "--guidance", "2", "--scheduler", "euler"]
    assert generate(tiny_bundle, "-o", str(target), "-n", "fog", "--size", "48x32", *arguments) == 0
    settings = read_png(target)
    assert (settings.prompt, settings.negative_prompt, settings.seed) == (PROMPT, "fog", 7)
    assert (settings.steps, settings.guidance, settings.scheduler) == (3, 2.0, "euler")
    assert (settings.width, settings.height, settings.model) == (48, 32, "tiny")
    (expected,) = tiny_pipeline(
        PROMPT,
        "fog",
        width=48,
        height=32,
        seed=7,
        num_inference_steps=3,
        guidance_scale=2,
        scheduler="euler",
    ).images
    with Image.open(target) as image:
        np.testing.assert_array_equal(np.asarray(image), np.asarray(expected))
    printed = capsys.readouterr()
    assert printed.out == f"{target} (seed 7)\n"
    assert printed.err == "step 3/3\n"
    assert [path.name for path in tmp_path.iterdir()] == ["out.png"]


def test_a_cascades_own_options_are_its_arguments_and_in_its_picture(saved, tmp_path):
    model, target = saved("unclip"), tmp_path / "out.png"
    asked = ["--prior-steps", "2", "--prior-guidance", "1.5", "--steps", "2", "--seed", "3"]
    assert main(["generate", PROMPT, "-m", str(model), "-o", str(target), *asked]) == 0
    cascade = {"prior_num_inference_steps": 2, "prior_guidance_scale": 1.5}
    (expected,) = tintype.load(model)(PROMPT, seed=3, num_inference_steps=2, **cascade).images
    with Image.open(target) as image:
        np.testing.assert_array_equal(np.asarray(image), np.asarray(expected))
    # What was left open is the model's own.
    assert read_png(target).cascade == cascade | {"super_res_num_inference_steps": 7}


def test_an_edit_begins_with_a_picture(tiny_bundle, tiny_pipeline, tmp_path, capsys):
    picture = tiny_pipeline(PROMPT, width=48, height=32, seed=1).images[0]
    shade = np.zeros((32, 48), np.uint8)
    shade[:, :24] = 255
    first, mask, target = (tmp_path / name for name in ("first.png", "mask.png", "out.png"))
    picture.save(first)
    Image.fromarray(shade).save(mask)
    edit = ["--init", str(first), "--mask", str(mask), "--strength", "0.5", "--seed", "2"]
    assert generate(tiny_bundle, "-o", str(target), *edit) == 0
    settings = read_png(target)
    assert (settings.width, settings.height, settings.strength) == (48, 32, 0.5)
    (expected,) = tiny_pipeline(
        PROMPT, image=picture, mask_image=Image.fromarray(shade), strength=0.5, seed=2
    ).images
    with Image.open(target) as image:
        np.testing.assert_array_equal(np.asarray(image), np.asarray(expected))
        assert "Denoising strength: 0.5" in image.text["parameters"]
    assert capsys.readouterr().err == "step 2/2\n"


def test_a_checkpoint_is_placed_as_load_would_place_it(tmp_path, monkeypatch):
    folder = small_flow_checkpoints.save("sd35", tmp_path / "model")
    placement = {
        "device": "cpu",
        "dtype": "bfloat16",
        "without": ["text_encoder_3"],
        "offload": "sequential",
        "vae_tiling": True,
        "attention_slicing": True,
    }
    request = {"width": 64, "height": 32, "num_inference_steps": 2, "seed": 1}
    (expected,) = tintype.load(folder, **placement)(PROMPT, **request).images
    told, load = [], tintype.load
    monkeypatch.setattr(tintype, "load", lambda *a, **b: (told.append(b), load(*a, **b))[1])
    target = tmp_path / "out.png"
    flags = "--device cpu --dtype bfloat16 --without text_encoder_3 --offload sequential"
    flags += " --vae-tiling --attention-slicing --size 64x32 --steps 2 --seed 1"
    assert generate(folder, "-o", str(target), *flags.split()) == 0
    assert told == [{"backend": "auto", "lora": [], "controlnet": None, **placement}]
    with Image.open(target) as image:
        np.testing.assert_array_equal(np.asarray(image), np.asarray(expected))


def test_a_file_that_is_no_picture_is_named(tiny_bundle, tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("not a picture")
    for name in ("notes.txt", "absent.png"):
        assert generate(tiny_bundle, "--init", str(tmp_path / name)) == 2
        error = capsys.readouterr().err
        assert f"{name} cannot be read as a picture" in error
        assert len(error.splitlines()) == 1


def test_a_long_prompt_warns_in_one_line(tiny_bundle, tmp_path, capsys):
    arguments = ["-m", str(tiny_bundle), "-o", str(tmp_path / "a.png")]
    assert main(["generate", "word " * 100, *arguments]) == 0
    warning, *rest = capsys.readouterr().err.splitlines()
    assert warning.startswith("tintype: warning: the prompt has")
    assert rest == ["step 4/4"]


@pytest.mark.parametrize(
    ("typed", "meant"),
    [("caf\udcc3\udca9", "café"), ("a\udcff", "a\N{REPLACEMENT CHARACTER}"), ("城", "城")],
)
def test_a_prompt_is_read_as_utf_8_whatever_the_locale(tiny_bundle, tmp_path, typed, meant):
    target = tmp_path / "a.png"
    arguments = ["generate", typed, "-n", typed, "-m", str(tiny_bundle), "-o", str(target)]
    assert main([*arguments, "--steps", "1"]) == 0
    assert (read_png(target).prompt, read_png(target).negative_prompt) == (meant, meant)


def test_a_link_stays_one_and_a_pipe_is_written_to(tiny_bundle, tmp_path):
    target, link, pipe = (tmp_path / name for name in ("real.png", "link.png", "pipe"))
    link.symlink_to(target)
    assert generate(tiny_bundle, "--seed", "1", "-o", str(link)) == 0
    assert link.is_symlink()
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)  # holds a picture of this size
    assert generate(tiny_bundle, "--seed", "1", "-o", str(pipe)) == 0
    assert pipe.is_fifo()
    assert os.read(reader, 1 << 16) == target.read_bytes()
    os.close(reader)


def test_progress_that_cannot_be_told_costs_no_picture(tiny_bundle, tmp_path, monkeypatch):
    class Full:
        def write(self, text):
            raise OSError(28, "No space left on device")

        def flush(self): ...

        def isatty(self):
            return True

    monkeypatch.setattr(sys, "stderr", Full())
    assert generate(tiny_bundle, "-o", str(tmp_path / "a.png")) == 0
    assert (tmp_path / "a.png").exists()


def test_a_terminal_gets_a_bar(tiny_bundle, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    assert generate(tiny_bundle, "-o", str(tmp_path / "a.png")) == 0
    bars = capsys.readouterr().err.split("\r")
    assert bars[-1] == f"[{'#' * 30}] step 4/4\n"
    assert len(bars) == 1 + 4


def test_generate_names_files_after_seeds(tiny_bundle, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert generate(tiny_bundle, "--seed", "7", "--count", "2") == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tintype-7.png", "tintype-8.png"]


def test_generate_numbers_a_named_file(tiny_bundle, tmp_path):
    assert generate(tiny_bundle, "-o", str(tmp_path / "a.png"), "--count", "2", "--seed", "1") == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a-1.png", "a-2.png"]
    assert [read_png(tmp_path / f"a-{i}.png").seed for i in (1, 2)] == [1, 2]


def test_json_is_one_object_and_nothing_else(tiny_bundle, tmp_path, capsys):
    target = tmp_path / "a.png"
    assert generate(tiny_bundle, "-o", str(target), "--seed", "1", "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["images"] == [{"path": str(target), "seed": 1}]
    assert {"load", "encode", "denoise", "decode", "save"} == set(report["timings"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--size", "64x64"], "size 64x64 is not in this model; it has 32x32, 48x32"),
        (["--steps", "0"], "num_inference_steps=0"),
        (["--guidance", "nan"], "guidance_scale=nan"),
        (["--scheduler", "warp"], "choose one of ddpm, ddim, pndm"),
        (["--seed", "-4"], "seed=-4"),
        (["--count", "0"], "num_images_per_prompt=0"),
        (["--backend", "warp"], "backend='warp'"),
        (["--device", "warp"], "device='warp'"),
        (["--dtype", "float16"], "exported in fp32"),
        (["--without", "text_encoder_3"], "without=['text_encoder_3'] is for checkpoints"),
        (["--offload", "model"], "offload='model' is for checkpoints"),
        (["--vae-tiling"], "vae_tiling=True is for checkpoints"),
        (["--attention-slicing"], "attention_slicing=True is for checkpoints"),
        (["-o", "no/such/folder/a.png"], "no such folder"),
        (
            ["-o", "a.jpg"],
            "a.jpg would hold a PNG, which carries the picture's settings; name it a.png",
        ),
        (["-o", "a.WebP"], "name it a.png"),
        (["--device", "cpu:x"], "device='cpu:x' is unknown to onnxruntime"),
    ],
)
def test_bad_usage_is_status_2_and_one_line(
    tiny_bundle, tmp_path, monkeypatch, capsys, arguments, message
):
    monkeypatch.chdir(tmp_path)
    assert generate(tiny_bundle, *arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("tintype: ")
    assert message in error
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["--offload", "disk"], 2, "offload='disk' is unknown; choose None, model, sequential"),
        (["--dtype", "float8"], 2, "dtype='float8' is unknown; choose auto, float32"),
        (["--device", "warp"], 2, "device='warp' is unknown; choose auto, cpu, cuda"),
        (["--device", "meta"], 2, "device='meta' is unknown; choose auto, cpu, cuda"),
        (["--without", "vae"], 1, "without vae; SD3 alone runs without some of"),
    ],
)
def test_a_checkpoint_that_cannot_be_placed_so_is_told_in_one_line(
    saved, capsys, arguments, status, message
):
    folder = saved("sd1")
    capsys.readouterr()  # what saving it printed
    assert generate(folder, *arguments) == status
    error = capsys.readouterr().err
    assert error.startswith("tintype: ")
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("arguments", [["--size", "64"], ["--steps", "many"], ["--nonsense"]])
def test_what_argparse_refuses_is_status_2(tiny_bundle, arguments, capsys):
    assert generate(tiny_bundle, *arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("tintype")
    assert "error: " in error
    assert error.endswith("--help\n")
    assert error.count("\n") == 1


def test_a_folder_as_output(tiny_bundle, tmp_path, capsys):
    assert generate(tiny_bundle, "-o", str(tmp_path)) == 2
    assert "is a folder" in capsys.readouterr().err


def test_a_failure_is_status_1_and_debug_shows_the_traceback(tmp_path, capsys):
    arguments = ["generate", PROMPT, "-m", str(tmp_path / "nothing"), "-o", str(tmp_path / "a.png")]
    assert main(arguments) == 1
    assert "nothing is not a folder, a file" in capsys.readouterr().err
    assert main([*arguments, "--debug"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_a_picture_that_cannot_be_written_leaves_nothing(
    tiny_bundle, tmp_path, monkeypatch, capsys
):
    def fail(image, stream, settings):
        stream.write(b"half a picture")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tintype.png.write_png", fail)
    assert generate(tiny_bundle, "-o", str(tmp_path / "a.png")) == 1
    assert "No space left" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["a", "a.PNG", "a.1"])
def test_a_name_that_promises_no_other_picture_is_taken(tiny_bundle, tmp_path, name):
    assert generate(tiny_bundle, "-o", str(tmp_path / name)) == 0
    with Image.open(tmp_path / name) as image:
        assert image.format == "PNG"


@pytest.mark.parametrize("size", ["1000000000x1000000000", "1000000000x64", f"{10**20}x64"])
def test_a_picture_that_no_memory_holds_is_one_line(saved, capsys, size):
    folder = saved("sd1")
    capsys.readouterr()
    assert generate(folder, "--size", size, "--steps", "1") != 0
    error = capsys.readouterr().err
    assert f"size {size} does not fit into memory" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("name", "message"),
    [("a.json", "a.json is where the figures go"), ("a.jpg", "a.jpg would hold a PNG")],
)
def test_a_comparison_is_not_written_where_its_figures_go(
    tiny_bundle, tmp_path, monkeypatch, capsys, name, message
):
    monkeypatch.chdir(tmp_path)
    short = ["--steps", "1", "--reference", "1", "--scheduler", "ddim"]
    assert main(["schedulers", "--compare", str(tiny_bundle), "-o", name, *short]) == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_inspect_a_bundle(tiny_bundle, capsys):
    assert main(["inspect", str(tiny_bundle), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["model"]["kind"] == "bundle"
    assert report["model"]["stages"]["encode"] == ["b1"]
    assert report["auto"]["backend"] == "onnxruntime"
    assert report["kernels"]["selected"] == "native"
    assert report["tintype"] == tintype.__version__
    assert main(["inspect", str(tiny_bundle)]) == 0
    text = capsys.readouterr().out
    assert "auto picks onnxruntime: it runs a bundle" in text
    assert "kernels: native, TINTYPE_KERNELS=auto" in text


def test_inspect_without_the_extension_says_so(tiny_bundle, capsys, monkeypatch):
    monkeypatch.setattr("tintype_kernels.native.module", None)
    monkeypatch.setattr("tintype_kernels.native.reason", "not built")
    assert main(["inspect", str(tiny_bundle)]) == 0
    assert "kernels: reference, TINTYPE_KERNELS=auto (not built)" in capsys.readouterr().out


def test_schedulers_are_listed(capsys):
    assert main(["schedulers"]) == 0
    assert capsys.readouterr().out.split() == tintype.schedulers()
    assert main(["schedulers", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"schedulers": tintype.schedulers()}


def test_no_command_and_unknown_commands_are_status_2(capsys):
    assert main([]) == 2
    assert main(["paint"]) == 2
    assert "generate" in capsys.readouterr().err


def test_help_lists_what_other_packages_add(capsys):
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(
        command in text
        for command in ("generate", "inspect", "schedulers", "serve", "bench", "train")
    )


def test_a_command_whose_packages_are_missing_names_the_extra(monkeypatch, capsys):
    absent = EntryPoint("paint", "a_package_nobody_has.cli:register", cli.GROUP)
    monkeypatch.setattr("importlib.metadata.entry_points", lambda group: [absent])
    assert main(["paint", "model", "--port", "1"]) == 1
    error = capsys.readouterr().err
    assert "a_package_nobody_has" in error
    assert 'pip install "tintype[paint]"' in error


def test_the_installed_command_runs(tiny_bundle, tmp_path):
    command = [sys.executable, "-m", "tintype.cli", "generate", PROMPT, "-m", str(tiny_bundle)]
    done = subprocess.run(
        [*command, "-o", str(tmp_path / "a.png"), "--json"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(done.stdout)["images"][0]["path"] == str(tmp_path / "a.png")
