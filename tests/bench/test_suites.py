"""`tintype bench` on small models, from worker processes to the report."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import replace

import pytest
from PIL import Image

import tintype
from bench_reports import CEILINGS, report, row
from tintype.cli import main
from tintype.errors import BundleError, RequestError
from tintype_bench import cases
from tintype_bench.campaign import Campaign, Clock, Progress, Unfinished
from tintype_bench.cases import Case, ours
from tintype_bench.conditions import computes_bf16, machine_name
from tintype_bench.measure import Plan, Task
from tintype_bench.probe import Settling
from tintype_bench.shapes import SHAPES
from tintype_bench.sources import Sources
from tintype_bench.work import PROMPT, Runner, Work

# What OpenVINO's rows are timed in here.
NATIVE = "bf16" if computes_bf16("cpu") else "fp32"
ONCE = ["--rounds", "1", "--runs", "1"]
# A worker of somebody else's, that draws what it was given.
OWN_WORKER = """
import json, sys
import numpy as np
from PIL import Image
picture = np.asarray(Image.open(sys.argv[1]), np.float32)[None] / 255
for line in sys.stdin:
    request = json.loads(line)
    if request["do"] == "quit":
        break
    if request["do"] == "output":
        np.save(request["path"], picture)
    answers = {
        "load": {"seconds": 2.0, "first_seconds": 1.0},
        "run": {"seconds": 0.25},
        "stages": {"seconds": 0.25, "stages": {"denoise": 0.2}},
        "peak": {"host": 10.0, "device": None},
    }
    print(json.dumps(answers.get(request["do"], {})), flush=True)
"""


@pytest.fixture(autouse=True)
def _settled(monkeypatch):
    monkeypatch.setattr("tintype_bench.probe.settle", lambda read: Settling([0.05], 0.0, True))


def rows_of(made):
    return {(r["who"], r["kind"]): r for case in made["cases"] for r in case["rows"]}


def test_a_bundle_beside_its_engines_alone_and_commands(tiny_bundle, tmp_path, capsys):
    """The commands: one draws grey, one copies what ours drew, one fails, one is a worker that stays."""
    worker = tmp_path / "worker.py"
    worker.write_text(OWN_WORKER)
    grey, copy = tmp_path / "grey.png", tmp_path / "copy.png"
    picture = tintype.load(tiny_bundle)(PROMPT, seed=0).images[0]
    picture.save(copy)
    Image.new("RGB", picture.size, "grey").save(grey)
    target = tmp_path / "report.json"
    commands = [
        f"/bin/cp {grey} {{output}}",
        f"cp {copy} {{output}}",
        f"{sys.executable} -c 0 {{output}}",
    ]
    commands.append(f"env {sys.executable} {worker} {copy}")
    asked = [each for line in commands for each in ("--peer-cmd", line)]
    assert main(["bench", str(tiny_bundle), *ONCE, "--json", str(target), *asked]) == 0
    written = json.loads(target.read_text())
    rows = rows_of(written)
    for who in (
        "tintype onnxruntime fp32",
        f"tintype openvino {NATIVE}",
        "onnxruntime fp32",
        f"openvino {NATIVE}",
    ):
        assert rows[who, "warm"]["status"] == "timed", rows[who, "warm"]
        assert rows[who, "warm"]["peak_megabytes"]["host"] > 0
        assert rows[who, "first"]["seconds"]["median"] >= rows[who, "first"]["load_seconds"]
    assert rows["onnxruntime fp32", "warm"]["agreement_db"] > 60
    assert rows["command cp", "warm"]["status"] == "timed"
    assert rows["command /bin/cp", "warm"]["status"] == "differs"
    assert "seconds" not in rows["command /bin/cp", "warm"]
    assert "no picture" in rows[f"command {sys.executable}", "warm"]["reason"]
    assert rows["command env", "warm"]["rounds"] == [[0.25]]
    assert rows["command env", "first"]["rounds"] == [[3.0]]
    assert written["ceilings"]["before"]["flops"]["fp32"] > 0
    assert "differs: its output is at" in capsys.readouterr().out


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("bench")


@pytest.fixture
def sources(folder, monkeypatch):
    """Of tiny shapes, on a machine that is as fast as it is said to be."""
    monkeypatch.setattr("tintype_bench.ceilings.measured", lambda device: CEILINGS)
    return Sources(folder, tiny=True, say=lambda line: None)


def tiny_campaign(sources, *runners, limit=None, **changes):
    case = replace(Case("sd15", 64, 64, 1, 2, 5.0, runners), **changes)
    return Campaign("cpu", [case], sources, Plan(1, 1), limit=limit)


def test_a_shape_beside_diffusers_with_its_limit_and_losses(sources):
    runners = (*ours("torch", "fp32", "int8"), Runner("diffusers", "fp32"))
    rows = rows_of(tiny_campaign(sources, *runners).run(None, resume=False))
    for who in ("tintype torch fp32", "diffusers fp32"):
        warm = rows[who, "warm"]
        assert warm["status"] == "timed", warm
        assert warm["agreement_db"] > 60
        assert set(warm["floor"]) == {"encode", "denoise", "decode"}
        assert warm["percent_of_limit"] == pytest.approx(
            100 * sum(warm["floor"].values()) / warm["seconds"]["median"]
        )
        assert {"encode", "denoise", "decode"} <= set(warm["stages"])
        assert sum(warm["stages"].values()) <= warm["seconds"]["median"] * (1 + 1e-9)
        assert warm["lost"]


def test_a_component_is_the_same_call_for_everybody(sources):
    runners = (*ours("torch", "bf16"), Runner("diffusers", "fp32"))
    campaign = tiny_campaign(sources, *runners, component="denoise", batch=2)
    rows = rows_of(campaign.run(None, resume=False))
    assert rows["diffusers fp32", "warm"]["agreement_db"] == 100  # it made the reference
    assert 20 < rows["tintype torch bf16", "warm"]["agreement_db"] < 60
    assert list(rows["tintype torch bf16", "warm"]["floor"]) == ["denoise"]


def test_a_stopped_run_goes_on_where_it_was(sources, tmp_path, monkeypatch):
    """Two rounds of one that works and, in the first, one that fails: stopped before the third group of runs."""
    failing = Runner("command", "bf16", command="no-such-program {output}")
    kept, begun = tmp_path / "progress", []

    def stop_at_the_third(self, case, number):
        begun.append(number)
        if len(begun) == 3:
            raise Unfinished("stopped")

    monkeypatch.setattr(Clock, "check", stop_at_the_third)
    campaign = tiny_campaign(sources, *ours("torch", "fp32"), failing, in_turn=True)
    campaign = replace(campaign, plan=Plan(2, 1))
    with pytest.raises(Unfinished):
        campaign.run(kept, resume=True)
    units = {unit["who"]: unit for unit in json.loads(kept.read_text())["units"]}
    made = campaign.run(kept, resume=True)
    assert begun == [0, 0, 1, 1]
    assert not kept.exists()
    rows = rows_of(made)
    first, second = rows["tintype torch fp32", "warm"]["rounds"]
    assert (first, len(second)) == (units["tintype torch fp32"]["samples"], 1)
    assert rows["command no-such-program", "warm"]["status"] == "failed"
    assert len(made["settlings"]) == 2


def test_all_cases_come_before_the_next_round(sources):
    names = [f"case {number}" for number in range(2)]
    tasks = [Task(name, Work("", 8, 8), ours("torch", "fp32"), {}, None) for name in names]
    pending = replace(tiny_campaign(sources), plan=Plan(2, 1))._pending(tasks, Progress(None, {}))
    assert [(task.case, number) for task, number, _ in pending] == [
        (name, number) for number in range(2) for name in names
    ]


def test_an_export_that_fails_is_told_to_every_runner_and_tried_once(sources, monkeypatch):
    asked = []

    def apart(function, *arguments):
        if function.__name__ == "_export":
            asked.append(arguments)
            raise BundleError("stage denoise differs")
        function(*arguments)

    monkeypatch.setattr("tintype_bench.sources.apart", apart)
    campaign = tiny_campaign(sources, *ours("onnxruntime", "int8"), *ours("openvino", "int8"))
    rows = rows_of(campaign.run(None, resume=False))
    assert len(asked) == 1
    for backend in ("onnxruntime", "openvino"):
        warm = rows[f"tintype {backend} int8", "warm"]
        assert warm["status"] == "failed"
        assert "stage denoise differs" in warm["reason"]


def test_the_time_limit_stops_before_a_group_that_would_pass_it(sources):
    with pytest.raises(Unfinished, match="run the same command with --resume"):
        tiny_campaign(sources, *ours("torch", "fp32"), limit=-1.0).run(None, resume=False)


def test_on_a_cpu_without_bfloat16_everybody_is_timed_once_in_float32_in_its_place():
    for make in (cases.quick, cases.cpu, cases.scale):
        for case in make():
            wide = cases.without_bf16(case).runners
            labels = [runner.label for runner in wide]
            assert len(set(labels)) == len(labels)
            assert {runner.precision for runner in wide} <= {"fp32", "int8"}
            assert {runner.kind for runner in wide} == {runner.kind for runner in case.runners}


def test_every_suites_cases_have_names_of_their_own_and_known_runners():
    for suite, make in cases.CASES.items():
        found = [case.name for case in make()]
        assert len(set(found)) == len(found), suite
        for case in make():
            labels = [runner.label for runner in case.runners]
            assert len(set(labels)) == len(labels), case.name
            assert any(runner.ours for runner in case.runners)


def test_the_gpu_suite_has_what_the_published_figures_are_of():
    found = {case.name for case in cases.gpu() if case.batch == 1}
    assert found == {
        "sd15 512x512, batch 1, 50 steps, guidance 7.5",
        "sd15 512x512, batch 1, 20 steps, guidance 7.5",
        "sdxl 1024x1024, batch 1, 30 steps, guidance 5",
        "sdxl 1024x1024, batch 1, 20 steps, guidance 8, MLPerf's settings",
        "sd3-medium 1024x1024, batch 1, 28 steps, guidance 7",
        "flux1-dev 1024x1024, batch 1, 28 steps, guidance 3.5",
        "flux1-schnell 1024x1024, batch 1, 4 steps, guidance 0",
        "karlo 256x256, batch 1, 25 steps, guidance 8",
    }
    assert {case.model for case in cases.gpu() if case.batch > 1} == SHAPES.keys()


def test_peers_are_chosen_by_name_and_an_unknown_one_is_an_error():
    (case, *_) = cases.quick()
    alone = cases.chosen_peers(case, ["none"], [])
    assert all(runner.ours for runner in alone.runners)
    one = cases.chosen_peers(case, ["diffusers-compiled"], [])
    assert [r.label for r in one.runners if not r.ours] == ["diffusers compiled bf16"]
    with pytest.raises(RequestError, match="choose among diffusers, "):
        cases.chosen_peers(case, ["comfy"], [])


def test_runners_are_chosen_by_what_their_names_hold():
    case = next(cases.gpu("cuda"))
    kept = cases.chosen_runners(case, ["torch graph", "diffusers bf16"])
    names = [runner.label for runner in kept.runners]
    own = [f"tintype torch graph {precision}" for precision in ("bf16", "fp8", "int8")]
    assert names == [*own, "diffusers bf16"]
    with pytest.raises(RequestError, match="--runner onnx leaves nobody of sd15.*diffusers bf16"):
        cases.chosen_runners(case, ["onnx"])


def test_the_users_commands_stay_whoever_else_is_chosen():
    case = cases.chosen_peers(cases.of_shape("sd15"), None, ["draw {output}", "paint {output}"])
    kept = cases.chosen_runners(case, ["tintype torch"]).runners
    labels = [runner.label for runner in kept]
    assert labels == ["tintype torch bf16", "command draw", "command paint"]
    alone = cases.chosen_runners(case, ["command draw"]).runners
    assert [runner.label for runner in alone] == ["command draw", "command paint"]
    with pytest.raises(RequestError, match="--runner onnx leaves nobody"):
        cases.chosen_runners(case, ["onnx"])


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("x {foo}", "names no {output}.*{foo}"),
        ("x {prompt}", "names no {output}.*{prompt}"),
        ("x {foo} {output}", "cannot be filled in: 'foo'.*known: output, prompt"),
        ("x {} {output}", "cannot be filled in"),
        ("x { {output}", "cannot be filled in"),
        ("x {steps:d} {output}", "cannot be filled in"),
        ("x 'un {output}", "No closing quotation"),
        ("x 'un", "No closing quotation"),
        (" ", "names no program"),
    ],
)
def test_a_command_that_cannot_be_started_is_refused_before_anything_runs(
    monkeypatch, capsys, command, said
):
    monkeypatch.setattr(Campaign, "run", lambda *_, **__: pytest.fail("it ran"))
    assert main(["bench", "--suite", "quick", "--peer-cmd", command]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"--peer-cmd {command!r}" in line
    assert re.search(said, line)


@pytest.mark.parametrize(
    "command", ["x {output} {latents} {seed} {{}}", """w.py '{"a": 1}'""", "sh -c 'x ${HOME}'"]
)
def test_a_command_that_can_be_started_is_taken(monkeypatch, command):
    def run(self, kept, resume):
        raise Unfinished("stopped")

    monkeypatch.setattr(Campaign, "run", run)
    assert main(["bench", "--suite", "quick", "--peer-cmd", command]) == 75


def test_every_runner_is_on_the_device_that_was_asked_for(monkeypatch):
    seen = []

    def run(self, kept, resume):
        seen.extend(r.device for case in self.cases for r in case.runners)
        raise Unfinished("stopped")

    monkeypatch.setattr(Campaign, "run", run)
    for suite in cases.CASES:
        assert main(["bench", "--suite", suite, "--device", "cuda", "--peer-cmd", "draw"]) == 75
    assert set(seen) == {"cuda"}


def test_results_have_a_folder_of_the_machine(tmp_path, monkeypatch):
    (case, *_) = cases.quick()
    made = report([row("tintype onnxruntime fp32", 1.0, ours=True)], case=case.name)
    monkeypatch.setattr(Campaign, "run", lambda self, kept, resume: made)
    monkeypatch.setattr("tintype_bench.nvml.describe", lambda: {"gpu": "NVIDIA H200"})
    assert main(["bench", "--results", str(tmp_path)]) == 0
    written = {path.name for path in (tmp_path / "h200").iterdir()}
    assert written == {"quick.json", "quick.html", "quick.md"}
    named = {
        (True, True): "cpu-8core",
        (False, True): "cpu-8core-without-bf16",
        (False, False): "cpu-8core-without-vnni",
    }
    for (bf16, vnni), name in named.items():
        assert machine_name({"cores": 8, "cpu_bf16": bf16, "cpu_vnni": vnni}) == name
    assert json.loads((tmp_path / "h200" / "quick.json").read_text()) == made


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--rounds", "0"], "--rounds 0"),
        (["--resume"], "--json"),
        (["--suite", "cold", "--report", "page.html"], "cold prints its table"),
        (["--suite", "quick", "--only", "sd9"], "leave no case of quick"),
    ],
)
def test_a_bad_argument_says_what_to_do(arguments, said, capsys):
    assert main(["bench", *arguments]) == 2
    assert said in capsys.readouterr().err
