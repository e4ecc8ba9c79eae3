"""Pseudo numerical methods (Liu et al., ICLR 2022): a linear multistep on the noise, begun by one of two ways."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from tintype.errors import CheckpointError
from tintype.schedulers.config import Plan, ScheduleConfig
from tintype.schedulers.ddim import final_alpha
from tintype.schedulers.grids import training_steps
from tintype.schedulers.table import Float64, Table

# Which outputs each of the four evaluations of Runge and Kutta's step moves by: age -> weight.
_RUNGE_KUTTA: tuple[dict[int, float], ...] = (
    {0: 1.0},
    {0: 1.0},
    {0: 1.0},
    {3: 1 / 6, 2: 1 / 3, 1: 1 / 3, 0: 1 / 6},
)
# Adams and Bashforth's weights by order, newest first.
_ADAMS = {
    2: (3 / 2, -1 / 2),
    3: (23 / 12, -16 / 12, 5 / 12),
    4: (55 / 24, -59 / 24, 37 / 24, -9 / 24),
}


@dataclass(frozen=True)
class _Move:
    """One evaluation: the model is told `told`; x moves from training step `begin` to `end`.

    `weights` maps the age of an output to its weight. `again`: it begins where the last move began.
    """

    told: int
    begin: int
    end: int
    weights: dict[int, float]
    again: bool = False


def pndm(config: ScheduleConfig, plan: Plan) -> Table:
    """h keeps the model's plain output.

    An edit begins within the list of all evaluations, as published, and there with the first of the method's moves: it
    ends with a little noise left, as other libraries' edits by this method do.
    """
    if config.prediction_type not in ("epsilon", "v_prediction"):
        raise CheckpointError(
            f"scheduler config: pndm takes prediction_type epsilon or v_prediction, not {config.prediction_type}"
        )
    times = training_steps(config, plan.steps, "leading").tolist()
    stride = config.num_train_timesteps // plan.steps
    # Runge and Kutta's beginning takes four points; with fewer there is no room for it.
    if config.skip_prk_steps or len(times) < 4:
        moves = _multistep_moves([*times[:2], *times[1:]][plan.start :], stride)
    else:
        moves = _runge_kutta_moves(times, stride, plan.start)
    alphas = config.alphas_cumprod()
    final = final_alpha(config, alphas, default=False)
    told = np.array([move.told for move in moves])
    a, b = _coefficients(config.prediction_type, moves, alphas, final)
    every = np.append(alphas[told], final)
    return Table(
        name="pndm",
        timesteps=told.astype(np.float64),
        c_in=np.ones(len(told)),
        u_x=np.zeros(len(told)),
        u_m=np.ones(len(told)),
        a=a,
        b=b,
        signal=np.sqrt(every),
        noise=np.sqrt(1 - every),
    )


def _multistep_moves(told: Sequence[int], stride: int) -> list[_Move]:
    """The first step is taken twice, the second time with the mean of the outputs at its two ends."""
    first, rest = told[0], told[1:]
    moves = [_Move(first, first, first - stride, {0: 1.0})]
    if rest:
        moves.append(_Move(rest[0], rest[0] + stride, rest[0], {0: 0.5, 1: 0.5}, again=True))
    kept = [0]
    for time in rest[1:]:
        kept.append(len(moves))
        moves.append(_Move(time, time, time - stride, _adams(kept)))
    return moves


def _runge_kutta_moves(times: Sequence[int], stride: int, start: int) -> list[_Move]:
    """Three steps by the classical fourth-order method, then the multistep on the outputs at their beginnings.

    Where the list of evaluations is cut at `start`, its moves begin where the whole list's do.
    """
    half = stride // 2
    beginning = [
        time for begin, end in pairwise(times[:4]) for time in (begin, end + half, end + half, end)
    ]
    told = [*beginning, *times[3:]][start:]
    moves: list[_Move] = []
    for index, time in enumerate(told[: len(beginning)]):
        phase = index % len(_RUNGE_KUTTA)
        begin, end = beginning[index - phase], time - (0 if phase % 2 else half)
        moves.append(_Move(time, begin, end, _RUNGE_KUTTA[phase], again=phase > 0))
    kept = [*range(0, len(moves), len(_RUNGE_KUTTA))]
    for time in told[len(beginning) :]:
        kept.append(len(moves))
        moves.append(_Move(time, time, time - stride, _adams(kept)))
    return moves


def _adams(kept: Sequence[int]) -> dict[int, float]:
    """Age -> weight of the last four outputs kept, of which the newest is this one."""
    newest_first = kept[: -len(_ADAMS) - 2 : -1]
    weights = _ADAMS[len(newest_first)]
    return {kept[-1] - index: w for index, w in zip(newest_first, weights, strict=True)}


def _coefficients(
    prediction: str, moves: Sequence[_Move], alphas: Float64, final: float
) -> tuple[Float64, Float64]:
    """(a [n], b [n, history]). A move that begins where the last one began first undoes it."""
    oldest = max(age for move in moves for age in move.weights)
    a, b = np.empty(len(moves)), np.zeros((len(moves), oldest + 2))
    before: tuple[float, Float64] = (1.0, np.zeros(oldest + 2))
    for i, move in enumerate(moves):
        keep, gain = _transfer(prediction, *_shares(move, alphas, final))
        weights = np.zeros(oldest + 2)
        weights[list(move.weights)] = [-gain * weight for weight in move.weights.values()]
        a[i], b[i] = keep, weights
        if move.again:
            a[i] /= before[0]
            b[i, 1:] -= a[i] * before[1][:-1]
        before = keep, weights
    return a, b


def _shares(move: _Move, alphas: Float64, final: float) -> tuple[float, float]:
    begin = alphas[min(move.begin, len(alphas) - 1)]
    return float(begin), float(alphas[move.end]) if move.end >= 0 else final


def _transfer(prediction: str, now: float, then: float) -> tuple[float, float]:
    """x -> keep*x - gain*output, where the output stands for the noise (equation 11 of the paper)."""
    keep = np.sqrt(then / now)
    gain = (then - now) / (now * np.sqrt(1 - then) + np.sqrt(now * (1 - now) * then))
    if prediction == "v_prediction":  # noise = sqrt(now)*v + sqrt(1 - now)*x
        return keep - gain * np.sqrt(1 - now), gain * np.sqrt(now)
    return keep, gain
