"""`tintype bench`: time models beside what a user would pick instead, and report it."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from tintype.commands.output import require_writable
from tintype.errors import RequestError, TintypeError

SUITES = ("quick", "cpu", "gpu", "scale", "kernels", "cold")
_STOPPED = 75  # sysexits' "temporary failure": run again to go on
_EPILOG = """suites: quick, cpu, gpu and scale time cases; kernels every op by itself; cold from process start to PNG.
With models and no suite, each model is timed at its own settings. A status of 75 says that --time-limit came first;
1 of --compare, that something became slower."""


def register(subparsers: Any) -> None:
    """Add the command."""
    parser = subparsers.add_parser("bench", help="measure speed, beside others", epilog=_EPILOG)
    _arguments(parser)


def main(arguments: list[str] | None = None) -> int:
    """The command without the others, for `python -m tintype_bench`."""
    parser = argparse.ArgumentParser(prog="tintype bench", epilog=_EPILOG)
    _arguments(parser)
    options = parser.parse_args(arguments)
    try:
        return run(options)
    except (TintypeError, OSError) as error:
        if options.debug:
            raise
        print(f"tintype bench: {error}", file=sys.stderr)
        return 2 if isinstance(error, RequestError) else 1


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model",
        nargs="*",
        help="what `tintype generate -m` takes, or a shape; with a suite, its cases of these alone",
    )
    parser.add_argument("--suite", choices=SUITES, help="quick where no model is named")
    parser.add_argument(
        "--only",
        metavar="TEXT",
        help="cases alone that have this in their name, with *, ? and [...] as in a shell",
    )
    parser.add_argument(
        "--runner",
        nargs="+",
        metavar="TEXT",
        help="who has one of these in the name alone, such as 'torch graph' or diffusers, and --peer-cmd",
    )
    _add_peer_arguments(parser)
    _add_timing_arguments(parser)
    _add_report_arguments(parser)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser.set_defaults(run=run)


def _add_peer_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("peers").add_argument
    add("--peer", nargs="+", metavar="NAME", help="these alone, or none; by default the suite's")
    add(
        "--peer-cmd",
        action="append",
        default=[],
        metavar="CMD",
        help="a command that writes {output}, told {prompt} {model} {width} {height} {steps} {guidance} "
        "{seed} {latents}; one without {output} is a worker, see tintype_bench.worker",
    )


def _add_timing_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("timing").add_argument
    add("--device", choices=["cpu", "cuda"], help="cuda for the gpu suite, else cpu")
    add("--rounds", type=int, metavar="N", help="rounds of fresh processes")
    add("--runs", type=int, metavar="N", help="timed runs a round, or fresh processes of cold")
    add("--in-turn", action="store_true", help="one runner in memory at a time")
    add("--tiny", action="store_true", help="tiny forms of the shapes, to try a suite out")
    add("--time-limit", type=float, metavar="SECONDS", help="stop before it, to be gone on with")
    add("--resume", action="store_true", help="go on from what a stopped run left beside --json")
    add("--cache", type=Path, metavar="DIR", help="where made weights and exports are kept")


def _add_report_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("reports").add_argument
    add("--results", type=Path, metavar="DIR", help="write all of them into DIR/MACHINE/SUITE.*")
    add("--json", type=Path, metavar="F", help="write the figures with their conditions")
    add("--report", type=Path, metavar="F.html", help="write one page with plots and pictures")
    add("--markdown", type=Path, metavar="F.md", help="write the tables")
    add("--from-json", type=Path, metavar="F", help="report an earlier run instead of timing")
    add(
        "--compare",
        type=Path,
        nargs=2,
        metavar=("A", "B"),
        help="tell what became slower from A to B",
    )


def run(options: argparse.Namespace) -> int:
    """Measure, print, and write where asked; 1 where a comparison found a regression."""
    _check(options)
    if options.compare:
        return _compare(*options.compare)
    if options.suite == "cold":
        from tintype_bench import cold

        cold.run(options)
    elif options.suite == "kernels":
        from tintype_bench import kernels

        return kernels.run_suite(options)
    else:
        return _run_cases(options)
    return 0


def _check(options: argparse.Namespace) -> None:
    """Refuse what cannot be done before the work starts."""
    from tintype_bench.runners.command import check_template

    for command in options.peer_cmd:
        check_template(command)
    if options.results:
        _place_results(options)
    for name in ("runs", "rounds"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise RequestError(f"--{name} {value} is not at least 1")
    if options.resume and options.json is None:
        raise RequestError(
            "--resume goes on from what lies beside a report; name it with --json or --results"
        )
    if _suite(options) in ("cold", "kernels") and (options.report or options.markdown):
        raise RequestError(
            f"--report and --markdown are made of suites of cases; {options.suite} prints its table and has --json"
        )
    for target in (options.json, options.report, options.markdown):
        if target is not None:  # tried before the work starts
            target.parent.mkdir(parents=True, exist_ok=True)
            require_writable(target)


def _place_results(options: argparse.Namespace) -> None:
    """The reports' usual places: a folder a machine, named after its GPU or its cores."""
    from tintype_bench.conditions import conditions, machine_name

    stem = options.results / machine_name(conditions()) / _suite(options)
    options.json = options.json or stem.with_suffix(".json")
    if options.suite not in ("cold", "kernels"):
        options.report = options.report or stem.with_suffix(".html")
        options.markdown = options.markdown or stem.with_suffix(".md")


def _suite(options: argparse.Namespace) -> str:
    return options.suite or ("models" if options.model else "quick")


def _run_cases(options: argparse.Namespace) -> int:
    from tintype_bench import markdown
    from tintype_bench.campaign import Unfinished, default_progress, write_json

    if options.from_json:
        report = read_report(options.from_json)
    else:
        try:
            report = _campaign(options).run(default_progress(options.json), resume=options.resume)
        except Unfinished as stopped:
            print(f"tintype bench: {stopped}", file=sys.stderr)
            return _STOPPED
    print(markdown.tables(report), end="")
    if options.json:
        write_json(report, options.json)
    if options.markdown:
        options.markdown.write_text(markdown.tables(report), encoding="utf-8")
    if options.report:
        from tintype_bench.html import page

        options.report.write_text(page(report), encoding="utf-8")
    return 0


def _campaign(options: argparse.Namespace) -> Any:
    from tintype_bench.campaign import Campaign
    from tintype_bench.cases import PLANS
    from tintype_bench.measure import Plan
    from tintype_bench.sources import Sources, default_folder

    suite = _suite(options)
    device = options.device or ("cuda" if suite == "gpu" else "cpu")
    cases = list(_cases(options, suite, device))
    if not cases:
        raise RequestError(
            f"--only {options.only!r} and the models named leave no case of {suite}; run it without them"
        )
    usual = PLANS.get(suite, Plan())
    plan = Plan(options.rounds or usual.rounds, options.runs or usual.runs, options.in_turn)
    folder = (options.cache or default_folder()).absolute()
    sources = Sources(folder, tiny=options.tiny, draw_on=device)
    return Campaign(suite, cases, sources, plan, device, options.time_limit)


def _cases(options: argparse.Namespace, suite: str, device: str) -> Iterable[Any]:
    from tintype_bench import cases
    from tintype_bench.conditions import computes_bf16

    bf16 = computes_bf16(device)
    if not bf16:
        print("this CPU does not compute in bfloat16; float32 stands in its place", file=sys.stderr)
    found: Iterable[Any]
    if suite == "models":
        found = [_model_case(model) for model in options.model]
    else:
        found = cases.gpu(device) if suite == "gpu" else cases.CASES[suite]()
    named = options.model if suite != "models" else ()
    for case in found:
        if named and case.model not in named:
            continue
        small = cases.tiny(case) if options.tiny else case
        if options.only is None or fnmatchcase(small.name, f"*{options.only}*"):
            chosen = cases.chosen_peers(small, options.peer, options.peer_cmd)
            chosen = cases.chosen_runners(chosen, options.runner)
            placed = cases.on_device(chosen, device)
            yield placed if bf16 else cases.without_bf16(placed)


def _model_case(model: str) -> Any:
    """A model at its own settings."""
    from tintype.bundle import is_bundle, open_bundle
    from tintype.loading import open_source, resolve
    from tintype_bench import cases
    from tintype_bench.shapes import SHAPES

    if model in SHAPES:
        return cases.of_shape(model)
    path = resolve(model)
    if is_bundle(path):
        return cases.of_model(model, open_bundle(path).defaults, bundle=True)
    return cases.of_model(model, open_source(path).defaults, bundle=False)


def read_report(path: Path) -> dict[str, Any]:
    """An earlier run's JSON; RequestError where it is something else."""
    from tintype_bench.campaign import FORMAT

    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RequestError(f"{path} is not a report of tintype bench --json: {error}") from error
    parts = {"suite", "conditions", "cases"}
    whole = isinstance(report, dict) and report.keys() >= parts
    if not whole or report.get("format") != FORMAT:
        raise RequestError(
            f"{path} is no report of cases in form {FORMAT}, which this version reads; run the suite again"
        )
    return dict(report)


def _compare(first: Path, second: Path) -> int:
    from tintype_bench.comparison import compare, other_conditions

    before, after = read_report(first), read_report(second)
    found = compare(before, after)
    if differ := other_conditions(before, after):
        print(differ)
    print("\n".join(each.line() for each in found))
    regressed = sum(each.regressed for each in found)
    print(f"{regressed} of {len(found)} rows regressed beyond noise")
    return 1 if regressed else 0
