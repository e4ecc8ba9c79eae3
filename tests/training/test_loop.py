"""The training loop: resumable, averaged, and with the optimisers that the configuration names."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace

import pytest
import torch
from torch import nn

from tintype.errors import TintypeError
from tintype.training.loop import FitConfig, fit, generator
from tintype.training.muon import orthogonalise

CONFIG = FitConfig(
    steps=12,
    batch_size=4,
    learning_rate=1e-2,
    matrix_rate=1e-2,
    warmup=3,
    log_every=1,
    checkpoint_every=5,
)


def _model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 3))


def _loss(model: nn.Module):
    def batch_loss(step: int) -> dict[str, torch.Tensor]:
        x = torch.randn(8, 40, generator=generator(0, step))
        return {"loss": (model(x) - x[:, :3]).square().mean()}

    return batch_loss


class _Interrupted(Exception):
    pass


def _interrupted(folder, at: int) -> None:
    """A run of ``CONFIG`` that was killed before step ``at``."""
    model = _model()
    steps = _loss(model)

    def until(step: int) -> dict[str, torch.Tensor]:
        if step == at:
            raise _Interrupted
        return steps(step)

    with pytest.raises(_Interrupted):
        fit(model, until, CONFIG, folder)


def _resumed(folder, config: FitConfig = CONFIG) -> nn.Sequential:
    model = _model()
    fit(model, _loss(model), config, folder)
    return model


def _logged(folder) -> list[int]:
    return [json.loads(line)["step"] for line in (folder / "log.jsonl").read_text().splitlines()]


def test_a_resumed_run_ends_in_the_weights_of_an_uninterrupted_one(tmp_path):
    whole = _model()
    fit(whole, _loss(whole), CONFIG, tmp_path / "whole")

    _interrupted(tmp_path / "broken", at=7)
    resumed = _resumed(tmp_path / "broken")

    for a, b in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"learning_rate": 0.02}, "with learning_rate=0.01, and this run asks for learning_rate=0.02;"),
        (
            {"ema_decay": 0.9, "weight_decay": 0.1},
            "with weight_decay=0.01, ema_decay=0.998, and this run asks for weight_decay=0.1, ema_decay=0.9;",
        ),
        ({"matrix_rate": None}, "with matrix_rate=0.01, and this run asks for matrix_rate=None;"),
        ({"seed": 3}, "with seed=0, and this run asks for seed=3;"),
        ({"steps": 4}, "has already gone 5 steps, and this run asks for 4;"),
    ],
)  # fmt: skip
def test_a_run_is_not_resumed_with_other_settings(tmp_path, changes, said):
    _interrupted(tmp_path, at=7)
    with pytest.raises(TintypeError) as raised:
        _resumed(tmp_path, replace(CONFIG, **changes))
    assert said in str(raised.value)
    assert "remove it to begin anew, or name another folder with --out" in str(raised.value)
    assert len(str(raised.value).splitlines()) == 1


def test_a_run_is_resumed_for_more_steps_and_with_other_notes_of_it(tmp_path):
    _interrupted(tmp_path, at=7)
    _resumed(tmp_path, replace(CONFIG, steps=14, log_every=2, checkpoint_every=3))
    assert _logged(tmp_path)[-1] == 14


def test_a_state_from_before_a_setting_was_there_is_resumed(tmp_path):
    _interrupted(tmp_path, at=7)
    state = torch.load(tmp_path / "state.pt")
    del state["config"]["clip_norm"]
    torch.save(state, tmp_path / "state.pt")
    _resumed(tmp_path)
    assert _logged(tmp_path)[-1] == 12


@pytest.mark.parametrize(("at", "cut"), [(7, ""), (3, ""), (7, '{"step": 8, "sec')])
def test_the_log_of_a_resumed_run_has_every_step_once(tmp_path, at, cut):
    """Killed behind its last state, before its first one, and while it wrote a row."""
    _interrupted(tmp_path, at)
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write(cut)
    _resumed(tmp_path)
    assert _logged(tmp_path) == list(range(1, 13))


@pytest.mark.parametrize("damage", ["cut", "empty", "other", "wider"])
def test_a_state_that_is_damaged_or_another_models_is_named(tmp_path, damage):
    model = _model()
    fit(model, _loss(model), CONFIG, tmp_path)
    path = tmp_path / "state.pt"
    if damage == "other":
        torch.save({"step": 1}, path)
    elif damage != "wider":
        path.write_bytes(path.read_bytes()[: 1000 * (damage == "cut")])
    again = nn.Sequential(nn.Linear(40, 50), nn.ReLU(), nn.Linear(50, 3))
    again = again if damage == "wider" else _model()
    with pytest.raises(TintypeError, match="state.pt is damaged, or the state of another training"):
        fit(again, _loss(again), CONFIG, tmp_path)


def test_two_trainings_do_not_share_a_folder(tmp_path):
    fcntl = pytest.importorskip("fcntl")
    model = _model()
    with (tmp_path / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # as the other holds it
        with pytest.raises(TintypeError, match="another training writes to"):
            fit(model, _loss(model), CONFIG, tmp_path)
    fit(model, _loss(model), CONFIG, tmp_path)


def test_the_log_has_a_row_a_step_and_the_loss_falls(tmp_path):
    model = _model()
    fit(model, _loss(model), CONFIG, tmp_path)
    assert _logged(tmp_path) == list(range(1, 13))
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert rows[-1]["loss"] < rows[0]["loss"]


def test_the_rate_rises_holds_and_falls_to_nothing():
    config = FitConfig(steps=100, batch_size=1, learning_rate=1.0, warmup=10, cooldown=0.5)
    paces = [config.pace(step) for step in range(100)]
    assert paces[0] == pytest.approx(0.1)
    assert paces[10:50] == [1.0] * 40
    assert all(b < a for a, b in itertools.pairwise(paces[50:]))
    assert paces[-1] == pytest.approx(1 / 50)


@pytest.mark.parametrize("shape", [(48, 48), (32, 96), (96, 32)])
def test_orthogonalise_keeps_singular_vectors_and_levels_singular_values(shape):
    generator = torch.Generator().manual_seed(1)
    matrix = torch.randn(*shape, generator=generator, dtype=torch.float64)
    u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
    rotated = u.T @ orthogonalise(matrix) @ vh.T
    values = rotated.diagonal()
    assert (rotated - torch.diag(values)).abs().max() < 1e-9
    # The source's coefficients promise about 0.7 to 1.2 except for the smallest singular values.
    assert values.max() < 1.3
    assert values.median() > 0.65
