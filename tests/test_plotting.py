"""Pictures: a PNG in one step, and one line where matplotlib is missing."""

import sys
from pathlib import Path

import pytest

from embtab.errors import UserError
from embtab.plotting import pyplot, save_figure


def test_a_picture_replaces_an_older_one_whole(tmp_path: Path) -> None:
    path = tmp_path / "p.png"
    path.write_text("old")
    figure, axis = pyplot().subplots()
    axis.plot([1, 2], [3, 4])
    save_figure(figure, path)
    assert path.read_bytes().startswith(b"\x89PNG")
    assert [each.name for each in tmp_path.iterdir()] == ["p.png"]
    assert pyplot().get_fignums() == []


def test_without_matplotlib_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UserError, match="embtab\\[plot\\]"):
        pyplot()
