"""One cell of the benchmark: a model, a method and its batch sizes, beside the full model in the same process."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

import tokensieve
from benchmarks.geometry import Geometry, build, prompt
from benchmarks.results import median
from benchmarks.stopwatch import Stopwatch
from tokensieve.measure.memory import PeakMemory

__all__ = ["FULL", "Settings", "measure", "summarise"]

FULL = "full model"


@dataclass(frozen=True)
class Settings:
    """How a cell is measured.

    Attributes
    ----------
    retention
        Retention of the method.
    batches
        Batch sizes.
    repeats
        Timed rounds; one round runs the full model and the method once each, in turn.
    answer_tokens, long_tokens
        New tokens of a short answer (a letter and the end, as on multiple-choice benchmarks) and of a long one.
    """

    retention: float = 0.25
    batches: tuple[int, ...] = (1, 4)
    repeats: int = 5
    answer_tokens: int = 2
    long_tokens: int = 64


@contextlib.contextmanager
def _attached(model: Any, spec: str, retention: float) -> Iterator[tokensieve.Run | None]:
    if spec == FULL:
        yield None
        return
    options = {} if spec == "none" else {"retention": retention}
    with tokensieve.compress(model, spec, **options) as run:
        yield run


def measure(geometry: Geometry, spec: str, device: torch.device, dtype: torch.dtype, settings: Settings) -> list[Any]:
    """Samples of one method and of the full model.

    Returns
    -------
    list of dict
        One record per batch size: ``batch``, ``method``, ``samples`` (name -> list of flat records) or
        ``error``.
    """
    model = build(geometry, device, dtype)
    found = []
    for batch in settings.batches:
        record: dict[str, Any] = {"model": geometry.name, "method": spec, "batch": batch}
        try:
            record["samples"] = _samples(model, prompt(geometry, model, batch), spec, device, settings)
        except Exception as error:
            # Whatever goes wrong belongs into this row; the other rows must not be lost.
            record["error"] = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
            if device.type == "cuda":
                torch.cuda.empty_cache()
        found.append(record)
    return found


def _samples(
    model: Any, inputs: dict[str, Any], spec: str, device: torch.device, settings: Settings
) -> dict[str, list[dict[str, float]]]:
    samples: dict[str, list[dict[str, float]]] = {FULL: [], spec: []}
    # The first round warms up kernels and the allocator, and is thrown away.
    for round_number in range(settings.repeats + 1):
        for name, kept in samples.items():
            sample = _sample(model, inputs, name, device, settings)
            if round_number:
                kept.append(sample)
    return samples


def _sample(
    model: Any, inputs: dict[str, Any], name: str, device: torch.device, settings: Settings
) -> dict[str, float]:
    """A short and a long answer; the peak of memory is reset in front of each."""
    batch = inputs["input_ids"].shape[0]

    def answer(tokens: int) -> Callable[[], Any]:
        return lambda: model.generate(**inputs, max_new_tokens=tokens)

    with _attached(model, name, settings.retention) as run, Stopwatch(model) as watch:
        memory = PeakMemory(device)
        memory.start()
        short = watch.run(answer(settings.answer_tokens))
        sample = {
            "llm_generation": short.generation,
            "model_generation": short.total,
            "samples_per_second": batch / short.total,
            "peak_bytes": float(memory.read()),
            "first_token": short.first_token,
            "encode": short.front,
            "compress": 0.0,
            "prefill": short.first,
        }
        if run is not None:
            report = run.report
            sample["compress"] = report.seconds["compress"]
            sample["prefill"] = short.first - sample["compress"]
            sample["entered_share"] = report.patches.share()
            sample["average_share"] = report.patches.share("average")
            sample["entered"] = report.patches.entered / batch
            if report.prefill is not None:
                sample["flops_ratio"] = report.prefill.ratio
        long = watch.run(answer(settings.long_tokens))
        sample["decode_step"] = long.step
        sample["decode_tokens_per_second"] = batch * long.steps / (long.total - long.first_token)
    return sample


def summarise(samples: list[dict[str, float]]) -> dict[str, float]:
    """Median of every quantity, the maximum of the memory peaks."""
    found = {key: median(sample[key] for sample in samples) for key in samples[0]}
    found["peak_bytes"] = max(sample["peak_bytes"] for sample in samples)
    return found
