"""Generating an answer and measuring it from outside: first token, later tokens, memory."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from tokensieve.errors import HostError
from tokensieve.measure.memory import PeakMemory

Tick = Callable[[int], None]


@dataclass(frozen=True)
class Answer:
    """One generated answer.

    Attributes
    ----------
    text
        The answer without special tokens.
    new_tokens
        Number of tokens generated.
    seconds_to_first_token
        From pixels on the device to the first token: encoding, compression and prefill.
    tokens_per_second
        Of the tokens after the first; None when there is none.
    peak_memory, memory_before
        Most bytes in use during generation, and those in use before it (weights included).
    memory_kind
        What is counted.
    """

    text: str
    new_tokens: int
    seconds_to_first_token: float
    tokens_per_second: float | None
    peak_memory: int
    memory_before: int
    memory_kind: str

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        found = asdict(self)
        return {"answer": found.pop("text"), **found}


class _TokenClock:
    """Receives tokens from ``generate`` as a streamer does, and notes when they come."""

    def __init__(self, tick: Tick | None) -> None:
        self.times: list[float] = []
        self._tick, self._prompt_seen = tick, False

    def put(self, value: Any) -> None:
        """Called first with the prompt, then with every new token, already on the CPU."""
        if not self._prompt_seen:
            self._prompt_seen = True
            return
        self.times.append(time.perf_counter())
        if self._tick is not None:
            self._tick(len(self.times))

    def end(self) -> None:
        """Nothing is left to do."""


class _FiniteLogits:
    """Stops at the first token when the model computes NaN, instead of printing what comes of it."""

    def __init__(self) -> None:
        self.checked = False

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Scores as they are."""
        if not self.checked and bool(torch.isnan(scores).any()):
            raise HostError(
                "The model computes NaN; check its weights and the dtype (float16 overflows in some models, "
                "bfloat16 does not)."
            )
        self.checked = True
        return scores


def answer(
    model: Any, processor: Any, inputs: Mapping[str, Any], max_new_tokens: int, tick: Tick | None = None
) -> Answer:
    """Answer greedily and measure.

    Parameters
    ----------
    model, processor
        From `tokensieve.load.load_model`; a method may be attached.
    inputs
        One prompt, on the model's device.
    max_new_tokens
        Most tokens of the answer.
    tick
        Called with the number of tokens so far after each token.

    Raises
    ------
    HostError
        If the model computes NaN.
    """
    memory = PeakMemory(model.device)
    before = memory_in_use(model.device)
    memory.start()
    clock = _TokenClock(tick)
    synchronize(model.device)
    begun = time.perf_counter()
    with torch.inference_mode():
        produced = model.generate(
            **inputs,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            num_beams=1,
            streamer=clock,
            logits_processor=[_FiniteLogits()],
        )
    peak = memory.read()
    new = produced[0, inputs["input_ids"].shape[1] :]
    later = clock.times[-1] - clock.times[0]
    return Answer(
        text=processor.tokenizer.decode(new, skip_special_tokens=True).strip(),
        new_tokens=int(new.numel()),
        seconds_to_first_token=clock.times[0] - begun,
        tokens_per_second=(len(clock.times) - 1) / later if later > 0 else None,
        peak_memory=peak,
        memory_before=before,
        memory_kind=memory.kind,
    )


def memory_in_use(device: torch.device) -> int:
    """Bytes in use now: of the CUDA allocator on a GPU, of the process elsewhere."""
    if device.type == "cuda":
        return int(torch.cuda.memory_allocated(device))
    import psutil

    return int(psutil.Process().memory_info().rss)


def synchronize(device: torch.device) -> None:
    """Wait for the device, so that a clock read on the host means something."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
