"""What the commands that run a model have in common: methods, clip, model, prompt."""

from __future__ import annotations

import ctypes
import dataclasses
import gc
import json
import sys
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokensieve.cli._console import note
from tokensieve.cli._progress import Advance, step
from tokensieve.core.method import Method
from tokensieve.core.registry import method_class, parse
from tokensieve.errors import HostError, MethodError

if TYPE_CHECKING:
    from tokensieve.cli._generate import Answer
    from tokensieve.core.runtime import Run
    from tokensieve.measure.report import Report
    from tokensieve.prompt import Prompt
    from tokensieve.video import Clip


@dataclass
class Loaded:
    """A model ready to run.

    Attributes
    ----------
    name
        What the user called it.
    random_weights
        Whether its answers mean nothing.
    """

    model: Any
    processor: Any
    name: str
    random_weights: bool


def parse_methods(
    text: str, retention: float | None = None, settings: Sequence[str] | None = None, seed: int | None = None
) -> list[Method]:
    """Methods from the one-line notation and the options of the command line.

    Parameters
    ----------
    text
        ``name``, ``name:option=value`` or ``a+b``; options written here win.
    retention
        For every part that does not state its own.
    settings
        ``option=value``, given to the parts that have such an option.
    seed
        Given to the parts that draw at random and do not state their own.

    Raises
    ------
    MethodError
        For an unknown method, or an option that no part has.
    """
    names = [part.partition(":")[0].strip() for part in text.split("+")]
    known = [{field.name for field in dataclasses.fields(method_class(name))} for name in names]
    wanted = dict(_setting(pair) for pair in settings or ())
    for option in wanted:
        if not any(option in fields for fields in known):
            listed = ", ".join(sorted(set().union(*known)))
            raise MethodError(f"{text} has no option {option!r}; its options are {listed}.")
    general: dict[str, Any] = {} if retention is None else {"retention": retention}
    if seed is not None:
        general["seed"] = seed
    methods: list[Method] = []
    for part, fields in zip(text.split("+"), known, strict=True):
        methods += parse(part, {key: value for key, value in (general | wanted).items() if key in fields})
    for method in methods:
        _check_types(method)
    return methods


def _check_types(method: Method) -> None:
    """Raise MethodError for an option of another type than the method declares."""
    hints = typing.get_type_hints(type(method))
    for field in dataclasses.fields(method):
        value, hint = getattr(method, field.name), hints[field.name]
        if not _is_of(value, hint):
            wanted = field.type if isinstance(field.type, str) else getattr(hint, "__name__", str(hint))
            raise MethodError(f"The option {field.name} of {method.name} takes {wanted}, not {value!r}.")


def _is_of(value: Any, hint: Any) -> bool:
    """Whether a value is of a type; types that cannot be tested here pass."""
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_is_of(value, part) for part in typing.get_args(hint))
    if origin is typing.Literal:
        return value in typing.get_args(hint)
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if hint in (bool, str):
        return isinstance(value, hint)
    return value is None if hint is type(None) else True


def split_methods(text: str) -> list[str]:
    """Several methods in the one-line notation, separated by commas or blanks.

    A comma also separates the options of one method, so a piece that is only ``option=value`` belongs to the
    method before it.
    """
    found: list[str] = []
    for piece in text.replace(",", " ").split():
        if found and "=" in piece and ":" not in piece.partition("=")[0]:
            found[-1] += f",{piece}"
        else:
            found.append(piece)
    return found


def _setting(pair: str) -> tuple[str, Any]:
    key, equals, value = pair.partition("=")
    if not equals or not key.strip():
        raise MethodError(f"--set takes option=value, not {pair!r}.")
    try:
        return key.strip(), json.loads(value)
    except json.JSONDecodeError:
        return key.strip(), {"True": True, "False": False, "None": None}.get(value.strip(), value.strip())


def check_model(name: str | None, *choices: Sequence[Method], trust_remote_code: bool = False) -> None:
    """Raise what is wrong with a model, or between it and methods, before anything large is loaded.

    Parameters
    ----------
    name
        Folder or hub name; None for the demonstration model.
    *choices
        Methods that are to run together, once per choice.
    """
    if name is None:
        return
    from tokensieve.core.runtime import Run
    from tokensieve.hosts.registry import host_for
    from tokensieve.load import meta_model, read_config

    model = meta_model(read_config(name, trust_remote_code))
    for methods in choices:
        Run(model, host_for(model), methods)


def read_frames(video: str, frames: int, fps: float | None, start: float | None, end: float | None, show: bool) -> Clip:
    """Read a clip with a progress bar."""
    from tokensieve.errors import VideoError
    from tokensieve.video import read_clip

    if frames < 1:
        raise VideoError(f"--frames must be 1 or more, not {frames}.")
    with step("reading the video", show) as advance:
        if fps is None:
            return read_clip(video, frames, start=start, end=end, progress=advance)
        return read_clip(video, sampling="fps", fps=fps, max_frames=frames, start=start, end=end, progress=advance)


def open_model(
    name: str | None, dtype: str, device: str, attn: str | None, trust_remote_code: bool, show: bool
) -> Loaded:
    """Load a model, or the bundled one when none is named (and say so)."""
    from tokensieve.load import BUNDLED, load_model

    with step("loading the model", show):
        model, processor = load_model(name or BUNDLED, dtype, device, attn, trust_remote_code)
    random_weights = name is not None and (Path(name).expanduser() / "tiny.json").is_file()
    if name is None:
        note(
            "no --model was given, so the bundled model answers; it knows only the clips of 'tokensieve world', "
            "and what it says about others means nothing."
        )
    elif random_weights:
        note("this model has random weights: its answer means nothing.")
    return Loaded(model, processor, name or BUNDLED, random_weights)


def make_prompt(loaded: Loaded, clip: Clip, question: str, methods: Sequence[Method]) -> Prompt:
    """Build the inputs and pass the notes on."""
    from tokensieve.prompt import build_prompt

    whole_frames = any(method.uniform_views for method in methods)
    prompt = build_prompt(loaded.processor, clip, question, whole_frames=whole_frames)
    text = getattr(loaded.model.config, "text_config", loaded.model.config)
    limit = getattr(text, "max_position_embeddings", None)
    if limit is not None and prompt.tokens > limit:
        prompt.notes.append(
            f"the prompt has {prompt.tokens} tokens, more than the {limit} that the model was made for; "
            "use fewer --frames."
        )
    for sentence in prompt.notes:
        note(sentence)
    return prompt


def run_methods(
    loaded: Loaded, inputs: Mapping[str, Any], methods: Sequence[Method], max_new_tokens: int, show: bool
) -> tuple[Answer, Run]:
    """Answer with methods attached; the answer and the run, which is detached by then."""
    from tokensieve import compress
    from tokensieve.cli._generate import answer

    free_memory()
    title = f"answering ({title_of(methods)})"
    with step(title, show) as advance, compress(loaded.model, methods) as run:
        tick = partial(_tick, advance, max_new_tokens)
        found = answer(loaded.model, loaded.processor, inputs, max_new_tokens, tick)
    return found, run


def run_plain(loaded: Loaded, inputs: Mapping[str, Any], max_new_tokens: int, show: bool) -> Answer:
    """Answer with the model as it is, without any hook."""
    from tokensieve.cli._generate import answer

    free_memory()
    with step("answering (full model)", show) as advance:
        tick = partial(_tick, advance, max_new_tokens)
        return answer(loaded.model, loaded.processor, inputs, max_new_tokens, tick)


def _tick(advance: Advance, total: int, done: int) -> None:
    advance(done, total)


def remarks(report: Report) -> list[str]:
    """Sentences on requests that could not be met to the letter, because a clip or frame keeps a token."""
    from tokensieve.measure.text import in_percent

    found = []
    least = min((one.retention for one in report.requested), default=1.0)
    for item in report.items:
        frames, patches = len(item.frame_patches), item.patches
        wanted = least * patches.uncompressed
        if wanted < frames and patches.last > wanted:
            found.append(
                f"a retention of {least:g} is {wanted:.3g} of {patches.uncompressed} tokens, fewer than one for each "
                f"of {frames} frames; {patches.last} ({in_percent(patches.share('last'))}) were kept."
            )
    return list(dict.fromkeys(found))


def check_question(question: str) -> str:
    """The question itself, or an error when it is blank."""
    if not question.strip():
        raise HostError("The question is empty; ask something about the video.")
    return question


def describe_methods(methods: Sequence[Method]) -> list[dict[str, Any]]:
    """Names and options for JSON."""
    return [{"name": method.name, "options": method.options()} for method in methods]


def title_of(methods: Sequence[Method]) -> str:
    """Names joined as in the notation."""
    return "+".join(method.name for method in methods)


def free_memory() -> None:
    """Give back what an earlier measurement holds on to, so that the next one starts from the idle model."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if sys.platform == "linux":
        # The C library keeps freed memory in the process, where it would hide the growth of the next run.
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
