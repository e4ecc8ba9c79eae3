"""How a command ends that cannot go on: interrupted, unread, or asked for what there is not."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

import tintype
from tintype.cli import main


def test_an_unknown_form_of_kernels_is_told_before_a_model_is_loaded(monkeypatch, capsys):
    monkeypatch.setenv("TINTYPE_KERNELS", "nope")
    monkeypatch.setattr(tintype, "load", lambda *_, **__: pytest.fail("loaded"))
    assert main(["generate", "a boat"]) == 1
    expected = "TINTYPE_KERNELS=nope is unknown; choose one of auto, triton, native, reference"
    assert capsys.readouterr().err == f"tintype: {expected}\n"


# What C++ makes of a SIGINT that comes while it imports: an error of its own, which need not say why.
INTERRUPTED = """
import os, signal, sys
import tintype
from tintype.cli import main

def load(*_, **__):
    try:
        os.kill(os.getpid(), signal.SIGINT)
    except KeyboardInterrupt:
        pass
    raise ImportError("initialization failed")

tintype.load = load
signal.signal(signal.SIGINT, signal.default_int_handler)  # which jobs in the background begin without
sys.argv = ["tintype", "generate", "a boat"]
sys.exit(main())
"""


def test_an_import_that_fails_because_of_an_interruption_is_one(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", INTERRUPTED],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (1, "tintype: interrupted\n")


def test_an_import_that_fails_by_itself_is_raised(monkeypatch):
    def load(*_, **__):
        raise ImportError("initialization failed")

    monkeypatch.setattr(tintype, "load", load)
    with pytest.raises(ImportError, match="initialization failed"):
        main(["generate", "a boat"])


@pytest.mark.skipif(os.name != "posix", reason="pipes of Windows break otherwise")
@pytest.mark.parametrize("arguments", [["inspect", "--json"], ["schedulers"]])
def test_a_reader_that_leaves_ends_a_command_quietly(arguments):
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "tintype.cli", *arguments]
    try:
        done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, check=False)
    finally:
        os.close(write)
    assert (done.returncode, done.stderr) == (141, "")
