"""Where the commands' pictures may go."""

from __future__ import annotations

import pytest

import tintype
from tintype.cli import main


@pytest.mark.parametrize(
    "command", [["generate", "a boat"], ["schedulers", "--compare", "postcard"]]
)
def test_a_dash_is_no_name_of_a_file(command, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tintype, "load", lambda *_, **__: pytest.fail("loaded"))
    assert main([*command, "-o", "-"]) == 2
    expected = (
        "-o -: a picture goes to a file, not to standard output; name one, such as picture.png"
    )
    assert capsys.readouterr().err == f"tintype: {expected}\n"
    assert not any(tmp_path.iterdir())
