"""One process's share of a benchmark: a model, the clips it is given, and what every setting answers."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from tokensieve.bench.asking import PromptStyle, answer, is_right, write
from tokensieve.bench.data import Item, clip_of
from tokensieve.bench.encoding import Collector, Encoding, encodes_itself, given, record
from tokensieve.bench.journal import Unit
from tokensieve.bench.settings import Setting
from tokensieve.core.method import Method
from tokensieve.core.runtime import Run
from tokensieve.core.signals import SIGNALS
from tokensieve.errors import TokensieveError
from tokensieve.hosts.registry import host_for
from tokensieve.measure.from_run import make_report
from tokensieve.prompt import build_prompt

__all__ = ["Session"]


@dataclass
class _Clip:
    """Prompts of one clip: one row for encoding, and the questions in batches."""

    single: dict[str, Any]
    batches: list[tuple[list[Item], dict[str, Any]]]


class Session:
    """Runs settings on clips.

    Parameters
    ----------
    model, processor
        In evaluation mode, on its device.
    settings : sequence of Setting
        What to compare. Those that the host refuses are left out of `runs`.
    style : {"open", "letters"}
        How questions are written and answers taken.
    seed : int
        Of methods that draw at random, and of torch in front of every unit.
    batch : int
        Most questions about a clip that run as one batch.
    options : mapping
        Further options for the methods that have them.

    Attributes
    ----------
    runs
        Setting -> its run, ready to attach.
    refused
        Setting -> why the host cannot run it, one sentence.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        settings: Sequence[Setting],
        style: PromptStyle,
        seed: int = 0,
        batch: int = 8,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        self.model, self.processor = model, processor
        self.style, self.seed, self.batch = style, seed, batch
        given = {"seed": seed, **(options or {})}
        if not getattr(model, "name_or_path", ""):
            # Methods that read the question find the tokenizer by the checkpoint; a model made in memory has none.
            given["tokenizer"] = processor
        self.runs, self.refused = make_runs(model, settings, given)
        self._everything = [method for run in self.runs.values() for method in run.methods]
        self._shared: dict[str, Run] = self._collectors()
        self._warm = False

    def run_clip(self, items: Sequence[Item], settings: Sequence[Setting]) -> Iterator[Unit]:
        """Ask the questions of one clip under some settings, in order; one unit each as soon as it is done.

        A setting that fails on the clip gives a unit with an ``error`` instead of answers. A session begins with a run
        that is not timed.
        """
        wanted = [setting for setting in settings if setting in self.runs]
        if not wanted:
            return
        clip = self._prompts(items)
        encodings: dict[str, Encoding] = {}
        if not self._warm:
            self._unit(wanted[0], items[0].clip, clip, encodings)
            self._warm, encodings = True, {}
        for setting in wanted:
            yield self._unit(setting, items[0].clip, clip, encodings)

    def _collectors(self) -> dict[str, Run]:
        """A run for every text tower in use that collects all signals that the shared settings read.

        Settings that read no signal of a text tower take whichever there is.
        """
        sharing = [run for run in self.runs.values() if not encodes_itself(run.methods)]
        towers = {str(_tower(run.methods)): _tower(run.methods) for run in sharing if _paired(run)} or {"": None}
        wanted: dict[str, dict[str, None]] = {key: {} for key in towers}
        for run in sharing:
            wanted[self._key(run, towers)].update(dict.fromkeys(map(str, run.requests)))
        host = host_for(self.model)
        return {
            key: Run(self.model, host, [Collector(wanted=tuple(signals), text_tower=towers[key])])
            for key, signals in wanted.items()
        }

    @staticmethod
    def _key(run: Run, shared: Mapping[str, Any]) -> str:
        """Which collector serves a run."""
        return str(_tower(run.methods)) if _paired(run) else next(iter(shared))

    def _prompts(self, items: Sequence[Item]) -> _Clip:
        shown = clip_of(items[0])
        whole = any(method.uniform_views for method in self._everything)
        texts = [write(item, self.style) for item in items]

        def inputs(part: Sequence[str]) -> dict[str, Any]:
            return build_prompt(self.processor, shown, list(part), whole_frames=whole).on(self.model)

        starts = range(0, len(items), self.batch)
        batches = [(list(items[i : i + self.batch]), inputs(texts[i : i + self.batch])) for i in starts]
        single = batches[0][1] if len(batches[0][0]) == 1 else inputs(texts[:1])
        return _Clip(single, batches)

    def _unit(self, setting: Setting, name: str, clip: _Clip, encodings: dict[str, Encoding]) -> Unit:
        found: Unit = {"setting": setting.key, "clip": name}
        torch.manual_seed(_seed_of(self.seed, setting.key, name))
        run = self.runs[setting]
        try:
            return found | self._answers(run, clip, encodings)
        except TokensieveError as error:
            return found | {"error": str(error)}
        except (RuntimeError, ValueError, TypeError, IndexError, AttributeError, KeyError, AssertionError) as error:
            # One broken method must not cost the results of all others; the table names it and says why.
            words = " ".join(str(error).split())[:300]
            return found | {"error": f"{type(error).__name__}: {words}{_blame(error)}"}

    def _features(self, run: Run, encoding: Encoding, rows: int) -> AbstractContextManager[None]:
        """Features encoded earlier, unless they depend on the question, so that every question needs its own."""
        return nullcontext() if run.host.question_guided else given(run, encoding, rows)

    def _answers(self, run: Run, clip: _Clip, encodings: dict[str, Encoding]) -> Unit:
        own = encodes_itself(run.methods)
        if not own:
            key = self._key(run, self._shared)
            if key not in encodings:
                with self._shared[key] as collecting:
                    encodings[key] = record(collecting, clip.single)
            encoding = encodings[key]
        answers: dict[str, dict[str, Any]] = {}
        with run:
            if own:
                encoding = record(run, clip.single)
            run.reset()
            for items, inputs in clip.batches:
                with self._features(run, encoding, len(items)):
                    texts = answer(self.model, self.processor.tokenizer, inputs, items, self.style)
                answers |= {
                    item.id: {"given": text, "right": is_right(text, item)}
                    for item, text in zip(items, texts, strict=True)
                }
            measured = _measured(run, len(answers), encoding.seconds)
        return {"answers": answers, "own_encoding": own, **measured}


def make_runs(
    model: Any, settings: Sequence[Setting], options: Mapping[str, Any]
) -> tuple[dict[Setting, Run], dict[Setting, str]]:
    """Runs of the settings that fit a model, and why the others do not.

    Parameters
    ----------
    model
        With or without weights.
    settings : sequence of Setting
        What to try.
    options
        As `Setting.build`.
    """
    host = host_for(model)
    runs: dict[Setting, Run] = {}
    refused: dict[Setting, str] = {}
    for setting in settings:
        try:
            runs[setting] = Run(model, host, setting.build(options))
        except TokensieveError as error:
            refused[setting] = str(error)
    return runs, refused


def _measured(run: Run, questions: int, encode: float) -> Unit:
    """Tokens, seconds and operations, each per question."""
    report = make_report(run)
    patches = report.patches
    tokens = {name: getattr(patches, name) / questions for name in ("uncompressed", "entered", "average", "last")}
    seconds = {stage: report.seconds.get(stage, 0.0) / questions for stage in ("compress", "prefill", "decode")}
    flops: dict[str, float | None] = {"prefill": None, "prefill_full": None, "encoder": None, "encoder_full": None}
    for stage, change in (("prefill", report.prefill), ("encoder", report.encoder)):
        if change is not None:
            flops |= {stage: change.after / questions, f"{stage}_full": change.before / questions}
    return {"tokens": tokens, "seconds": {"encode": encode, **seconds}, "flops": flops}


def _blame(error: Exception) -> str:
    """Memory can run out in the best of methods; all other errors of this kind are bugs."""
    return "" if "OutOfMemory" in type(error).__name__ else " (this is a bug)"


def _tower(methods: Sequence[Method]) -> Any:
    """The text tower that a composition names."""
    return next((tower for method in methods if (tower := getattr(method, "text_tower", None)) is not None), None)


def _paired(run: Run) -> bool:
    """Whether a run reads signals in the space that a text tower shares with the vision tower."""
    return any(SIGNALS[request.name].pair for request in run.requests)


def _seed_of(seed: int, setting: str, clip: str) -> int:
    """A seed of its own for every unit, so that results do not depend on what ran before."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{setting}/{clip}".encode()).digest()[:4], "big")
