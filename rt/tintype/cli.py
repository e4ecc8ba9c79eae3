"""The one command: `tintype generate`, `inspect`, `schedulers`, `serve`, and what other packages add by entry point."""

from __future__ import annotations

import argparse
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import tintype
from tintype.errors import ProfileError, RequestError, TintypeError
from tintype_kernels import KernelUnavailable

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

GROUP = "tintype.commands"
DONE, FAILED, BAD_USAGE = 0, 1, 2

Subparsers = Any  # argparse keeps the class private


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status: 0 done, 1 failed, 2 bad usage."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    if hasattr(sys.stdout, "reconfigure"):  # a file's name may have letters that the terminal lacks
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning  # type: ignore[assignment]
            options = _parser(arguments).parse_args(arguments)
            run: Callable[[argparse.Namespace], int | None] = options.run
            return run(options) or DONE
    except SystemExit as leave:  # argparse has printed why
        return leave.code if isinstance(leave.code, int) else FAILED
    except KeyboardInterrupt:
        print("tintype: interrupted", file=sys.stderr, flush=True)
        if argv is None:
            # A thread that makes an engine's session would not survive the interpreter's end.
            os._exit(FAILED)
        return FAILED
    except (TintypeError, KernelUnavailable, OSError) as error:
        if debug:
            traceback.print_exc()
        else:
            print(f"tintype: {error}", file=sys.stderr)
        return BAD_USAGE if isinstance(error, (RequestError, ProfileError)) else FAILED


def add_common(parser: argparse.ArgumentParser) -> None:
    """The flags of every command."""
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object on stdout and nothing else"
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")


def _show_warning(message: Warning | str, *_: Any) -> None:
    """A warning is one line for a user, without the source line that raised it."""
    print(f"tintype: warning: {message}", file=sys.stderr)


def _parser(arguments: Sequence[str]) -> argparse.ArgumentParser:
    from tintype.commands import generate, inspect, schedulers, serve

    parser = argparse.ArgumentParser(prog="tintype", description=tintype.__doc__)
    parser.add_argument("--version", action="version", version=f"tintype {tintype.__version__}")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    generate.register(subparsers)
    inspect.register(subparsers)
    schedulers.register(subparsers)
    serve.register(subparsers)
    # Looking other packages up costs time, so only a command that is not ours does it.
    if not arguments or arguments[0] not in subparsers.choices:
        _register_plugins(subparsers, arguments[0] if arguments else "")
    return parser


def _register_plugins(subparsers: Subparsers, wanted: str) -> None:
    from importlib.metadata import entry_points

    plugins = list(entry_points(group=GROUP))
    named = [plugin for plugin in plugins if plugin.name == wanted]
    for plugin in named or plugins:
        try:
            plugin.load()(subparsers)
        except ImportError as error:
            _register_absent(subparsers, plugin, error)


def _register_absent(subparsers: Subparsers, plugin: EntryPoint, error: ImportError) -> None:
    """A command whose packages are missing still shows up, and says what to install."""
    mend = f'pip install "tintype[{plugin.name}]"'
    reason = error.name or str(error)

    def run(options: argparse.Namespace) -> int:
        print(
            f"tintype: {plugin.name} needs {reason}, which is absent; install it with: {mend}",
            file=sys.stderr,
        )
        return FAILED

    # No character begins an option here, so that whatever follows the command is taken and explained.
    parser = subparsers.add_parser(
        plugin.name, help=f"not installed: {mend}", add_help=False, prefix_chars="\0"
    )
    parser.add_argument("rest", nargs=argparse.REMAINDER)
    parser.set_defaults(run=run)


if __name__ == "__main__":
    sys.exit(main())
