"""The flow of a run: items, decoding workers, answering workers, the journal."""

from __future__ import annotations

import importlib
import json
import logging
import math
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from tokensieve.bridges.ray_batch.items import Item
from tokensieve.bridges.ray_batch.journal import Journal
from tokensieve.bridges.ray_batch.settings import BatchSettings
from tokensieve.bridges.ray_batch.workers import Answerer, Decoder
from tokensieve.errors import TokensieveError

__all__ = ["Workers", "run_batch"]

logger = logging.getLogger("tokensieve")

# Items per task of a decoding worker: few enough that little is lost with a worker.
_ITEMS_PER_BLOCK = 8
# Retries of a block in the first pass, and of a clip alone in the second. Every one costs the start of a worker, so the
# first pass gives up early: what it loses is not lost.
_RETRIES = (1, 2)
# Ray gives a worker 60 s to report after its start and ends a node that is silent for about as long. On a machine with
# other work both take longer than that, and workers would be started again and again without ever doing anything.
_PATIENCE = {
    "RAY_worker_register_timeout_seconds": "600",
    "RAY_health_check_timeout_ms": "60000",
    "RAY_health_check_failure_threshold": "20",
}
LOST = "The worker process died on this clip, repeatedly; it may be damaged or need too much memory."


@dataclass(frozen=True)
class Workers:
    """How many workers there are and what each takes.

    Attributes
    ----------
    models : int
        Answering workers, each with a model of its own.
    decoders : int
        Decoding workers, one processor core each.
    gpus : float
        Accelerators of an answering worker; a fraction lets several share one, 0 runs on the CPU.
    cpus : float
        Processor cores of an answering worker.
    batch_size : int
        Clips that are answered in one call.
    address : str, optional
        Of a Ray cluster; a local one is started unless given.
    """

    models: int = 1
    decoders: int = 1
    gpus: float = 0.0
    cpus: float = 1.0
    batch_size: int = 1
    address: str | None = None

    def __post_init__(self) -> None:
        if min(self.models, self.decoders, self.batch_size) < 1 or min(self.gpus, self.cpus) < 0:
            raise TokensieveError(
                f"A run needs a model, a decoder and a batch of 1 or more, not {self.models}, {self.decoders} and "
                f"{self.batch_size}, and no negative share of a processor."
            )


def run_batch(
    items: Sequence[Item],
    settings: BatchSettings,
    workers: Workers,
    journal: Journal,
    progress: Callable[[int], None] | None = None,
) -> None:
    """Answer items and write every result to a journal as it comes.

    A worker that dies is started again and its clips are given to others. Clips on which workers die
    repeatedly are tried once more one by one, and recorded as failed when that does not help.

    Parameters
    ----------
    items : sequence of Item
        What is not in the journal yet.
    settings : BatchSettings
        How to answer.
    workers : Workers
        Where.
    journal : Journal
        Receives a record per item.
    progress : callable, optional
        Called with the number of items finished in this run.

    Raises
    ------
    TokensieveError
        If Ray is missing, its cluster cannot be reached or lacks what the workers need, or a worker cannot start
        (no such model, a method that does not fit).
    """
    if not items:
        return
    done = 0
    with _cluster(workers) as ray:
        left = {item.id: item for item in items}
        for per_block, retries in zip((_per_block(len(items), workers), 1), _RETRIES, strict=True):
            # The first pass leaves a block that is lost too often; the second finds out which clip it was.
            for record in _stream(ray, list(left.values()), settings, workers, per_block, retries):
                if left.pop(record["id"], None) is None:
                    continue
                journal.append(record)
                done += 1
                if progress is not None:
                    progress(done)
            if not left:
                return
            logger.warning("%d clips were lost with their workers", len(left))
        for item in left.values():
            journal.append({**item.to_dict(), "status": "failed", "reason": LOST})


def _per_block(count: int, workers: Workers) -> int:
    """Items per block: several rounds for every decoder, whole batches."""
    fair = math.ceil(count / (4 * workers.decoders))
    batches = max(1, min(_ITEMS_PER_BLOCK, fair) // workers.batch_size)
    return batches * workers.batch_size


def _stream(
    ray: Any, items: Sequence[Item], settings: BatchSettings, workers: Workers, per_block: int, retries: int
) -> Iterator[dict[str, Any]]:
    """Finished records, in the order in which they come."""
    data = importlib.import_module("ray.data")
    rows = [{"item": json.dumps(item.to_dict())} for item in items]
    # More blocks than rows would be empty ones.
    dataset = data.from_items(rows, override_num_blocks=max(1, math.ceil(len(rows) / per_block)))
    dataset = _with_actors(
        dataset,
        Decoder,
        (settings,),
        retries,
        batch_size=min(workers.batch_size, per_block),
        compute=data.ActorPoolStrategy(size=workers.decoders),
        num_cpus=1,
    )
    dataset = _with_actors(
        dataset,
        Answerer,
        (settings, "auto" if workers.gpus else "cpu"),
        retries,
        batch_size=1,
        compute=data.ActorPoolStrategy(size=workers.models),
        num_cpus=workers.cpus,
        num_gpus=workers.gpus,
    )
    try:
        for row in dataset.iter_rows():
            yield json.loads(row["record"])
    except ray.exceptions.RayError as error:
        raise _explained(error) from error


def _with_actors(dataset: Any, worker: type, arguments: tuple[Any, ...], retries: int, **options: Any) -> Any:
    """One stage of actors that are started again when they die; a task is tried a few times, not for ever."""
    with warnings.catch_warnings():
        # Releases before 2.64 still take these two; later ones have no other way to bound the retries yet.
        warnings.simplefilter("ignore")
        return dataset.map_batches(
            worker, fn_constructor_args=arguments, max_restarts=-1, max_task_retries=retries, **options
        )


@contextmanager
def _cluster(workers: Workers) -> Iterator[Any]:
    """Ray, connected, with its own output silenced."""
    try:
        ray = importlib.import_module("ray")
        context = importlib.import_module("ray.data").DataContext.get_current()
    except ImportError as error:
        raise TokensieveError(
            f"Batches need the package {error.name}; install it with pip install 'tokensieve[batch]'."
        ) from error
    options: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
    if workers.address is None:
        # A small machine may have fewer cores than there are workers; they then share them.
        needed = math.ceil(workers.decoders + workers.models * workers.cpus)
        options |= {"num_cpus": max(os.cpu_count() or 1, needed), "include_dashboard": False}
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    try:
        with _patience(workers.address is None):
            ray.init(address=workers.address or "local", **options)
    except Exception as error:
        # Ray raises errors of all kinds here, plain exceptions among them.
        hint = (
            "check the address and the cluster's token" if workers.address else "a busy machine may need a second try"
        )
        place = workers.address or "this machine"
        raise TokensieveError(f"Ray cannot be used at {place} ({_first_line(error)}); {hint}.") from error
    context.enable_progress_bars = False
    context.max_errored_blocks = -1
    context.execution_options.preserve_order = False
    try:
        _check_resources(ray, workers)
        yield ray
    finally:
        ray.shutdown()


@contextmanager
def _patience(local: bool) -> Iterator[None]:
    """Longer time limits for the processes of a cluster that is started here, unless the user has set them."""
    added = [name for name in _PATIENCE if local and name not in os.environ]
    os.environ.update({name: _PATIENCE[name] for name in added})
    try:
        yield
    finally:
        for name in added:
            del os.environ[name]


def _check_resources(ray: Any, workers: Workers) -> None:
    """Raise TokensieveError for workers that could never start."""
    found = ray.cluster_resources()
    cpus, gpus = workers.decoders + workers.models * workers.cpus, workers.models * workers.gpus
    if found.get("CPU", 0) < cpus or found.get("GPU", 0) < gpus:
        raise TokensieveError(
            f"The workers need {cpus:g} processor cores and {gpus:g} GPUs, but Ray has {found.get('CPU', 0):g} and "
            f"{found.get('GPU', 0):g}; ask for fewer --models or --decoders, or a smaller --gpus-per-model."
        )


def _explained(error: Exception) -> TokensieveError:
    """What a worker said, without Ray's traces."""
    cause = getattr(error, "cause", None)
    if isinstance(cause, TokensieveError):
        return cause
    return TokensieveError(f"A worker cannot run ({_first_line(cause or error)}).")


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[-1] if lines else type(error).__name__)[:300]
