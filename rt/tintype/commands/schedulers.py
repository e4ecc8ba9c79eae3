"""`tintype schedulers`: lists the sampling methods, or compares them on a model in one labelled picture."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tintype.commands.output import Progress, require_png, require_writable, write_whole
from tintype.errors import BackendUnavailable, RequestError
from tintype.loading import resolve

if TYPE_CHECKING:
    from tintype.comparison import Comparison, Judge
    from tintype.pipeline import Pipeline

_PROMPT_SEED = 5
_PROMPT = "a red lighthouse on a rocky coast at dusk"


def register(subparsers: Any) -> None:
    """Add the command."""
    from tintype.cli import add_common

    parser = subparsers.add_parser("schedulers", help="list the sampling methods, or compare them")
    parser.add_argument("--compare", metavar="MODEL", help="what `tintype generate -m` takes")
    parser.add_argument(
        "-o", "--output", type=Path, help="PNG file of the comparison; its figures go beside it"
    )
    parser.add_argument("--prompt", default=_PROMPT)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--guidance", type=float, help="by default the model's own")
    parser.add_argument(
        "--scheduler", nargs="+", metavar="NAME", help="by default all that sample the model"
    )
    parser.add_argument("--steps", nargs="+", type=int, default=[5, 10, 20, 50], metavar="N")
    parser.add_argument(
        "--reference", type=int, default=1000, metavar="N", help="steps of the reference"
    )
    parser.add_argument(
        "--prompts",
        type=int,
        default=0,
        metavar="N",
        help="also measure prompt accuracy on this many held-out prompts (models in the box)",
    )
    parser.add_argument("--backend", default="auto", help="see `tintype inspect`")
    add_common(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Print the names, or make the comparison."""
    import tintype

    if options.compare is None:
        if options.output is not None:
            raise RequestError("-o is where a comparison goes; name its model with --compare")
        names = tintype.schedulers()
        print(json.dumps({"schedulers": names}) if options.json else "\n".join(names))
        return
    if options.output is None:
        raise RequestError("--compare draws a picture; name its file with -o")
    beside = options.output.with_suffix(".json")
    if beside == options.output:
        raise RequestError(f"{beside} is where the figures go; name a PNG file with -o")
    require_png(options.output)
    require_writable(options.output)
    made = _compare(options)
    figures = made.figures()
    grid = made.grid()
    write_whole(options.output, lambda stream: grid.save(stream, format="PNG"))
    text = json.dumps(figures, indent=1) + "\n"
    write_whole(beside, lambda stream: stream.write(text.encode()))
    print(json.dumps(figures) if options.json else f"{options.output} (figures in {beside})")


def _compare(options: argparse.Namespace) -> Comparison:
    import tintype
    from tintype.comparison import compare

    pipeline = tintype.load(options.compare, backend=options.backend)
    progress = Progress()
    try:
        return compare(
            pipeline,
            options.prompt,
            seed=options.seed,
            guidance_scale=options.guidance,
            schedulers=options.scheduler,
            steps=options.steps,
            reference_steps=options.reference,
            on_step=progress,
            judge=_judge(pipeline, options),
        )
    finally:
        progress.close()


def _judge(pipeline: Pipeline, options: argparse.Namespace) -> Judge | None:
    """What measures prompt accuracy, where that was asked for."""
    if options.prompts == 0:
        return None
    folder = resolve(options.compare) / "judge"
    if options.prompts < 0 or not folder.is_dir():
        raise RequestError(
            f"--prompts {options.prompts} counts prompts for a judge to read; it takes at least 0, and "
            "a model with a judge beside it, such as postcard"
        )
    try:
        from tintype.training.postcard.evaluate import prompt_accuracy, prompts
        from tintype.training.postcard.judge import load_judge
    except ImportError as error:
        raise BackendUnavailable("--prompts needs torch; pip install 'tintype[torch]'") from error
    reader, asked = load_judge(folder), prompts(options.prompts, _PROMPT_SEED, held_out=True)

    def judge(scheduler: str, steps: int, guidance_scale: Any) -> float:
        read = prompt_accuracy(
            pipeline,
            reader,
            asked,
            scheduler=scheduler,
            num_inference_steps=steps,
            guidance_scale=guidance_scale,
        )
        return read["overall"]

    return judge
