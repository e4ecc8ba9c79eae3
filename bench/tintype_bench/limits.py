"""How far a row is from what the machine could do at best, and which stages lose most."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from tintype.checkpoints import Checkpoint, open_checkpoint
from tintype_bench.work import Work

_MOST_LOSSES = 3
# unCLIP's small stages, in whose time a pipeline counts them.
_TIMED_AS = {"embed": "prior", "project": "denoise", "enlarge_last": "enlarge"}


@dataclass(frozen=True)
class Limit:
    """The least seconds of each stage of a work, and the FLOPs and bytes of all of it."""

    floor: dict[str, float]
    flops: float
    bytes: float


def limit(work: Work, precision: str, ceilings: Mapping[str, Any]) -> Limit | None:
    """Every product at the machine's own measured best; None where there is no checkpoint to count.

    A prompt is encoded once for all its pictures, and the empty one may be remembered; of a step's work what is the
    same at every step is done once.
    """
    if not work.checkpoint:
        return None
    from tintype_bench.counts import BYTES, Ceilings, floor_seconds

    best = Ceilings(ceilings["flops"], ceilings["bandwidth"])
    floor: dict[str, float] = {}
    flops = moved = 0.0
    checkpoint = open_checkpoint(Path(work.checkpoint))
    for name, (products, remembered) in _products(work, checkpoint).items():
        if (times := _times(work, name, checkpoint.defaults)) == 0:
            continue
        stage = "encode" if name.startswith("encode") else _TIMED_AS.get(name, name)
        for counted, often in ((products, times), (remembered, 1 - times)):
            seconds = floor_seconds(counted, best, precision) * often
            floor[stage] = floor.get(stage, 0.0) + seconds
            flops += often * sum(each.flops for each in counted)
            moved += often * sum(each.values for each in counted) * BYTES[precision]
    return Limit(floor, flops, moved)


def losses(
    shares: Mapping[str, float], floor: Mapping[str, float], seconds: float
) -> list[dict[str, Any]]:
    """The stages that take longest beyond their floor, most first; "other" is what lies between them.

    `shares` are the stages' parts of one run that was watched, {} of a component, which is one stage.
    """
    whole = dict(shares) or {"denoise": 1.0}
    whole["other"] = max(0.0, 1 - sum(whole.values()))
    measured = {name: share * seconds for name, share in whole.items()}
    lost = {name: taken - floor.get(name, 0.0) for name, taken in measured.items()}
    ranked = sorted(lost, key=lambda name: -lost[name])[:_MOST_LOSSES]
    return [
        {"stage": name, "seconds": lost[name], "share": lost[name] / seconds}
        for name in ranked
        if lost[name] > 0
    ]


def _times(work: Work, stage: str, defaults: Mapping[str, Any]) -> int:
    """How often a stage runs; what is counted for all rows once a step, what for one of them once a picture."""
    if work.component:
        return int(stage == work.component)
    times = {"denoise": work.steps, "prior": defaults.get("prior_num_inference_steps", 0)}
    times |= dict.fromkeys(("decode", "embed", "project", "enlarge_last"), work.batch)
    times["enlarge"] = work.batch * (defaults.get("super_res_num_inference_steps", 1) - 1)
    return int(times.get(stage, 1))


def _products(work: Work, checkpoint: Checkpoint) -> dict[str, Any]:
    # FLUX is told its guidance; the others run a second row for it.
    guided = work.guidance > 1 and checkpoint.family != "flux" and not work.component
    rows = work.batch * (2 if guided else 1)
    return _counted(work.checkpoint, work.width, work.height, rows)


@lru_cache(maxsize=64)
def _counted(checkpoint: str, width: int, height: int, rows: int) -> dict[str, Any]:
    from tintype_bench.counts import stage_products

    return stage_products(open_checkpoint(Path(checkpoint)), width, height, rows)
