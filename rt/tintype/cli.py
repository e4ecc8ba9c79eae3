"""The one command: `tintype generate`, `inspect`, `schedulers`, `serve`, and what other packages add by entry point."""

from __future__ import annotations

import argparse
import os
import select
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NoReturn

import tintype
from tintype.errors import ProfileError, RequestError, TintypeError

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint
    from types import FrameType

GROUP = "tintype.commands"
DONE, FAILED, BAD_USAGE, UNREAD = 0, 1, 2, 141

Subparsers = Any  # argparse keeps the class private


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status: 0 done, 1 failed, 2 bad usage, 141 where nobody reads on."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if hasattr(sys.stdout, "reconfigure"):  # a file's name may have letters that the terminal lacks
        sys.stdout.reconfigure(errors="backslashreplace")
    with _interruptions_noted(argv is None) as interruptions:
        try:
            return _run(arguments)
        except SystemExit as leave:  # argparse has printed why
            return leave.code if isinstance(leave.code, int) else FAILED
        except KeyboardInterrupt:
            return _interrupted(argv is None)
        except Exception as error:
            if interruptions:  # C++ makes errors of its own of one, such as an ImportError
                return _interrupted(argv is None)
            if argv is None and isinstance(error, BrokenPipeError) and _is_unread():
                return _unread()
            return _told(error, "--debug" in arguments)


def _run(arguments: list[str]) -> int:
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning  # type: ignore[assignment]
        options = _parser(arguments).parse_args(arguments)
        from tintype_kernels.dispatch import check_requested

        check_requested()
        run: Callable[[argparse.Namespace], int | None] = options.run
        status = run(options) or DONE
    print(end="", flush=True)  # whether anybody reads on shows here, or else after our last line
    return status


@contextmanager
def _interruptions_noted(ours: bool) -> Iterator[list[int]]:
    """The SIGINTs that came within, of a process that is ours; each raises KeyboardInterrupt as ever."""
    came: list[int] = []
    if not ours or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield came
        return

    def note(number: int, frame: FrameType | None) -> None:
        came.append(number)
        signal.default_int_handler(number, frame)

    signal.signal(signal.SIGINT, note)
    try:
        yield came
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _interrupted(ours: bool) -> int:
    print("tintype: interrupted", file=sys.stderr, flush=True)
    if ours:
        # Python would wait for the threads that make an engine's sessions.
        os._exit(FAILED)
    return FAILED


def _is_unread() -> bool:
    """Whether it is our output that nobody reads on, and no other pipe."""
    if not hasattr(select, "poll"):  # as on Windows, whose pipes break otherwise
        return False
    looked_at = select.poll()
    looked_at.register(sys.stdout.fileno(), 0)  # errors are told unasked
    return bool(looked_at.poll(0))


def _unread() -> int:
    """End as quietly as a command that SIGPIPE ends, and with the status that a shell gives that one."""
    # What Python still writes as it ends goes nowhere, and it does not complain.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return UNREAD


def _told(error: Exception, debug: bool) -> int:
    """Say in one line what went wrong; what nobody foresaw is raised."""
    from tintype_kernels import KernelUnavailable

    if not isinstance(error, (TintypeError, KernelUnavailable, OSError)):
        raise error
    if debug:
        traceback.print_exc()
    else:
        print(f"tintype: {error}", file=sys.stderr)
    return BAD_USAGE if isinstance(error, (RequestError, ProfileError)) else FAILED


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in a line; the whole usage is longer than what was asked."""

    def error(self, message: str) -> NoReturn:
        self.exit(BAD_USAGE, f"{self.prog}: error: {message}; see {self.prog} --help\n")


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

    parser = _Parser(prog="tintype", description=tintype.__doc__)
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
