"""The comparison of schedulers: its figures, its grid, and the command that writes them."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

import tintype
from tintype.cli import main
from tintype.comparison import compare
from tintype.errors import RequestError

PROMPT = "a red lighthouse"


@pytest.fixture(scope="module")
def made(tiny_bundle):
    pipeline = tintype.load(tiny_bundle)
    return compare(pipeline, PROMPT, steps=[10, 3], reference_steps=100)


def test_all_methods_that_sample_the_model_are_compared(made):
    listed = {(cell.scheduler, cell.steps) for cell in made.cells[:-1]}
    methods = [name for name in tintype.schedulers() if not name.startswith(("flow", "edm"))]
    assert listed == {(name, steps) for name in methods for steps in (3, 10)}
    assert (made.cells[-1].scheduler, made.cells[-1].steps) == ("euler", 100)
    evaluations = {(cell.scheduler, cell.steps): cell.evaluations for cell in made.cells}
    assert (evaluations["heun", 10], evaluations["euler", 10]) == (19, 10)


def test_distances_are_to_the_reference_and_fall_with_the_steps(made):
    distance = {(cell.scheduler, cell.steps): cell.distance for cell in made.cells}
    assert distance["euler", 100] == 0
    reference, first = made.cells[-1].image, made.cells[0]
    expected = np.sqrt(np.mean((first.image.astype(np.float64) - reference) ** 2))
    assert first.distance == pytest.approx(expected, rel=1e-6)
    for name in ("euler", "dpmpp_2m", "unipc"):
        assert distance[name, 10] < distance[name, 3]


def test_the_grid_holds_every_picture(made):
    grid = np.asarray(made.grid())
    height = made.cells[0].image.shape[0]
    rows = len({cell.scheduler for cell in made.cells[:-1]}) + 1
    assert grid.shape[0] % rows == 0
    step = grid.shape[0] // rows
    corner = grid[-step:][:height, :height]
    np.testing.assert_array_equal(corner, np.rint(made.cells[-1].image * 255).astype(np.uint8))
    labels = grid[height : height + 14]
    assert labels.min() < 128


def test_the_command_writes_a_picture_and_its_figures(tiny_bundle, tmp_path, capsys):
    target = tmp_path / "grid.png"
    asked = ["--scheduler", "ddim", "unipc", "--steps", "2", "4", "--reference", "20"]
    command = ["schedulers", "--compare", str(tiny_bundle), "-o", str(target), *asked]
    assert main([*command, "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads(target.with_suffix(".json").read_text())
    assert [(cell["scheduler"], cell["steps"]) for cell in printed["cells"]] == [
        *(("ddim", 2), ("ddim", 4)),
        *(("unipc", 2), ("unipc", 4)),
    ]
    assert printed["reference"] | {"seconds": 0} == {
        "scheduler": "euler",
        "steps": 20,
        "evaluations": 20,
        "seconds": 0,
        "distance": 0,
    }
    with Image.open(target) as grid:
        assert grid.format == "PNG"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["grid.json", "grid.png"]


def test_a_model_in_the_box_is_judged(tmp_path, capsys):
    target = tmp_path / "grid.png"
    asked = ["--scheduler", "ddim", "--steps", "1", "8", "--reference", "8", "--prompts", "6"]
    assert main(["schedulers", "--compare", "postcard", "-o", str(target), *asked, "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    one_step, eight_steps = (cell["accuracy"] for cell in printed["cells"])
    assert one_step < eight_steps <= 1
    assert "accuracy" not in printed["reference"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--compare", "MODEL"], "name its file with -o"),
        (["-o", "x.png"], "--compare"),
        (["--compare", "MODEL", "-o", "x.png", "--scheduler", "warp"], "warp"),
        (["--compare", "MODEL", "-o", "x.png", "--steps", "0"], "num_inference_steps=0"),
        (["--compare", "MODEL", "-o", "x.png", "--prompts", "3"], "a model with a judge"),
    ],
)
def test_bad_usage_is_one_line(tiny_bundle, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    named = [str(tiny_bundle) if word == "MODEL" else word for word in arguments]
    assert main(["schedulers", *named]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1
    assert not list(tmp_path.iterdir())


# Published DPM-Solver++ leaves straight paths with other sigmas than the shift's, and is refused with them.
@pytest.mark.parametrize(
    ("changes", "refused"),
    [({}, set()), ({"use_karras_sigmas": True}, {"dpmpp_2m", "dpmpp_2m_sde"})],
)
def test_a_flow_model_is_compared_with_its_own_methods(tiny_pipeline, changes, refused):
    config = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 2.0, **changes}
    family = type(tiny_pipeline.family)(
        tiny_pipeline.family.backend,
        tiny_pipeline.family.tokenizers,
        config,
        tiny_pipeline.family.defaults,
    )
    pipeline = type(tiny_pipeline)("flow", family, "")
    made = compare(pipeline, PROMPT, steps=[2], reference_steps=8)
    own = {"dpmpp_2m", "dpmpp_2m_sde", "unipc", "flow_euler", "flow_heun"}
    assert {cell.scheduler for cell in made.cells} == own - refused
    with pytest.raises(RequestError, match="does not sample a flow model"):
        compare(pipeline, PROMPT, schedulers=["ddim"], steps=[2], reference_steps=8)
