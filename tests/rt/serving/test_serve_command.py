"""`tintype serve` as a process: its one line, its signals, and what it says where it cannot serve."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from contextlib import contextmanager

import httpx
import pytest

import tintype.serving
from served import SECONDS, until
from tintype.cli import main
from tintype.serving.server import listen


@contextmanager
def running(*flags):
    """A server in a process of its own, and what it printed when it began."""
    command = [sys.executable, "-m", "tintype.cli", "serve", "--port", "0", *flags]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        guard = threading.Timer(SECONDS, process.kill)
        guard.start()
        try:
            yield process, process.stdout.readline()
        finally:
            guard.cancel()
            process.kill()


def test_it_says_what_is_served_answers_and_a_signal_ends_its_work_and_itself(tmp_path):
    with running("--json", "--backend", "onnxruntime") as (process, line):
        told = json.loads(line)
        assert (told["model"], told["backend"]) == ("postcard", "onnxruntime")
        url = told["url"]
        assert httpx.get(f"{url}/healthz").json() == {"status": "ok"}
        answers = []
        body = {"prompt": "a", "n": 10, "num_inference_steps": 1000}  # minutes of work
        client = threading.Thread(
            target=lambda: answers.append(
                httpx.post(f"{url}/v1/images/generations", json=body, timeout=SECONDS)
            )
        )
        client.start()
        until(lambda: "tintype_jobs_running 1.0" in httpx.get(f"{url}/metrics").text)
        process.send_signal(signal.SIGTERM)
        rest, errors = process.communicate(timeout=SECONDS)
        client.join(SECONDS)
    assert (process.returncode, rest, errors) == (0, "", "")
    assert answers[0].status_code == 503
    assert "stopping" in answers[0].json()["error"]["message"]


def test_an_interrupt_ends_it_with_status_0_and_no_traceback(tiny_bundle):
    with running(str(tiny_bundle)) as (process, line):
        assert line.startswith("tiny on onnxruntime at http://127.0.0.1:")
        process.send_signal(signal.SIGINT)
        rest, errors = process.communicate(timeout=SECONDS)
    assert (process.returncode, rest, errors) == (0, "", "")


def test_a_second_signal_ends_it_without_waiting_and_without_a_traceback(tiny_bundle):
    with running("--json", str(tiny_bundle)) as (process, line):
        host = httpx.URL(json.loads(line)["url"])
        with socket.create_connection((host.host, host.port), SECONDS) as client:
            # A body that never comes: the first signal alone would wait for it.
            client.sendall(
                b"POST /v1/images/generations HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\n\r\n"
            )
            until(lambda: httpx.get(f"{host}/healthz").status_code == 200)
            process.send_signal(signal.SIGTERM)
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(1)
            process.send_signal(signal.SIGTERM)
            rest, errors = process.communicate(timeout=SECONDS)
    assert (process.returncode, rest, errors) == (0, "", "")


def refused(capsys, *flags):
    """The status of a server that does not start, and its one line."""
    status = main(["serve", *flags])
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("tintype: ")
    assert printed.err.count("\n") == 1
    return status, printed.err


def test_a_port_in_use_is_status_1_and_one_line(capsys):
    with listen("127.0.0.1", 0) as taken:
        port = str(taken.getsockname()[1])
        status, error = refused(capsys, "--port", port)
    assert status == 1
    assert (
        f"--port {port} on 127.0.0.1 cannot be had: Address already in use; choose another" in error
    )


@pytest.mark.parametrize(
    ("flags", "status", "says"),
    [
        (["--port", "70000"], 2, "--port 70000 is outside 0..65535"),
        (["--port", "-1"], 2, "--port -1 is outside 0..65535"),
        (["--port", "0", "--host", "no.such.host.invalid"], 2, "is unknown"),
        (["--port", "0", "--host", "a" * 300], 2, "is unknown"),
        (["--port", "0", "--host", "203.0.113.1"], 2, "no address of this machine"),
        (["--queue", "-1"], 2, "--queue -1 is below 0"),
        (["no-such-model", "--port", "0"], 1, "no-such-model is not a folder"),
        (["--port", "0", "--backend", "warp"], 2, "backend='warp' is unknown"),
    ],
)
def test_what_cannot_be_served_is_one_line(capsys, flags, status, says):
    found, error = refused(capsys, *flags)
    assert found == status
    assert says in error


@pytest.mark.parametrize("package", ["fastapi", "uvicorn", "prometheus_client", "python_multipart"])
def test_a_missing_package_names_the_extra(capsys, monkeypatch, package):
    monkeypatch.setattr(tintype, "serving", tintype.serving)  # which importing it anew replaces
    for name in [name for name in sys.modules if name.startswith("tintype.serving")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    status, error = refused(capsys)
    assert status == 1
    assert f"serve needs {package}, which is absent" in error
    assert 'pip install "tintype[serve]"' in error


def test_an_ipv6_address_is_served(tiny_bundle):
    if not os.path.exists("/proc/net/if_inet6"):
        pytest.skip("this machine has no IPv6")
    with running(str(tiny_bundle), "--host", "::1") as (_, line):
        url = line.split()[-1]
        assert url.startswith("http://[::1]:")
        assert httpx.get(f"{url}/healthz").status_code == 200
