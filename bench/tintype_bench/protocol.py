"""The other end of a worker: starts its process, asks, and says what went wrong."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from tintype.errors import TintypeError
from tintype_bench.runners import Pictures
from tintype_bench.work import Runner, Work, as_json

_LAST_LINES = 3
_QUIT_SECONDS = 20


class WorkerFailed(TintypeError):
    """A worker that answered with an error or died; the message is its own."""


class WorkerProcess:
    """A loaded worker, idle between questions. Its messages go to a file that is read only where it dies."""

    def __init__(self, runner: Runner) -> None:
        self.runner = runner
        self._log = tempfile.TemporaryFile(mode="w+", encoding="utf-8", errors="replace")  # noqa: SIM115
        self._process = subprocess.Popen(
            _command(runner),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
        )

    def load(self, work: Work) -> dict[str, Any]:
        """Load and run once; seconds of both."""
        return self.ask("load", **as_json(work, self.runner))

    def output(self) -> Pictures:
        """What the first run made."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "output.npy"
            self.ask("output", path=str(path))
            return np.asarray(np.load(path))

    def ask(self, verb: str, **arguments: Any) -> dict[str, Any]:
        """The answer; WorkerFailed where there is none or it is an error."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            print(json.dumps({"do": verb, **arguments}), file=self._process.stdin, flush=True)
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise WorkerFailed(self._epitaph(verb))
        try:
            answer: dict[str, Any] = json.loads(line)
        except ValueError as error:
            raise WorkerFailed(f"its answer to {verb} is not JSON: {line[:200]!r}") from error
        if "error" in answer:
            raise WorkerFailed(answer["error"])
        return answer

    def close(self) -> None:
        """Ask it to leave, and end it where it does not."""
        if self._process.poll() is None:
            try:
                self._process.communicate(json.dumps({"do": "quit"}) + "\n", timeout=_QUIT_SECONDS)
            except (subprocess.TimeoutExpired, BrokenPipeError):
                self._process.kill()
                self._process.wait()
        self._log.close()

    def _epitaph(self, verb: str) -> str:
        status = self._process.wait()
        self._log.seek(0)
        last = " | ".join(self._log.read().strip().splitlines()[-_LAST_LINES:])
        killed = " (killed: out of memory?)" if status == -9 else ""
        return f"the process ended with {status}{killed} at {verb}: {last}"[:600]

    def __enter__(self) -> WorkerProcess:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _command(runner: Runner) -> list[str]:
    """Ours, or a command of the user's that speaks as ours does: one without {output}, which names no picture."""
    if runner.kind == "command" and "{output}" not in runner.command:
        return shlex.split(runner.command)
    return [sys.executable, "-m", "tintype_bench.worker"]
