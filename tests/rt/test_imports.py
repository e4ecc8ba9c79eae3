"""What imports what: the runtime stays slim, and the rooms depend on each other one way only."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

WEB = {"fastapi", "starlette", "uvicorn", "prometheus_client", "python_multipart"}
HEAVY = {"torch", "onnx", "onnxruntime", "transformers", "diffusers", "numpy", "PIL"} | WEB
# Each package with those that it may import; arrows run down this list.
ARROWS = {
    "tintype_bench": {"tintype_export", "tintype", "tintype_kernels"},
    "tintype_export": {"tintype", "tintype_kernels"},
    "tintype": {"tintype_kernels"},
    "tintype_kernels": set(),
}


def modules_after(code):
    script = f"{code}\nimport sys, json; print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_import_tintype_brings_nothing_heavy():
    assert not modules_after("import tintype") & (HEAVY | {"tokenizers", "huggingface_hub"})


def test_the_public_names_need_no_torch():
    names = "import tintype; [getattr(tintype, name) for name in tintype.__all__]"
    assert not modules_after(names) & (HEAVY - {"numpy", "PIL"})


def test_kernels_import_without_torch():
    assert not modules_after("import tintype_kernels") & (HEAVY - {"numpy"})


def test_a_picture_needs_no_torch(tiny_bundle):
    run = f"import tintype; tintype.load({str(tiny_bundle)!r})('a', seed=0)"
    assert not modules_after(run) & {
        "torch",
        "onnx",
        "transformers",
        "diffusers",
        "huggingface_hub",
    }


def test_a_server_needs_no_torch():
    found = modules_after("import tintype.serving.server")
    assert found >= WEB
    assert not found & {"torch", "onnx", "transformers", "diffusers"}


def test_fields_pictures_and_the_queue_know_no_web_framework():
    parts = ("fields", "uploads", "queue", "replies")
    assert not modules_after("\n".join(f"import tintype.serving.{part}" for part in parts)) & WEB


def imported(path):
    """Top-level packages that a file imports anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module.split(".")[0]


@pytest.mark.parametrize("package", ARROWS)
def test_arrows_run_one_way(package):
    folders = find_spec(package).submodule_search_locations
    files = [path for folder in folders for path in Path(folder).rglob("*.py")]
    assert files
    for path in files:
        upward = (set(imported(path)) & ARROWS.keys()) - ARROWS[package] - {package}
        assert not upward, f"{path} imports {upward}"
