"""Encoding a clip once for all methods and questions.

A vision encoder gives the same features whatever is done with them behind it. So each clip is encoded once, together
with every tower signal that some method reads, and each method gets the features as if it had encoded them itself.
Methods that act on frames or inside the tower are the exception: they encode on their own, once per clip.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from tokensieve.core.encode import EncodeCall
from tokensieve.core.layout import ItemKind
from tokensieve.core.method import Method
from tokensieve.core.runtime import Run
from tokensieve.core.sample import HostFacts
from tokensieve.core.tap import EncoderTap
from tokensieve.errors import HostError

__all__ = ["Collector", "Encoding", "encodes_itself", "given", "record"]


@dataclass
class Collector(Method):
    """Changes nothing and asks for signals on behalf of other methods.

    Parameters
    ----------
    wanted
        Requests for signals.
    text_tower
        Text tower for signals that need one, as the methods name it.
    """

    retention: float = 1.0
    wanted: tuple[str, ...] = ()
    text_tower: Any = None

    name: ClassVar[str] = "collector"
    stages: ClassVar[tuple[Any, ...]] = ("tokens",)
    kind: ClassVar[Any] = "none"

    def signals(self, facts: HostFacts) -> tuple[str, ...]:
        """What was wanted."""
        return self.wanted


@dataclass
class Encoding:
    """Features and signals of one clip.

    Attributes
    ----------
    outputs
        What the encoder returned for one prompt row, by modality.
    calls
        What is known of the calls.
    seconds
        Time of tower, projector and signals.
    """

    outputs: dict[ItemKind, Any] = field(default_factory=dict)
    calls: dict[ItemKind, EncodeCall] = field(default_factory=dict)
    seconds: float = 0.0


class _EncodedError(Exception):
    """Ends a forward pass once the features are there."""


def encodes_itself(methods: Sequence[Method]) -> bool:
    """Whether a composition changes what the encoder computes, so that it cannot take the features of others."""
    return any({"frames", "encoder"} & set(method.stages) and method.retention < 1.0 for method in methods)


def record(run: Run, inputs: Mapping[str, Any]) -> Encoding:
    """Encode the clip of one prompt row with what an attached run collects and changes; the LLM does not run.

    Parameters
    ----------
    run : Run
        Attached.
    inputs : mapping
        A batch of one row, on the model's device.

    Raises
    ------
    HostError
        When the model encodes nothing for these inputs.
    """
    tap, text = _tap(run), run.host.text_model(run.base)
    found = Encoding()

    def stop(module: Any, args: Any, kwargs: Any) -> None:
        raise _EncodedError

    def keep(modality: ItemKind, encode: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(encode)
        def kept(*args: Any, **kwargs: Any) -> Any:
            begun = time.perf_counter()
            output = encode(*args, **kwargs)
            _wait(run)
            found.seconds += time.perf_counter() - begun
            found.outputs[modality] = _slim(output)
            return output

        return kept

    handle = text.register_forward_pre_hook(stop, with_kwargs=True, prepend=True)
    try:
        with _replaced(run, keep), torch.inference_mode():
            run.model(**inputs, use_cache=False)
    except _EncodedError:
        found.calls = dict(tap.pending)
    finally:
        handle.remove()
        tap.pending = {}
    if not found.outputs:
        raise HostError("The model encoded no frames of this prompt; check the processor's output.")
    return found


@contextmanager
def given(run: Run, encoding: Encoding, rows: int) -> Iterator[None]:
    """Let an attached run take features encoded earlier, for ``rows`` prompt rows that show the same clip."""
    tap = _tap(run)

    def give(modality: ItemKind, encode: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(encode)
        def given_output(*args: Any, **kwargs: Any) -> Any:
            if modality not in encoding.outputs:
                return encode(*args, **kwargs)
            call = encoding.calls[modality]
            # Plans leave marks on the items of a call, so that every use needs items of its own.
            tap.pending[modality] = replace(call, items=[replace(item) for item in call.items])
            return _repeated(encoding.outputs[modality], rows)

        return given_output

    with _replaced(run, give):
        yield


@contextmanager
def _replaced(run: Run, make: Callable[[ItemKind, Callable[..., Any]], Callable[..., Any]]) -> Iterator[None]:
    """Replace the encoder functions of an attached run's model for a while."""
    names: dict[ItemKind, str] = {modality: f"get_{modality}_features" for modality in run.host.modalities}
    before = {name: getattr(run.base, name) for name in names.values()}
    for modality, name in names.items():
        setattr(run.base, name, make(modality, before[name]))
    try:
        yield
    finally:
        for name, encode in before.items():
            setattr(run.base, name, encode)


def _tap(run: Run) -> EncoderTap:
    """The run's listener at the encoder: what it holds of a call travels with the features."""
    return run._tap


def _wait(run: Run) -> None:
    device = next(run.model.parameters()).device
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _slim(output: Any) -> Any:
    """An encoder output with the features alone; states of the tower would fill the memory."""
    if not isinstance(output, dict):
        return output
    kept = {name: output[name] for name in ("pooler_output", "deepstack_features") if output.get(name) is not None}
    return type(output)(**kept)


def _repeated(output: Any, rows: int) -> Any:
    """The output for several rows with the same clip."""
    if isinstance(output, dict):
        fields = {name: _rows(value, rows) for name, value in output.items() if name != "deepstack_features"}
        if output.get("deepstack_features") is not None:
            fields["deepstack_features"] = [_rows(plane, rows) for plane in output["deepstack_features"]]
        return type(output)(**fields)
    return _rows(output, rows)


def _rows(value: Any, rows: int) -> Any:
    if isinstance(value, Tensor):
        return value if rows == 1 else torch.cat([value] * rows)
    return type(value)([*value] * rows)
