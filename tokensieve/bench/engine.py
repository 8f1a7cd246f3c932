"""Running a benchmark from its arguments to its results."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from tokensieve.bench.asking import check_style, default_style
from tokensieve.bench.config import BenchConfig, default_workers, identity, load_items, resolved
from tokensieve.bench.data import Item, by_clip
from tokensieve.bench.journal import Journal
from tokensieve.bench.results import Results, summarise
from tokensieve.bench.session import Session
from tokensieve.bench.settings import FULL, Setting, expand
from tokensieve.bench.workers import Message, Task, in_processes, open_session, run_tasks
from tokensieve.errors import BenchError

__all__ = ["JOURNAL", "run_bench"]

JOURNAL = "journal.jsonl"
"""Name of the journal in the folder of a benchmark."""

Progress = Callable[[int, int | None], None]


def run_bench(
    config: BenchConfig, folder: str | Path, *, workers: int | None = None, progress: Progress | None = None
) -> Results:
    """Compare methods on the same clips and questions, or go on with a comparison that was interrupted.

    Parameters
    ----------
    config : BenchConfig
        What to compare.
    folder : str or Path
        Where the journal is kept. With the same arguments, finished units found there are not run again.
    workers : int, optional
        Processes; one per core for small models on the CPU unless given, otherwise one.
    progress : callable, optional
        Called with finished and total units.

    Returns
    -------
    Results

    Raises
    ------
    BenchError
        When dataset, arguments or journal cannot be used.
    TokensieveError
        For unknown methods and models that cannot be loaded.
    """
    if config.batch < 1 or (workers is not None and workers < 1):
        raise BenchError(f"Batch and workers must be 1 or more, not {config.batch} and {workers}.")
    settings = expand(config.methods, config.retentions)
    items = load_items(config)
    title = config.model or "bundled model"
    config = resolved(config)
    assert config.model is not None
    name = config.model
    from tokensieve.load import read_config

    style = check_style(config.prompt or default_style(items, read_config(name)), items)
    count = default_workers(name, config.device) if workers is None else workers
    with Journal(Path(folder) / JOURNAL, identity(config, name, items, settings, style)) as journal:
        tasks = remaining(journal, items, settings)
        count = min(count, len(tasks))
        messages: Iterable[Message] = ()
        if count > 1:
            messages = in_processes(config, settings, style, tasks, count)
        elif tasks:
            messages = run_tasks(open_session(config, settings, style), by_clip(items), tasks)
        _collect(journal, messages, items, settings, progress)
        return summarise(items, settings, journal, describe(config, title, style, count))


def bench_session(
    session: Session, items: Sequence[Item], settings: Sequence[Setting], journal: Journal, title: str = "model"
) -> Results:
    """Run a benchmark with a model that is loaded already, in this process; see `run_bench`."""
    messages = run_tasks(session, by_clip(items), remaining(journal, items, settings))
    _collect(journal, messages, items, settings, None)
    return summarise(items, settings, journal, {"model": title, "prompt": session.style})


def remaining(journal: Journal, items: Sequence[Item], settings: Sequence[Setting]) -> list[Task]:
    """What is not in the journal yet."""
    able = [setting for setting in settings if setting.key not in journal.refused]
    tasks = []
    for clip in by_clip(items):
        missing = tuple(setting for setting in able if (setting.key, clip) not in journal)
        if missing:
            tasks.append((clip, missing))
    return tasks


def _collect(
    journal: Journal,
    messages: Iterable[Message],
    items: Sequence[Item],
    settings: Sequence[Setting],
    progress: Progress | None,
) -> None:
    """Write down what comes in."""
    clips = len(by_clip(items))
    for kind, content in messages:
        if kind == "refused":
            for setting, reason in content.items():
                journal.refuse(setting, reason)
        elif content["setting"] == FULL and "error" in content:
            # Without the full model nothing can be compared, and what went wrong may be put right.
            raise BenchError(f"The full model gives no answer on {content['clip']}: {content['error']}")
        else:
            journal.add(content)
        if progress is not None:
            progress(len(journal.units), (len(settings) - len(journal.refused)) * clips)


def describe(config: BenchConfig, title: str, style: str, workers: int) -> dict[str, object]:
    """What a reader of the results should know of the run."""
    import platform

    import torch

    return {
        "model": title,
        "data": "tokensieve world" if config.data is None else config.data,
        "split": config.split if config.data is None else None,
        "prompt": style,
        "frames": config.frames_per_clip,
        "seed": config.seed,
        "dtype": config.dtype,
        "device": config.device,
        "workers": workers,
        "processor": platform.processor() or platform.machine(),
        "torch": torch.__version__,
    }
