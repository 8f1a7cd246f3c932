"""Progress bars on standard error."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from tokensieve.cli._console import err

Advance = Callable[[int, int | None], None]


@contextmanager
def step(title: str, show: bool, total: int | None = None) -> Iterator[Advance]:
    """Show a bar while a block runs, and remove it afterwards.

    Parameters
    ----------
    title
        What is being done.
    show
        False for no bar; there is none either when standard error is no terminal.
    total
        Number of units, when known beforehand; otherwise the bar pulses.

    Yields
    ------
    callable
        ``advance(done, total)`` sets the state of the bar.
    """
    if not show or not err.is_terminal:
        yield lambda done, total: None
        return
    columns = [SpinnerColumn(), TextColumn("{task.description}"), BarColumn(bar_width=30)]
    if total is not None:
        columns.append(MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn(), console=err, transient=True) as progress:
        task = progress.add_task(title, total=total)

        def advance(done: int, total: int | None) -> None:
            progress.update(task, completed=done, total=total)

        yield advance
