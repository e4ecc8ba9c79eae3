"""What is slow to make: once, by whoever asks first, and never left half made or waited for in vain."""

from __future__ import annotations

import subprocess
import sys
import threading
import time

import pytest

from tintype.backends.compiled import Compiled

ENDS_AT_ONCE = """
import time
from tintype.backends.compiled import Compiled

class Holder:
    def __init__(self):
        self.things = Compiled(self.make)

    def make(self, key):
        time.sleep(0.2)
        print(key, flush=True)

holder = Holder()
holder.things.begin("made")
"""
# Sessions take half a second to make, so this leaves in the midst of it.
PREPARES_AND_ENDS = """
import tintype
tintype.load("postcard").prepare("a red boat")
"""


class Maker:
    """Makes 7 of anything, but for what is `raised` first."""

    def __init__(self, *raised):
        self.raised, self.made = list(raised), []
        self.things = Compiled(self.make)

    def make(self, key):
        self.made.append(key)
        if self.raised:
            time.sleep(0.2)  # whoever asks meanwhile waits for it
            raise self.raised.pop(0)
        return 7


def ended(script):
    return subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False
    )


def test_an_interpreter_that_ends_waits_for_what_was_begun():
    done = ended(ENDS_AT_ONCE)
    assert (done.returncode, done.stdout, done.stderr) == (0, "made\n", "")


def test_a_process_may_end_while_sessions_are_made():
    done = ended(PREPARES_AND_ENDS)
    assert (done.returncode, done.stderr) == (0, "")


def test_it_is_made_once():
    maker = Maker()
    maker.things.begin("a")
    maker.things.begin("a")
    assert [maker.things.get("a"), maker.things.get("a")] == [7, 7]
    assert maker.made == ["a"]


def test_an_error_in_the_thread_reaches_who_asks_and_is_tried_again():
    maker = Maker(ValueError("no"))
    maker.things.begin("a")
    with pytest.raises(ValueError, match="no"):
        maker.things.get("a")
    assert maker.things.get("a") == 7


@pytest.mark.parametrize("leaving", [KeyboardInterrupt, SystemExit])
def test_what_ends_a_thread_leaves_nobody_waiting(leaving):
    maker = Maker(leaving())
    maker.things.begin("a")
    with pytest.raises(leaving):
        maker.things.get("a")
    assert maker.things.get("a") == 7


def test_an_interrupted_making_is_no_hindrance_to_the_next():
    maker = Maker(KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        maker.things.get("a")
    found = []
    threading.Thread(target=lambda: found.append(maker.things.get("a")), daemon=True).start()
    for _ in range(100):
        if found:
            break
        time.sleep(0.05)
    assert found == [7]


def test_where_no_thread_can_be_had_it_is_made_at_once(monkeypatch):
    def refuse(thread):
        raise RuntimeError("can't start new thread")

    maker = Maker()
    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", refuse)
        maker.things.begin("a")
    assert maker.made == ["a"]
    assert maker.things.get("a") == 7
