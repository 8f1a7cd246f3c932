"""Processes that share the clips of a benchmark, each with a model of its own and one thread."""

from __future__ import annotations

import multiprocessing
import os
import queue
import signal
import threading
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

from tokensieve.bench.asking import PromptStyle
from tokensieve.bench.config import BenchConfig, load_items
from tokensieve.bench.data import by_clip
from tokensieve.bench.journal import Unit
from tokensieve.bench.session import Session
from tokensieve.bench.settings import Setting
from tokensieve.errors import BenchError, TokensieveError

__all__ = ["Message", "Task", "in_processes", "open_session", "run_tasks"]

Task = tuple[str, tuple[Setting, ...]]
"""A clip and the settings that it still needs."""

Message = tuple[str, Any]
_PATIENCE = 1.0


def in_processes(
    config: BenchConfig, settings: Sequence[Setting], style: PromptStyle, tasks: Sequence[Task], workers: int
) -> Iterator[Message]:
    """Run tasks in several processes.

    Yields
    ------
    tuple
        ``("refused", {setting key: reason})`` and ``("unit", unit)`` as they come.

    Raises
    ------
    TokensieveError
        What a process met that a user can put right.
    BenchError
        When a process dies.
    """
    context = multiprocessing.get_context("spawn")
    waiting, results = context.Queue(), context.Queue()
    for task in tasks:
        waiting.put(task)
    count = min(workers, len(tasks))
    for _ in range(count):
        waiting.put(None)
    processes = [
        context.Process(target=_work, args=(config, tuple(settings), style, waiting, results), daemon=True)
        for _ in range(count)
    ]
    for process in processes:
        process.start()
    try:
        running = count
        while running:
            try:
                kind, content = results.get(timeout=_PATIENCE)
            except queue.Empty:
                dead = next((process for process in processes if process.exitcode not in (None, 0)), None)
                if dead is not None:
                    killed = "was killed, perhaps for lack of memory" if dead.exitcode == -signal.SIGKILL else "failed"
                    raise BenchError(
                        f"A worker process {killed} (code {dead.exitcode}); run again with --workers "
                        f"{max(1, count - 1)}, it goes on where it stopped."
                    ) from None
                continue
            if kind == "done":
                running -= 1
            elif kind == "error":
                raise content
            else:
                yield kind, content
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            process.join()
        # Tasks that nobody took must not keep the interpreter from ending.
        waiting.cancel_join_thread()


def _work(config: BenchConfig, settings: Sequence[Setting], style: PromptStyle, tasks: Any, results: Any) -> None:
    """Body of one process."""
    import torch

    _end_with_parent()
    # The process that started this one hears Ctrl-C too, and ends it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    try:
        session, grouped = open_session(config, settings, style), by_clip(load_items(config))
        results.put(("refused", {setting.key: reason for setting, reason in session.refused.items()}))
        while (task := tasks.get()) is not None:
            clip, wanted = task
            for unit in session.run_clip(grouped[clip], wanted):
                results.put(("unit", unit))
    except TokensieveError as error:
        results.put(("error", error))
    else:
        results.put(("done", None))


def _end_with_parent() -> None:
    """End this process when its parent is killed, which no exit handler of the parent could do."""
    parent = multiprocessing.parent_process()
    if parent is not None:

        def watch() -> None:
            parent.join()
            os._exit(1)

        threading.Thread(target=watch, daemon=True).start()


def open_session(config: BenchConfig, settings: Sequence[Setting], style: PromptStyle) -> Session:
    """Load the model of a benchmark and prepare its settings."""
    from transformers.utils import logging

    from tokensieve.load import load_model

    assert config.model is not None, "resolved() names the model"
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    model, processor = load_model(config.model, config.dtype, config.device, config.attn)
    return Session(model, processor, settings, style, config.seed, config.batch, config.options)


def run_tasks(session: Session, grouped: Any, tasks: Sequence[Task]) -> Iterator[Message]:
    """Run tasks in this process; yields as `in_processes`."""
    yield "refused", {setting.key: reason for setting, reason in session.refused.items()}
    for clip, wanted in tasks:
        for unit in session.run_clip(grouped[clip], wanted):
            found: Unit = unit
            yield "unit", found
