"""Listening to the vision encoder: which items it encoded, the signals it gave, and which frames it may skip."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tokensieve.core.encode import EncodeCall, EncodedItem
from tokensieve.core.layout import ItemKind
from tokensieve.core.method import Method
from tokensieve.core.packed_stage import PackedStage
from tokensieve.core.sample import FrameSample
from tokensieve.core.signals import SignalRequest
from tokensieve.core.states import STATE_SIGNALS, listen_states
from tokensieve.core.tower_stage import GROUPS, TowerStage
from tokensieve.errors import MethodError
from tokensieve.hosts.base import Host
from tokensieve.hosts.towers import PackedTower
from tokensieve.pairing.pair import TextPair

_CALL = "tokensieve_call"


class EncoderTap:
    """Wraps ``get_image_features`` and ``get_video_features`` of one model instance.

    Parameters
    ----------
    base
        The composite model without head.
    host
        Its family.
    requests
        Tower signals to collect.
    frame_method
        Method that drops frames before they are encoded, if any.
    clock
        Called with a stage name; returns a context manager that times it.
    tower_method
        Method that shortens sequences inside the tower, if any.
    pair
        Text tower of the vision tower, for signals in the space that both share.

    Raises
    ------
    MethodError
        When a method shortens sequences inside the tower while another reads signals from it.
    """

    def __init__(
        self,
        base: nn.Module,
        host: Host,
        requests: Sequence[SignalRequest],
        frame_method: Method | None,
        clock: Callable[[str], Any],
        tower_method: Method | None = None,
        pair: TextPair | None = None,
    ) -> None:
        self.base, self.host, self.pair = base, host, pair
        self.requests = requests
        self.frame_method = frame_method
        self.clock = clock
        self.pending: dict[ItemKind, EncodeCall] = {}
        self._tower: TowerStage | PackedStage | None = None
        if tower_method is not None and tower_method.retention < 1.0:
            for request in requests:
                if request.name != GROUPS:
                    raise MethodError(
                        f"{tower_method.name} shortens the sequence inside the vision tower, so that {request} cannot "
                        "be read there; compose it with methods that need no signal of the tower."
                    )
            module, tower, facts = host.tower_module(base), host.tower(base), host.facts(base)
            if isinstance(tower, PackedTower):
                self._tower = PackedStage(module, tower, facts, tower_method)
            else:
                self._tower = TowerStage(module, tower, facts, tower_method)
        self._active: EncodeCall | None = None
        self._handles: list[Any] = []
        self._wrapped: list[str] = []

    def attach(self) -> None:
        """Install the wrappers and the tower hooks."""
        for modality in self.host.modalities:
            name = f"get_{modality}_features"
            setattr(self.base, name, self._wrap(modality, getattr(self.base, name)))
            self._wrapped.append(name)
        tower = self.host.tower(self.base)
        if self._tower is not None:
            self._tower.attach()
        module = self.host.tower_module(self.base)
        states: dict[int, list[tuple[str, str]]] = {}
        for request in self.requests:
            if request.name == GROUPS:
                continue
            layer = self.host.resolve_layer(self.base, request)
            if request.name in STATE_SIGNALS:
                states.setdefault(layer, []).append((request.name, str(request)))
                continue
            self._handles += tower.listen(module, request.name, layer, self._collect, str(request), request.parameter)

        for layer, wanted in states.items():
            self._handles.append(listen_states(module, tower, layer, wanted, self.pair, self._collect))

    def detach(self) -> None:
        """Remove everything that `attach` installed."""
        for handle in self._handles:
            handle.remove()
        for name in self._wrapped:
            delattr(self.base, name)
        if self._tower is not None:
            self._tower.detach()
        self._handles, self._wrapped, self._active = [], [], None
        self.pending = {}

    def calls(self, encoded: Any) -> dict[ItemKind, EncodeCall]:
        """Encoder calls behind the features of the present forward pass; pending ones are used up.

        Parameters
        ----------
        encoded
            ``mm_encoder_outputs`` of the forward pass, if any: outputs that were computed earlier remember
            their call.
        """
        found: dict[ItemKind, EncodeCall] = {}
        for modality, output in (encoded or {}).items():
            call = getattr(output, _CALL, None)
            if call is not None:
                found[modality] = call
        found.update({key: call for key, call in self.pending.items() if key not in found})
        self.pending = {}
        return found

    def _collect(self, key: str, value: Tensor) -> None:
        if self._active is not None:
            self._active.raw[key] = value

    def _wrap(self, modality: ItemKind, original: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(original)

        @functools.wraps(original)
        def encode(*args: Any, **kwargs: Any) -> Any:
            if self._active is not None:
                return original(*args, **kwargs)
            bound = signature.bind(*args, **kwargs).arguments
            arguments = {**bound, **bound.pop("kwargs", {})}
            arguments.pop("kwargs", None)
            call = EncodeCall(modality, arguments)
            call.items = self.host.describe(self.base, call)
            self._active = call
            try:
                with self.clock("encode"):
                    output = self._run(original, call)
            finally:
                self._active = None
            call.forget_pixels()
            self.pending[modality] = call
            if not isinstance(output, tuple):
                setattr(output, _CALL, call)
            return output

        return encode

    def _run(self, original: Callable[..., Any], call: EncodeCall) -> Any:
        """The encoder on all frames, or on those that the frames-stage method keeps."""
        method = self.frame_method
        if method is None or call.modality != "video":
            return self._encode(original, call, call)
        keeps = []
        for index, item in enumerate(call.items):
            item.frames_kept = method.plan_frames(FrameSample(len(item.layout.views), index)).long().cpu()
            keeps.append(item.frames_kept)
        if not self.host.drops_frames or all(
            keep.numel() == len(item.layout.views) for keep, item in zip(keeps, call.items, strict=True)
        ):
            return self._encode(original, call, call)
        fewer = EncodeCall(call.modality, self.host.with_frames(self.base, call, keeps))
        fewer.items = self.host.describe(self.base, fewer)
        for item, encoded in zip(call.items, fewer.items, strict=True):
            item.fewer = (fewer, encoded)
        return _spread(self._encode(original, fewer, call), call)

    def _encode(self, original: Callable[..., Any], encoded: EncodeCall, call: EncodeCall) -> Any:
        """Run the encoder on the arguments of one call and keep what is learnt with another."""
        if self._tower is None:
            return original(**encoded.arguments)

        def keep(groups: Tensor, seen: Tensor) -> None:
            call.raw[GROUPS], call.tower_tokens = groups, seen

        self._tower.begin(encoded, keep)
        try:
            return original(**encoded.arguments)
        finally:
            self._tower.end()


def _spread(output: Any, call: EncodeCall) -> Any:
    """An encoder output of some frames, with zero features in the places of the frames left out.

    The places keep prompt and features the same length; the compactor removes them before the LLM runs.
    """
    places = [item.layout.of_views(item.frames_kept)[1] for item in call.items if item.frames_kept is not None]

    def grow(part: Tensor, item: EncodedItem, spots: Tensor) -> Tensor:
        if part.ndim == 3:
            assert item.frames_kept is not None
            frames = part.new_zeros(len(item.layout.views), *part.shape[1:])
            return frames.index_copy(0, item.frames_kept.to(part.device), part)
        total = item.layout.tokens
        if part.shape[0] < spots.numel():
            # Some versions append the closing separator later, in the composite forward pass.
            total, spots = total - 1, spots[:-1]
        tokens = part.new_zeros(total, part.shape[-1])
        return tokens.index_copy(0, spots.to(part.device), part)

    def spread(features: Any) -> Any:
        if isinstance(features, Tensor) and features.ndim == 2:
            parts = features.split([spots.numel() for spots in places])
            return torch.cat([grow(*each) for each in zip(parts, call.items, places, strict=True)])
        full = [grow(*each) for each in zip(features, call.items, places, strict=True)]
        return torch.stack(full) if isinstance(features, Tensor) else type(features)(full)

    output.pooler_output = spread(output.pooler_output)
    deepstack = getattr(output, "deepstack_features", None)
    if deepstack is not None:
        output.deepstack_features = [spread(plane) for plane in deepstack]
    return output
