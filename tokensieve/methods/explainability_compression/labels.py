"""Labels: how much every visual token contributed to an answer, by attention rollout weighted with gradients.

For each answer token the gradient of its logit runs back through the LLM. Layers report from the last to the first, and
the rollout ``R = R + mean_h((A * grad A)^+) R`` needs one row of R only, so that it is carried along as a vector while
the backward pass runs and no attention map of another layer is kept. Layers recompute their maps in the backward pass.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tokensieve.core.layout import ItemKind
from tokensieve.core.method import Method, Stage
from tokensieve.core.plan import Plan, keep_all
from tokensieve.core.runtime import Run, attached, base_model
from tokensieve.core.sample import HostFacts, TokenSample
from tokensieve.errors import MethodError
from tokensieve.hosts.base import Host
from tokensieve.hosts.registry import host_for
from tokensieve.methods.explainability_compression.method import ATTENTION
from tokensieve.ops.similarity import as_float32

Inputs = Mapping[str, Any]


@dataclass(frozen=True)
class Label:
    """One visual item of one answered prompt.

    Attributes
    ----------
    kind
        ``"image"`` or ``"video"``.
    attention : Tensor [N]
        What the mapper will see, float32 on the CPU.
    relevance : Tensor [N]
        R_v, mean over the answer tokens, float32 on the CPU.
    """

    kind: ItemKind
    attention: Tensor
    relevance: Tensor


def rollout_step(row: Tensor, attention: Tensor, gradient: Tensor) -> Tensor:
    """One layer of the rollout for one row of R: ``r + r mean_h((A * grad A)^+)`` (step 1).

    Parameters
    ----------
    row : Tensor
        ``[S]`` float32, the row behind the layers above.
    attention, gradient : Tensor
        ``[H, S, S]`` map of the layer and gradient of the logit with respect to it.

    Returns
    -------
    Tensor
        ``[S]`` float32.
    """
    moved = torch.zeros_like(row)
    for one, other in zip(attention, gradient, strict=True):
        moved += row @ (as_float32(one) * as_float32(other)).clamp_(min=0).to(row.dtype)
    return row + moved / attention.shape[0]


def answer(model: Any, inputs: Inputs, max_new_tokens: int = 16) -> Tensor:
    """Greedy answer of the uncompressed model, ids [n] without end tokens."""
    with torch.no_grad():
        ids = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)[0]
    new = ids[inputs["input_ids"].shape[1] :]
    ends = model.generation_config.eos_token_id
    ends = torch.tensor(ends if isinstance(ends, list) else [] if ends is None else [ends], device=new.device)
    stop = torch.isin(new, ends).nonzero()
    return new[: int(stop[0])] if stop.numel() else new


def label(model: nn.Module, inputs: Inputs, answer_ids: Tensor, recompute: bool = True) -> list[Label]:
    """Labels of the visual items of one prompt for one answer (steps 1 to 3 and 5).

    Parameters
    ----------
    model
        A supported model without a method attached. It runs with eager attention meanwhile.
    inputs
        One prompt, as its processor gives it.
    answer_ids : Tensor
        ``[n]`` tokens of the answer, at least one.
    recompute
        Layers recompute their attention maps in the backward pass instead of keeping them all.

    Returns
    -------
    list of Label
        In the order of the prompt.

    Raises
    ------
    MethodError
        For several prompts at once, an empty answer, a model that carries a run, or attention without maps.
    """
    ids = inputs["input_ids"]
    if ids.shape[0] != 1 or answer_ids.numel() == 0:
        raise MethodError(
            f"labels are made for one prompt with an answer, not for {ids.shape[0]} prompts and {answer_ids.numel()} "
            "answer tokens."
        )
    if attached(model) is not None:
        raise MethodError("labels belong to the uncompressed model; detach its method first.")
    host, base = host_for(model), base_model(model)
    items = _inputs_of_items(model, host, inputs)
    places = _places(base, host, ids[0], items)
    relevance = _relevance(model, host, inputs, answer_ids.to(ids.device), recompute)
    return [
        Label(sample.layout.kind, sample.signal(ATTENTION).float().cpu(), relevance[place].float().cpu())
        for sample, place in zip(items, places, strict=True)
    ]


@dataclass
class _Reader(Method):
    """Keeps every token and remembers what the mapper would see."""

    retention: float = 0.5
    seen: list[TokenSample] = field(default_factory=list)

    name: ClassVar[str] = "reader"
    stages: ClassVar[tuple[Stage, ...]] = ("tokens",)

    def signals(self, facts: HostFacts) -> tuple[str, ...]:
        return (ATTENTION,)

    def plan_tokens(self, sample: TokenSample) -> Plan:
        self.seen.append(sample)
        return keep_all(sample.layout.patches)


def _inputs_of_items(model: nn.Module, host: Host, inputs: Inputs) -> list[TokenSample]:
    reader = _Reader()
    with torch.no_grad(), Run(model, host, [reader]):
        base_model(model)(**inputs, use_cache=False)
    return reader.seen


def _places(base: Any, host: Host, ids: Tensor, items: list[TokenSample]) -> list[Tensor]:
    """Places of the patches of every item in the prompt."""
    visual = [host.placeholder_id(base, kind) for kind in host.modalities]
    spots = torch.isin(ids, torch.tensor([x for x in visual if x is not None], device=ids.device)).nonzero()[:, 0]
    places, start = [], 0
    for item in items:
        places.append(spots[start + item.layout.patch_tokens.to(spots.device)])
        start += item.layout.tokens
    if start != spots.numel():
        raise MethodError(
            f"the prompt has {spots.numel()} visual placeholders, but its items {start} tokens; build the inputs "
            "without a processor that leaves tokens out."
        )
    return places


def _relevance(model: Any, host: Host, inputs: Inputs, answer_ids: Tensor, recompute: bool) -> Tensor:
    """Mean over the answer tokens of the last row of R [S]."""
    base = base_model(model)
    layers: Any = host.layers(base)
    prompt = inputs["input_ids"].shape[1]
    longer = _with_answer(inputs, answer_ids[:-1])
    rollout = _Rollout(len(layers))
    starts: list[Tensor] = []

    def begin(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        start = kwargs["inputs_embeds"].detach().requires_grad_(True)
        starts.append(start)
        return args, {**kwargs, "inputs_embeds": start}

    with _eager(model), rollout.listening(layers, recompute):
        hook = host.text_model(base).register_forward_pre_hook(begin, with_kwargs=True)
        try:
            with torch.enable_grad():
                output = model(**longer, use_cache=False, logits_to_keep=answer_ids.numel())
                # Some families ignore the wish for the last logits only.
                logits = output.logits[0, -answer_ids.numel() :]
                total = torch.zeros(longer["input_ids"].shape[1], device=logits.device)
                for step, token in enumerate(answer_ids.tolist()):
                    last = step + 1 == answer_ids.numel()
                    total += rollout.of(logits[step, token], starts[0], prompt - 1 + step, retain=not last)
        finally:
            hook.remove()
    return total / answer_ids.numel()


def _with_answer(inputs: Inputs, ids: Tensor) -> dict[str, Any]:
    """The prompt followed by the first answer tokens, with everything that runs alongside its ids."""
    extended = dict(inputs)
    extra = {"input_ids": ids[None], "attention_mask": torch.ones_like(ids)[None]}
    for name in ("mm_token_type_ids", "token_type_ids"):
        if name in inputs:
            extra[name] = torch.zeros_like(ids)[None]
    for name, tail in extra.items():
        if name in inputs:
            extended[name] = torch.cat((inputs[name], tail.to(inputs[name])), dim=1)
    return extended


@contextmanager
def _eager(model: Any) -> Iterator[None]:
    """Eager attention, which gives out its maps, and evaluation mode."""
    text = model.config.get_text_config()
    before, training = text._attn_implementation, model.training
    towers = {name: config._attn_implementation for name, config in _sub_configs(model)}
    model.set_attn_implementation("eager")
    model.eval()
    try:
        yield
    finally:
        model.set_attn_implementation({"": before, **towers})
        model.train(training)


def _sub_configs(model: Any) -> list[tuple[str, Any]]:
    names = getattr(model.config, "sub_configs", {})
    return [(name, getattr(model.config, name)) for name in names if getattr(model.config, name, None) is not None]


class _Rollout:
    """Carries one row of R through the layers while a backward pass runs."""

    def __init__(self, layers: int) -> None:
        self.maps: list[Tensor | None] = [None] * layers
        self.row: Tensor | None = None
        self.reported: list[int] = []
        self._backward = False
        self._recompute = False

    @contextmanager
    def listening(self, layers: Any, recompute: bool) -> Iterator[None]:
        """Hooks on the attention of all layers; with ``recompute`` their forward passes are checkpointed."""
        self._recompute = recompute
        handles = [
            layer.self_attn.register_forward_hook(functools.partial(self._report, index))
            for index, layer in enumerate(layers)
        ]
        shadowed = [vars(layer).get("forward") for layer in layers] if recompute else []
        if recompute:
            for layer in layers:
                layer.__dict__["forward"] = functools.partial(checkpoint, layer.forward, use_reentrant=False)
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            for layer, before in zip(layers, shadowed, strict=False):
                if before is None:
                    del layer.__dict__["forward"]
                else:
                    layer.__dict__["forward"] = before

    def of(self, logit: Tensor, start: Tensor, place: int, retain: bool) -> Tensor:
        """Last row of R for the logit that the token at ``place`` gives [S]."""
        self.row = torch.zeros(start.shape[1], device=logit.device)
        self.row[place] = 1.0
        self.reported, self._backward = [], True
        try:
            torch.autograd.grad(logit, start, retain_graph=retain)
        finally:
            self._backward = False
        if self.reported != list(range(len(self.maps)))[::-1]:
            raise MethodError(
                "the layers of this model do not report their attention maps from the last to the first; labels cannot "
                "be made for it."
            )
        return self.row

    def _report(self, index: int, module: nn.Module, args: Any, output: Any) -> None:
        weights = output[1] if isinstance(output, tuple) and len(output) > 1 else None
        if weights is None:
            raise MethodError(
                "the attention of this model gives no maps even when eager; labels cannot be made for it."
            )
        if self._backward:
            self.maps[index] = weights.detach()
        elif weights.requires_grad:
            if not self._recompute:
                self.maps[index] = weights.detach()
            weights.register_hook(functools.partial(self._step, index))

    def _step(self, index: int, gradient: Tensor) -> None:
        weights = self.maps[index]
        assert weights is not None and self.row is not None
        self.row = rollout_step(self.row.to(weights.device), weights[0], gradient[0].detach())
        self.reported.append(index)
        if self._recompute:
            self.maps[index] = None
