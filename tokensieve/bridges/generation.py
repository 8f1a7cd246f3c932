"""Generating with methods attached, and what a user of a bridge wants to know about each answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from tokensieve.core.method import Method
from tokensieve.core.runtime import Run
from tokensieve.errors import HostError, MethodError
from tokensieve.hosts.registry import host_for
from tokensieve.measure.from_run import tokens_per_layer

__all__ = ["Answer", "FiniteLogits", "RowTokens", "Sampling", "answer_rows", "row_tokens", "stage_seconds"]

STAGES = ("encode", "compress", "prefill", "decode")


@dataclass(frozen=True)
class Sampling:
    """How to generate.

    Attributes
    ----------
    max_new_tokens : int
        Most tokens of an answer.
    temperature : float
        0 for greedy decoding.
    top_p : float, optional
        Draw from the smallest set of tokens with this much probability.
    top_k : int, optional
        Draw from so many tokens.
    num_beams : int
        Beams of a beam search.
    seed : int, optional
        Makes a draw repeatable.
    stop : tuple of str
        Texts at which an answer ends; they are not part of it.
    """

    max_new_tokens: int = 64
    temperature: float = 0.0
    top_p: float | None = None
    top_k: int | None = None
    num_beams: int = 1
    seed: int | None = None
    stop: tuple[str, ...] = ()

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments of ``generate``; the checkpoint's own sampling settings never leak in."""
        found: dict[str, Any] = {"max_new_tokens": self.max_new_tokens, "num_beams": self.num_beams}
        if self.temperature <= 0:
            return found | {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        return found | {
            "do_sample": True,
            "temperature": self.temperature,
            "top_p": 1.0 if self.top_p is None else self.top_p,
            "top_k": 0 if self.top_k is None else self.top_k,
        }

    def cut(self, text: str) -> str:
        """A text up to the first of the stops."""
        places = [place for place in (text.find(stop) for stop in self.stop if stop) if place >= 0]
        return text[: min(places)] if places else text


@dataclass(frozen=True)
class RowTokens:
    """Tokens of one prompt.

    Attributes
    ----------
    prompt_before, prompt
        All tokens without compression, and those that entered the language model.
    visual_before, visual, visual_last
        Patches without compression, those that entered, and those behind the last cut inside the model.
    """

    prompt_before: int
    prompt: int
    visual_before: int = 0
    visual: int = 0
    visual_last: int = 0

    def to_dict(self) -> dict[str, int]:
        """Plain data for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Answer:
    """One generated answer and its cost.

    Attributes
    ----------
    text
        Without special tokens and stop texts.
    new_tokens
        Tokens generated.
    tokens
        Tokens of the prompt.
    seconds
        Time per stage (encode, compress, prefill, decode) of the batch that the answer was part of.
    """

    text: str
    new_tokens: int
    tokens: RowTokens
    seconds: dict[str, float] = field(default_factory=dict)


class FiniteLogits:
    """Logits processor that stops at the first token when the model computes NaN."""

    def __init__(self) -> None:
        self._checked = False

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores as they are."""
        if not self._checked and bool(torch.isnan(scores).any()):
            raise HostError("The model computes NaN; check its weights and the dtype (bfloat16 instead of float16).")
        self._checked = True
        return scores


def answer_rows(
    model: Any, tokenizer: Any, inputs: Mapping[str, Any], methods: Sequence[Method], sampling: Sampling
) -> list[Answer]:
    """Answer all prompts of a batch in one call.

    Parameters
    ----------
    model
        From `tokensieve.load.load_model`, without a method attached.
    tokenizer
        Of the model's processor.
    inputs
        ``input_ids [B, L]`` and what belongs to it, on the model's device, padded on the left.
    methods
        From `tokensieve.core.registry.resolve`.
    sampling
        How to generate.

    Returns
    -------
    list of Answer
        One per row, in order.

    Raises
    ------
    TokensieveError
        If a method cannot run on the model or the input, or the model computes NaN.
    """
    if sampling.seed is not None:
        torch.manual_seed(sampling.seed)
    with Run(model, host_for(model), methods) as run, torch.inference_mode():
        produced = model.generate(**inputs, **sampling.arguments(), logits_processor=[FiniteLogits()])
    new = produced[:, inputs["input_ids"].shape[1] :].cpu()
    ends = end_ids(model)
    rows = row_tokens(run, inputs, sampling.num_beams)
    seconds = stage_seconds(run)
    answers = []
    for ids, tokens in zip(new, rows, strict=True):
        text = tokenizer.decode(ids, skip_special_tokens=True).strip()
        answers.append(Answer(sampling.cut(text), _length(ids, ends), tokens, seconds))
    return answers


def end_ids(model: Any) -> set[int]:
    """Token ids that end an answer."""
    found = model.generation_config.eos_token_id
    if found is None:
        return set()
    return {int(value) for value in found} if isinstance(found, (list, tuple)) else {int(found)}


def row_tokens(run: Run, inputs: Mapping[str, Any], beams: int = 1) -> list[RowTokens]:
    """Tokens of every prompt of the last prefill of a run; prompts without visuals are counted from the inputs."""
    if not run.history:
        mask = inputs.get("attention_mask")
        counts = [inputs["input_ids"].shape[1]] * len(inputs["input_ids"]) if mask is None else mask.sum(1).tolist()
        return [RowTokens(int(count), int(count)) for count in counts]
    trace, layers = run.history[-1], run.facts.decoder_layers
    found = []
    for row, (before, after) in enumerate(tokens_per_layer(trace, layers)):
        if row % beams:
            continue
        items = [item for item in trace.items if item.row == row]
        kept = sum(item.keep.numel() for item in items)
        visual = sum(item.layout.patches for item in items)
        found.append(RowTokens(before, after[0], visual, kept, kept - (after[0] - after[-1])))
    return found


def stage_seconds(run: Run) -> dict[str, float]:
    """Seconds per stage of a run, all of them present; ``prefill`` leaves ``compress`` out."""
    raw = run.clock.seconds
    found = {stage: raw.get(stage, 0.0) for stage in STAGES}
    found["prefill"] = max(0.0, found["prefill"] - found["compress"])
    return found


def check_retention_option(spec: str, methods: Sequence[Method]) -> None:
    """Raise MethodError when a notation fixes a retention, which per-request retentions could not change."""
    if any("retention=" in part.replace(" ", "") for part in spec.split("+")):
        raise MethodError(f"{spec} states a retention of its own; give it by --retention instead.")


def _length(ids: Tensor, ends: set[int]) -> int:
    """Tokens up to and including the first that ends the answer."""
    for place, value in enumerate(ids.tolist()):
        if value in ends:
            return place + 1
    return int(ids.numel())
