"""Shortening sequences inside the vision tower, and giving its output the length that the host expects.

Tokens merge between attention and feed-forward part of a block, or are dropped behind it. Everything happens in
hooks on the blocks of one tower; how many pictures run together is decided by an instance attribute in front of its
``forward``. Behind the tower every patch finds its place again: merged tokens stand at all places of their patches,
dropped ones leave zeros. The compactor removes what is not needed before the LLM runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from tokensieve.core.encode import EncodeCall
from tokensieve.core.method import Method
from tokensieve.core.sample import HostFacts
from tokensieve.core.tower import Block, TowerProgram, TowerSample
from tokensieve.errors import MethodError
from tokensieve.hosts.towers import PictureTower, TowerBlock
from tokensieve.ops.bipartite import TokenGroups, merge_weighted

GROUPS = "encoder.groups"
Sink = Callable[[Tensor, Tensor], None]


@dataclass
class Reduction:
    """Where the tokens of some pictures went so far.

    Attributes
    ----------
    program
        What the method does to them.
    group : Tensor [B, T]
        Present token that every first token became part of, -1 for dropped ones.
    size : Tensor [B, T']
        First tokens in every present one, float32.
    seen
        Tokens that attention and feed-forward part of every block saw.
    """

    program: TowerProgram
    group: Tensor
    size: Tensor
    seen: list[tuple[int, int]] = field(default_factory=list)
    merged: bool = False

    @classmethod
    def start(cls, program: TowerProgram, values: Tensor) -> Reduction:
        """Every token of ``values [B, T, D]`` for itself."""
        batch, tokens = values.shape[:2]
        group = torch.arange(tokens, device=values.device).repeat(batch, 1)
        return cls(program, group, torch.ones(batch, tokens, device=values.device))

    def bias(self, like: Tensor) -> Tensor | None:
        """Term [B, 1, 1, T'] of the attention logits for proportional attention; None while nothing is merged."""
        if not (self.program.proportional and self.merged):
            return None
        return self.size.log()[:, None, None, :].to(like.dtype)

    def merge(self, values: Tensor, groups: TokenGroups) -> Tensor:
        """Tokens averaged by size."""
        values, self.size = merge_weighted(values, self.size, groups)
        self._follow(groups.group)
        self.merged = True
        return values

    def drop(self, values: Tensor, keep: Tensor) -> Tensor:
        """Tokens at the places ``keep [B, T'']``."""
        place = torch.full_like(self.size, -1, dtype=torch.int64)
        place.scatter_(1, keep, torch.arange(keep.shape[1], device=keep.device).expand_as(keep))
        self.size = self.size.gather(1, keep)
        self._follow(place)
        return values.gather(1, keep.unsqueeze(2).expand(-1, -1, values.shape[2]))

    def restore(self, values: Tensor) -> Tensor:
        """Every first token as what became of it [B, T, D], zeros for dropped ones."""
        places = self.group.clamp(min=0).unsqueeze(2).expand(-1, -1, values.shape[2])
        return values.gather(1, places).masked_fill((self.group < 0).unsqueeze(2), 0.0)

    def _follow(self, place: Tensor) -> None:
        """Let the first tokens go where the present ones went."""
        moved = place.gather(1, self.group.clamp(min=0))
        self.group = moved.masked_fill(self.group < 0, -1)


class TowerStage:
    """Hooks on the blocks of one vision tower.

    Parameters
    ----------
    module
        The tower.
    tower
        How its family is built.
    facts
        About the host.
    method
        Method with an encoder stage.

    Raises
    ------
    MethodError
        When proportional attention is wanted but the attention kernel takes no bias.
    """

    def __init__(self, module: Any, tower: PictureTower, facts: HostFacts, method: Method) -> None:
        self.module, self.tower, self.facts, self.method = module, tower, facts, method
        self._original: Any = None
        self._shadowed: Any = None
        self._handles: list[Any] = []
        self._call: EncodeCall | None = None
        self._sink: Sink | None = None
        self._program: TowerProgram | None = None
        self._reduction: Reduction | None = None
        self._parts: dict[str, Tensor] = {}
        self._between: list[Tensor] = []

    def attach(self) -> None:
        """Install the hooks."""
        self._shadowed = vars(self.module).get("forward")
        self._original = self.module.forward
        self.module.__dict__["forward"] = self._forward
        for index, block in enumerate(self.tower.blocks(self.module)):
            self._hook_block(index, block)

    def detach(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        if self._original is not None:
            if self._shadowed is not None:
                self.module.__dict__["forward"] = self._shadowed
            else:
                del self.module.__dict__["forward"]
        self._original = self._shadowed = None
        self.end()

    def begin(self, call: EncodeCall, sink: Sink) -> None:
        """The tower is about to run for an encoder call.

        Parameters
        ----------
        sink
            Takes the group of every patch [pictures, N] (see the signal ``encoder.groups``) and the tokens that
            every block saw [pictures, layers, 2].
        """
        self._call, self._sink = call, sink

    def end(self) -> None:
        """Forget the call."""
        self._call = self._sink = self._program = self._reduction = None
        self._parts, self._between = {}, []

    # -- the tower as a whole ----------------------------------------------------------------------------------

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        if self._call is None:
            return self._original(*args, **kwargs)
        pixels = args[0] if args else kwargs.pop("pixel_values")
        outputs: list[Any] = []
        groups: list[Tensor] = []
        seen: list[list[tuple[int, int]]] = []
        first = 0
        for units, sample in self._pieces(pixels):
            self._program, self._reduction = self.method.tower_program(sample), None
            outputs.append(self._restored(self._original(pixels[units], *args[1:], **kwargs)))
            assert self._reduction is not None
            group = self._reduction.group[:, int(self.tower.class_token) :] - int(self.tower.class_token)
            starts = torch.arange(first, first + sample.pictures, device=group.device) * group.shape[1]
            groups.append(torch.where(group < 0, -1, group + starts[:, None]))
            seen += [self._reduction.seen] * sample.pictures
            first += sample.pictures
            self._program = self._reduction = None
        assert self._sink is not None
        self._sink(torch.cat(groups), torch.tensor(seen))
        return _joined(outputs)

    def _pieces(self, pixels: Tensor) -> Iterator[tuple[slice, TowerSample]]:
        """Pictures that run together."""
        assert self._call is not None
        items, total = self._call.items, pixels.shape[0]
        together = self.method.tower_together
        if together == "all":
            spans = [(slice(0, total), sum(item.layout.patches for item in items))]
        elif together == "item":
            spans = [(item.units, item.layout.patches) for item in items]
        else:
            share = {i: item.layout.patches for item in items for i in range(item.units.start, item.units.stop)}
            spans = [(slice(i, i + 1), share[i]) for i in range(total)]
        side_y, side_x = pixels.shape[-2:]
        patch = self.module.config.patch_size
        patch_y, patch_x = patch if isinstance(patch, (list, tuple)) else (patch, patch)
        for units, tokens in spans:
            yield (
                units,
                TowerSample(
                    pictures=units.stop - units.start,
                    patches=(side_y // patch_y) * (side_x // patch_x),
                    tokens=tokens,
                    is_video=self._call.modality == "video",
                    layers=self.facts.feature_layer + 1,
                    class_token=self.tower.class_token,
                    facts=self.facts,
                ),
            )

    def _restored(self, output: Any) -> Any:
        """The output with its features at the places of all patches; states of other layers are left out."""
        assert self._reduction is not None
        states = getattr(output, "hidden_states", None)
        if states is not None:
            place = self.facts.feature_layer + 1
            output.hidden_states = tuple(
                self._reduction.restore(state) if index == place else None for index, state in enumerate(states)
            )
        output.last_hidden_state = self._reduction.restore(output.last_hidden_state)
        return output

    # -- one block -----------------------------------------------------------------------------------------------

    def _hook_block(self, index: int, block: TowerBlock) -> None:
        if index <= self.facts.feature_layer:
            for part, module in self.tower.attended(block.attention).items():
                self._handles.append(module.register_forward_hook(self._keep(part)))
        self._handles += [
            block.attention.register_forward_pre_hook(self._before_attention, with_kwargs=True),
            block.norm.register_forward_pre_hook(self._before_norm(index, block)),
            block.feed.register_forward_hook(self._behind_feed),
            # In front of the hooks by which transformers records hidden states.
            block.layer.register_forward_hook(self._behind_block(index, block), prepend=True),
        ]

    def _keep(self, part: str) -> Callable[[nn.Module, Any, Tensor], None]:
        def hook(module: nn.Module, args: Any, output: Tensor) -> None:
            if self._program is not None:
                self._parts[part] = output.detach()

        return hook

    def _before_attention(self, module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        if self._program is None:
            return None
        values = args[0] if args else kwargs["hidden_states"]
        if self._reduction is None:
            self._reduction = Reduction.start(self._program, values)
        bias = self._reduction.bias(values)
        if bias is None:
            return None
        if "flash" in str(module.config._attn_implementation):
            raise MethodError(
                f"{self.method.name} adds a bias to the tower's attention, which flash attention cannot take; load "
                "the model with attn_implementation='sdpa', or switch proportional attention off."
            )
        return args, {**kwargs, "attention_mask": bias}

    def _view(self, index: int, block: TowerBlock) -> Block:
        heads = block.attention.num_heads
        q, k, v = (self._parts[part].unflatten(-1, (heads, -1)).transpose(1, 2) for part in ("q", "k", "v"))
        return Block(index, q, k, v, self.tower.class_token)

    def _before_norm(self, index: int, block: TowerBlock) -> Callable[[nn.Module, Any], Any]:
        def hook(module: nn.Module, args: Any) -> Any:
            if self._program is None or self._reduction is None:
                return None
            values, groups = args[0], None
            if index <= self.facts.feature_layer:
                with torch.no_grad():
                    groups = self._program.merge(self._view(index, block))
            before = values.shape[1]
            if groups is not None and groups.source.shape[1] < before:
                values = self._reduction.merge(values, groups)
                self._between = [values]
            self._reduction.seen.append((before, values.shape[1]))
            return (values,) if self._between else None

        return hook

    def _behind_feed(self, module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
        if self._program is None or not self._between:
            return None
        self._between.append(output)
        # The block adds this to tokens that are about to be replaced; one zero fits any length.
        return output.new_zeros(1, 1, 1)

    def _behind_block(self, index: int, block: TowerBlock) -> Callable[[nn.Module, Any, Any], Any]:
        def hook(module: nn.Module, args: Any, output: Any) -> Any:
            if self._program is None or self._reduction is None:
                return None
            values = output[0] if isinstance(output, tuple) else output
            if self._between:
                values, update = self._between
                values = values + (update if block.scale is None else block.scale * update)
                self._between = []
            if index <= self.facts.feature_layer:
                with torch.no_grad():
                    keep = self._program.drop(self._view(index, block))
                if keep is not None:
                    if self.tower.class_token:
                        keep = torch.cat((torch.zeros_like(keep[:, :1]), keep + 1), dim=1)
                    values = self._reduction.drop(values, keep)
            self._parts = {}
            return (values, *output[1:]) if isinstance(output, tuple) else values

        return hook


def _joined(outputs: list[Any]) -> Any:
    """One output of the tower from those of several runs over some of the pictures each."""
    if len(outputs) == 1:
        return outputs[0]
    whole = outputs[0]
    for name in ("last_hidden_state", "pooler_output"):
        if isinstance(getattr(whole, name, None), Tensor):
            setattr(whole, name, torch.cat([getattr(output, name) for output in outputs]))
    if getattr(whole, "hidden_states", None) is not None:
        layers = zip(*(output.hidden_states for output in outputs), strict=True)
        whole.hidden_states = tuple(None if states[0] is None else torch.cat(states) for states in layers)
    return whole
