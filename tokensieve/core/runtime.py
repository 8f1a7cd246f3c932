"""Attaching methods to a model: hooks on one instance, removed without a trace."""

from __future__ import annotations

import inspect
from collections import deque
from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tokensieve.core.cache import cache_of
from tokensieve.core.compactor import (
    Compaction,
    gather_planes,
    gather_positions,
    gather_sequence,
    renumbered,
)
from tokensieve.core.compose import check_composition
from tokensieve.core.decoder import DecoderStage
from tokensieve.core.first_attention import FIRST, FirstAttention
from tokensieve.core.ledger import Ledger
from tokensieve.core.loss import ShorterLabels
from tokensieve.core.masks import is_preallocated, padding_mask
from tokensieve.core.method import Method
from tokensieve.core.prefill import Planner, PromptItem, Tracked, compact, locate, pair_text
from tokensieve.core.prompt_state import Prompt
from tokensieve.core.signals import SignalRequest
from tokensieve.core.tap import EncoderTap
from tokensieve.core.trace import Clock, PrefillTrace
from tokensieve.core.words import PromptWords, pair_for, prompt_requests
from tokensieve.errors import HostError, MethodError, SignalError
from tokensieve.hosts.base import Host
from tokensieve.measure.memory import PeakMemory
from tokensieve.pairing.pair import TextPair

if TYPE_CHECKING:
    from tokensieve.measure.report import Report

_MARK = "_tokensieve_run"
HISTORY = 64


class Run:
    """Methods attached (or about to be attached) to one model.

    Use as a context manager, or call `attach` and later `detach`.

    Attributes
    ----------
    model, host, methods
        What runs on what.
    facts
        Numbers about the host.
    history
        Traces of the last prefills with visual tokens (at most 64).
    """

    def __init__(self, model: nn.Module, host: Host, methods: Sequence[Method]) -> None:
        self.model, self.host = model, host
        self.base = base_model(model)
        self.facts = host.facts(self.base)
        self.methods = list(methods)
        check_composition(self.methods)
        for method in self.methods:
            method.check_host(self.facts)
        check_composition(self.methods, self.facts)
        self.requests = tower_requests(self.base, host, self.methods, self.facts)
        self.clock = Clock()
        self.memory = PeakMemory(next(model.parameters()).device)
        self.history: deque[PrefillTrace] = deque(maxlen=HISTORY)
        frame_method = next((m for m in self.methods if "frames" in m.stages), None)
        tower_method = next((m for m in self.methods if "encoder" in m.stages), None)
        pair = pair_for(self.base, host, self.methods, self.facts)
        self._words = self._prompt_words(pair)
        self._tap = EncoderTap(self.base, host, self.requests, frame_method, self.clock, tower_method, pair)
        self._planner = Planner(self.base, host, self.facts, self.methods, self.requests, self._words)
        asking = [m for m in self.methods if m.retention < 1.0 and FIRST in m.signals(self.facts)]
        self._first = FirstAttention(host, self.base) if asking else None
        deciding = [m for m in self.methods if {"frames", "tokens"} & set(m.stages)]
        self.positions = deciding[0].position_policy if deciding and self.facts.position_axes == 1 else "original"
        decoder_methods = [m for m in self.methods if "decoder" in m.stages]
        gaps = self.positions == "original" and bool(deciding)
        self._decoder = DecoderStage(self.base, host, self.facts, decoder_methods, self.methods, gaps, self.clock)
        self._handles: list[Any] = []
        self._loss = ShorterLabels(model)
        self._ids: Tensor | None = None
        self._arguments: dict[str, Any] = {}
        self._compaction: Compaction | None = None
        self._ledger: Ledger | None = None
        self._offset: Tensor | None = None

    def _prompt_words(self, pair: TextPair | None) -> PromptWords | None:
        """Reader of the prompts for the method in front of the LLM, where it asks for their words."""
        asking = next((m for m in self.methods if "tokens" in m.stages), None)
        requests = prompt_requests(asking, self.facts) if asking is not None else []
        return PromptWords(self.model, self.base, self.host, asking, requests, pair) if requests else None

    # -- attaching -------------------------------------------------------------------------------------------

    def attach(self) -> Run:
        """Install the hooks; raises MethodError when the model already carries a run."""
        if _MARK in vars(self.model):
            raise MethodError("This model already has a method attached; detach it first, or compose methods with '+'.")
        setattr(self.model, _MARK, self)
        try:
            self._install()
        except Exception:
            self.detach()
            raise
        self.memory.start()
        return self

    def _install(self) -> None:
        text = self.host.text_model(self.base)
        self._signature = inspect.signature(self.base.forward)
        self._loss.wrap(lambda: self._compaction)
        self._tap.attach()
        self._decoder.attach()
        self._handles = [
            self.base.register_forward_pre_hook(self._before_base, with_kwargs=True, prepend=True),
            self.base.register_forward_hook(self._after_base, always_call=True),
            text.register_forward_pre_hook(self._before_llm, with_kwargs=True),
            text.register_forward_hook(self._after_llm, with_kwargs=True, always_call=True),
        ]

    def detach(self) -> None:
        """Remove the hooks and restore the model; harmless when nothing is attached."""
        if vars(self.model).get(_MARK) is not self:
            return
        self.memory.stop()
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._decoder.detach()
        self._tap.detach()
        self._loss.unwrap()
        delattr(self.model, _MARK)

    def __enter__(self) -> Run:
        return self.attach()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.detach()

    @property
    def report(self) -> Report:
        """Tokens, times, FLOPs and memory of the run so far (see `tokensieve.measure.report`)."""
        from tokensieve.measure.from_run import make_report

        return make_report(self)

    def reset(self) -> None:
        """Forget traces, times and the memory peak, for example after a warm-up."""
        self.history.clear()
        self.clock.reset()
        self.memory.start()

    # -- the forward pass ------------------------------------------------------------------------------------

    def _before_base(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        bound = self._signature.bind_partial(*args, **kwargs).arguments
        ids = bound.get("input_ids")
        self._ids = None if ids is None else ids.detach()
        self._arguments = bound | bound.pop("kwargs", {})

    def _after_base(self, module: nn.Module, args: Any, output: Any) -> None:
        self._ids, self._arguments = None, {}

    def _before_llm(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        embeds = kwargs.get("inputs_embeds")
        if embeds is None:
            # Somebody calls the language model alone, with token ids: nothing visual can be in there.
            return None
        self.clock.start("prefill" if embeds.shape[1] > 1 else "decode")
        cache = cache_of(kwargs)
        ledger = Ledger.of(cache)
        self._compaction, self._offset, self._ledger = None, None, ledger
        calls = self._tap.calls(self._arguments.get("mm_encoder_outputs"))
        if ledger is not None:
            ledger.inside = True
        items: list[PromptItem] = []
        if calls:
            if self._ids is None:
                raise HostError(
                    "Compression needs input_ids to find the visual placeholders; pass ids, not embeddings."
                )
            items = locate(self.base, self.host, calls, self._ids.cpu(), self._arguments)
        if items:
            if self._words is not None and self._ids is not None:
                self._words.begin(self._ids)
            kwargs = self._compress(items, kwargs, cache, ledger)
        elif ledger is not None:
            kwargs = self._continue(kwargs, cache, ledger)
        return args, kwargs

    def _compress(
        self, items: list[PromptItem], kwargs: dict[str, Any], cache: Any, ledger: Ledger | None
    ) -> dict[str, Any]:
        """Plan every item, shorten the sequence and hand the batch to the decoder stage."""
        embeds = kwargs["inputs_embeds"]
        batch, length = embeds.shape[:2]
        pasts, seen = _past_masks(cache, ledger, batch, kwargs.get("attention_mask"), length)
        given = padding_mask(kwargs.get("attention_mask"), batch, seen + length)
        real = torch.ones(batch, length, dtype=torch.bool) if given is None else given[:, -length:]
        with self.clock("compress"):
            counters = dict.fromkeys(range(batch), 0)
            pair_text(items, real)
            if self._first is not None:
                own = self._own_positions(kwargs, length, ledger, seen)
                self._first.fill(items, embeds, real, pasts[0], own, cache)
            for item in items:
                self._planner.plan(item, embeds[item.row], counters[item.row])
                counters[item.row] += 1
            compaction, tracked, trace, replacements = compact(items, real)
            kwargs = self._shorten(kwargs, compaction, tracked, replacements)
        positions, offset = self._positions(kwargs, compaction, ledger, seen)
        kwargs["position_ids"] = positions
        keys = torch.cat((pasts[0], compaction.real), 1)
        # Gaps in the positions look like packed sequences to mask creation when there is neither mask nor cache.
        kwargs["attention_mask"] = keys.to(embeds.device)
        self.history.append(trace)
        self._compaction = compaction
        single = positions if positions is not None and positions.ndim == 2 else None
        prompt = Prompt(compaction.real, pasts, tracked, items, trace, single)
        earlier = dict(ledger.spans) if ledger is not None else {}
        self._decoder.begin(prompt, compaction.removed, earlier, kwargs["inputs_embeds"])
        self._offset = offset
        return kwargs

    def _shorten(
        self,
        kwargs: dict[str, Any],
        compaction: Compaction,
        tracked: Tracked,
        replacements: list[tuple[int, Tensor, Tensor]],
    ) -> dict[str, Any]:
        """Gather everything that runs alongside the sequence."""
        kwargs = dict(kwargs)
        embeds = kwargs["inputs_embeds"]
        if not compaction.is_identity:
            embeds = gather_sequence(embeds, compaction.index)
        elif replacements:
            embeds = embeds.clone()
        for row, spots, rows in replacements:
            embeds = embeds.clone() if embeds.requires_grad else embeds
            embeds[row, spots.to(embeds.device)] = rows.to(embeds)
        kwargs["inputs_embeds"] = embeds
        planes = kwargs.get("deepstack_visual_embeds")
        patches = tracked.patch >= 0
        if planes is not None and not (compaction.is_identity and bool((patches == (tracked.item >= 0)).all())):
            kwargs["deepstack_visual_embeds"], kwargs["visual_pos_masks"] = gather_planes(
                planes, kwargs["visual_pos_masks"], compaction, patches
            )
        return kwargs

    def _own_positions(self, kwargs: dict[str, Any], length: int, ledger: Ledger | None, seen: int) -> Tensor:
        """Positions of the batch before it is shortened, as its layers would count them."""
        positions = kwargs.get("position_ids")
        if positions is None:
            positions = (torch.arange(length) + seen)[None].to(kwargs["inputs_embeds"].device)
            if self.facts.position_axes > 1:
                positions = positions.expand(self.facts.position_axes, 1, -1)
        positions = positions[..., -length:]
        shifted = ledger is not None and ledger.offset is not None and positions.ndim == 2
        return positions - ledger.offset.to(positions.device) if shifted else positions  # type: ignore[union-attr]

    def _positions(
        self, kwargs: dict[str, Any], compaction: Compaction, ledger: Ledger | None, seen: int
    ) -> tuple[Tensor | None, Tensor | None]:
        """Positions of the shortened batch, and the offset [B, 1] of all later positions."""
        positions = kwargs.get("position_ids")
        before = ledger.offset if ledger is not None else None
        if positions is None:
            if self.facts.position_axes > 1:
                return None, before
            positions = (torch.arange(compaction.length) + seen)[None].to(kwargs["inputs_embeds"].device)
        positions = positions[..., -compaction.length :]
        if positions.ndim == 3 and positions.shape[0] == 4:
            # The first of four rows only tells sequences apart; gaps in it would look like packing.
            rows = gather_positions(positions, compaction.index).clone()
            rows[0] = renumbered(positions[0], compaction).to(rows)
            return rows, before
        if self.positions == "original" or positions.ndim == 3 or compaction.is_identity:
            shifted = positions if before is None else positions - before.to(positions.device)
            return gather_positions(shifted, compaction.index), before
        if before is not None:
            positions = positions - before.to(positions.device)
        fresh = renumbered(positions, compaction)
        offset = positions.amax(1, keepdim=True) - fresh.amax(1, keepdim=True)
        if before is not None:
            offset = offset + before.to(offset.device)
        return fresh, offset.cpu()

    def _continue(self, kwargs: dict[str, Any], cache: Any, ledger: Ledger) -> dict[str, Any]:
        """A pass without new visual tokens on a compacted cache: decoding, or a later turn of text."""
        kwargs = dict(kwargs)
        embeds = kwargs["inputs_embeds"]
        batch, length = embeds.shape[:2]
        physical = int(cache.layers[0].get_seq_length()) + length
        span = ledger.spans[0]
        given = padding_mask(kwargs.get("attention_mask"), batch, physical + span.removed)
        padded = given is not None and not bool(given.all())
        if padded or any(s.ragged for s in ledger.spans.values()):
            kwargs["attention_mask"] = span.mask(physical, given).to(embeds.device)
        else:
            kwargs["attention_mask"] = None
        positions = kwargs.get("position_ids")
        if positions is None and self.facts.position_axes == 1:
            start = physical - length + span.removed
            positions = (torch.arange(length, device=embeds.device) + start)[None]
        if positions is not None and positions.shape[-1] > length:
            positions = positions[..., -length:]
        if positions is not None and positions.ndim == 2 and ledger.offset is not None:
            positions = positions - ledger.offset.to(positions.device)
        kwargs["position_ids"] = positions
        # One query on growing, unpadded caches needs no mask at any layer, unless the kernel always takes one.
        shifted = any(s.offset is not None for s in ledger.spans.values())
        always = len(ledger.spans) > 1 and not self._decoder.skips_masks
        selecting = self._decoder.decoding.begin(ledger, given, length)
        if (
            selecting
            or shifted
            or always
            or kwargs["attention_mask"] is not None
            or length > 1
            or is_preallocated(cache)
        ):
            self._decoder.decoding.step(ledger, given, positions)
        return kwargs

    def _after_llm(self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        self.clock.stop("prefill")
        self.clock.stop("decode")
        if self._ledger is not None:
            self._ledger.inside = False
        if self._decoder.prompt is not None and output is not None:
            cache = cache_of(output) or cache_of(kwargs)
            if cache is not None:
                ledger = self._ledger or Ledger()
                ledger.spans, ledger.offset, ledger.memory = dict(self._decoder.spans), self._offset, []
                ledger.bind(cache)
        self._offset, self._ledger = None, None
        self._decoder.end()


def _past_masks(
    cache: Any, ledger: Ledger | None, batch: int, given: Any, length: int
) -> tuple[dict[int, Tensor], int]:
    """Padding masks of the cached entries by first layer, and the length of the conversation so far."""
    if ledger is not None:
        first = ledger.spans[0]
        seen = int(cache.layers[0].get_seq_length()) + first.removed
        mask = padding_mask(given, batch, seen + length)
        past = None if mask is None else mask[:, :seen]
        pasts = {
            layer: span.mask(int(cache.layers[layer].get_seq_length()), past) for layer, span in ledger.spans.items()
        }
        return pasts, seen
    seen = int(cache.get_seq_length()) if cache is not None else 0
    mask = padding_mask(given, batch, seen + length)
    past = torch.ones(batch, seen, dtype=torch.bool) if mask is None else mask[:, :seen]
    return {0: past}, seen


def base_model(model: nn.Module) -> nn.Module:
    """The composite model inside a ``...ForConditionalGeneration`` (or the model itself)."""
    base = getattr(model, "base_model", model)
    return base if isinstance(base, nn.Module) else model


def attached(model: nn.Module) -> Run | None:
    """The run that a model carries, if any."""
    return vars(model).get(_MARK)


def tower_requests(base: nn.Module, host: Host, methods: Sequence[Method], facts: Any) -> list[SignalRequest]:
    """Tower signals that the methods need, or a SignalError that names the methods that would work."""
    requests: dict[str, SignalRequest] = {}
    for method in methods:
        for text in method.signals(facts):
            request = SignalRequest.parse(text)
            if host.availability(request.name, base, getattr(method, "text_tower", None)) == "absent":
                from tokensieve.core.registry import fitting_methods

                raise SignalError(
                    f"{method.name} needs {request.name}, which {host.slug} cannot give: "
                    f"{host.why_absent(request.name)}; methods that work here: "
                    f"{', '.join(fitting_methods(host, base))}."
                )
            if request.name.startswith("encoder."):
                host.resolve_layer(base, request)
                requests[str(request)] = request
    return list(requests.values())
