"""What a picture takes of a GPU's memory at each setting of `load`, beside what `tintype inspect --memory` predicts.

`python -m tintype_bench.memory_ladder sd3-medium flux1-dev --json F`: random weights in the published shapes, one step
at the model's own size. Each setting is a process of its own; one that is in F is left alone, so that a run that was
stopped goes on. A CPU has no such counter, and its rows have a prediction alone.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

from tintype_bench.cases import Case
from tintype_bench.conditions import conditions
from tintype_bench.shapes import SHAPES
from tintype_bench.sources import Sources, apart, default_folder
from tintype_bench.work import PROMPT
from tintype_kernels.cache import replace_text

Setting = dict[str, Any]
_DTYPES = ("bfloat16", "int8", "int4")
_KEY = ("model", "dtype", "offload", "vae_tiling")


def main() -> None:
    """Predict and measure, and write each row as it comes."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", nargs="+", choices=sorted(SHAPES))
    parser.add_argument("--dtype", nargs="+", choices=_DTYPES, default=_DTYPES)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="few narrow layers, to try this out")
    parser.add_argument("--json", type=Path, required=True, metavar="F")
    parser.add_argument("--cache", type=Path, default=default_folder(), metavar="DIR")
    options = parser.parse_args()
    rows = json.loads(options.json.read_text())["rows"] if options.json.is_file() else []
    known = {tuple(row[name] for name in _KEY) for row in rows}
    for row in _rows(options, known):
        print(_line(row), flush=True)
        rows.append(row)
        report = {"conditions": conditions(), "rows": rows}
        replace_text(options.json, json.dumps(report, indent=1) + "\n")


def _rows(options: argparse.Namespace, known: set[tuple[Any, ...]]) -> Iterator[dict[str, Any]]:
    from tintype.memory import settings

    sources = Sources(options.cache.absolute(), tiny=options.tiny, draw_on=options.device)
    for model in options.model:
        checkpoint = sources.work(Case(model, 0, 0, 1, 1, 1.0, ())).checkpoint
        for dtype, setting in product(options.dtype, settings()):
            asked = {
                "dtype": dtype,
                "offload": setting["offload"],
                "vae_tiling": setting["vae_tiling"],
            }
            if (model, *asked.values()) not in known:
                found = apart(_outcome, checkpoint, options.device, asked)
                yield {"model": model, **asked, **found}


def _outcome(checkpoint: str, device: str, asked: Setting) -> dict[str, Any]:
    """Predicted and measured bytes; an error of the measurement, such as too little memory, is told in its place."""
    from tintype.errors import TintypeError
    from tintype.loading import open_source
    from tintype.memory import predict

    predicted = predict(open_source(Path(checkpoint)), **asked)["peak"]
    if device == "cpu":
        return {"predicted": predicted, "measured": None}
    try:
        return {"predicted": predicted, "measured": _measured(checkpoint, device, asked)}
    except (TintypeError, RuntimeError) as error:
        reason = str(error).splitlines()[0][:200]
        return {"predicted": predicted, "measured": None, "error": reason}


def _measured(checkpoint: str, device: str, asked: Setting) -> int:
    """The most bytes that torch's allocator gave out on the device during a picture, the second: weights are there."""
    import torch

    import tintype

    pipe = tintype.load(checkpoint, backend="torch", device=device, **asked)
    for _ in range(2):
        torch.cuda.reset_peak_memory_stats(device)
        pipe(PROMPT, num_inference_steps=1, seed=0, output_type="np")
    return int(torch.cuda.max_memory_allocated(device))


def _line(row: dict[str, Any]) -> str:
    told = f"predicted {row['predicted'] / 1e9:.2f} GB"
    if (measured := row["measured"]) is not None:
        told += f", measured {measured / 1e9:.2f} GB ({measured / row['predicted'] - 1:+.1%})"
    setting = " ".join(f"{name}={row[name]}" for name in _KEY[1:])
    return f"{row['model']} {setting}: {told}{'; ' + row['error'] if 'error' in row else ''}"


if __name__ == "__main__":
    main()
