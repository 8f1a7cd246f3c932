"""Notes, errors, JSON and progress bars."""

from __future__ import annotations

import io
import json
import logging
import math
import warnings

import pytest
from rich.console import Console

from tokensieve.cli import _console, _progress


@pytest.fixture
def screen(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """What a narrow terminal on standard error shows."""
    text = io.StringIO()
    console = Console(file=text, force_terminal=True, width=40, color_system=None, highlight=False)
    monkeypatch.setattr(_console, "err", console)
    monkeypatch.setattr(_progress, "err", console)
    return text


def test_messages_stay_on_one_line(screen: io.StringIO) -> None:
    _console.fail("a message [bold]that[/bold] is\nlonger than the terminal is wide, and has markup")
    assert (
        screen.getvalue() == "error: a message [bold]that[/bold] is longer than the terminal is wide, and has markup\n"
    )


def test_own_warnings_become_notes_and_others_are_silent(screen: io.StringIO) -> None:
    with _console.quiet(debug=False):
        logging.getLogger("tokensieve").warning("%s: odd", "clip.mp4")
        warnings.warn("of another library", stacklevel=1)
    assert screen.getvalue() == "note: clip.mp4: odd\n"
    assert logging.getLogger("tokensieve").propagate


def test_other_libraries_are_restored() -> None:
    from transformers.utils import logging as model_logging

    model_logging.enable_progress_bar()
    before = model_logging.get_verbosity()
    with _console.quiet_transformers():
        assert model_logging.get_verbosity() == logging.CRITICAL
        assert not model_logging.is_progress_bar_enabled()
    assert model_logging.get_verbosity() == before and model_logging.is_progress_bar_enabled()
    with _console.quiet(debug=True), _console.quiet_transformers():
        assert model_logging.get_verbosity() == before


def test_json_has_no_nan(capsys: pytest.CaptureFixture[str]) -> None:
    _console.show_json({"a": [math.nan, 1.5], "b": {"c": math.inf}, 3: ("x", None)})
    assert json.loads(capsys.readouterr().out) == {"a": [None, 1.5], "b": {"c": None}, "3": ["x", None]}


def test_a_bar_shows_on_a_terminal(screen: io.StringIO) -> None:
    with _progress.step("reading the video", show=True) as advance:
        advance(3, 8)
    assert "reading the video" in screen.getvalue()


@pytest.mark.parametrize(("terminal", "show"), [(False, True), (True, False)])
def test_no_bar_when_off_or_piped(monkeypatch: pytest.MonkeyPatch, terminal: bool, show: bool) -> None:
    text = io.StringIO()
    monkeypatch.setattr(_progress, "err", Console(file=text, force_terminal=terminal))
    with _progress.step("reading the video", show=show) as advance:
        advance(3, 8)
    assert text.getvalue() == ""
