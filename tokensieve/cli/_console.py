"""The two consoles of the command line and what is written on them.

Results go to standard output, everything else (notes, progress, errors) to standard error, so that output can
be piped and parsed.
"""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from rich.console import Console
from rich.text import Text

out = Console(highlight=False)
err = Console(stderr=True, highlight=False)
_debug: ContextVar[bool] = ContextVar("debug", default=False)


def fail(message: str) -> None:
    """One red line about what went wrong."""
    _line("error", "bold red", message)


def note(message: str) -> None:
    """One line about something that the user should know."""
    _line("note", "yellow", message)


def show_json(data: Any) -> None:
    """Print data as JSON; numbers that JSON lacks (NaN, infinity) become null."""
    out.print_json(data=_plain(data))


@contextmanager
def quiet(debug: bool) -> Iterator[None]:
    """Send our own warnings to standard error as notes, and silence those of other libraries.

    Parameters
    ----------
    debug
        Let other libraries speak.
    """
    logger = logging.getLogger("tokensieve")
    handler = _NoteHandler(logging.WARNING)
    propagate = logger.propagate
    logger.addHandler(handler)
    logger.propagate = False
    token = _debug.set(debug)
    try:
        with warnings.catch_warnings():
            if not debug:
                warnings.simplefilter("ignore")
            yield
    finally:
        logger.removeHandler(handler)
        logger.propagate = propagate
        _debug.reset(token)


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keep transformers and the hub client from writing bars and warnings of their own.

    Apart from `quiet` because it imports transformers, which takes seconds.
    """
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
    from huggingface_hub.utils import logging as hub_logging
    from transformers.utils import logging as model_logging

    if _debug.get():
        yield
        return
    levels = model_logging.get_verbosity(), hub_logging.get_verbosity()
    had_bars, had_hub_bars = model_logging.is_progress_bar_enabled(), not are_progress_bars_disabled()
    model_logging.set_verbosity(logging.CRITICAL)
    hub_logging.set_verbosity(logging.CRITICAL)
    model_logging.disable_progress_bar()
    disable_progress_bars()
    try:
        yield
    finally:
        model_logging.set_verbosity(levels[0])
        hub_logging.set_verbosity(levels[1])
        if had_bars:
            model_logging.enable_progress_bar()
        if had_hub_bars:
            enable_progress_bars()


class _NoteHandler(logging.Handler):
    """Log records as notes."""

    def emit(self, record: logging.LogRecord) -> None:
        note(record.getMessage())


def _line(label: str, style: str, message: str) -> None:
    """A labelled message that stays on one line, whatever it holds and however wide the terminal is."""
    text = Text.assemble((f"{label}: ", style), " ".join(message.split()))
    err.print(text, soft_wrap=True)


def _plain(data: Any) -> Any:
    if isinstance(data, Mapping):
        return {str(key): _plain(value) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [_plain(value) for value in data]
    if isinstance(data, float) and not math.isfinite(data):
        return None
    return data
