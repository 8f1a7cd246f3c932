"""Dropping patches inside towers that take all pictures as one sequence and join squares of patches at the end.

Every visual item runs alone, its temporal steps as a batch. What is left is joined in the order in which it stands,
four by four, as the released code of FlowCut does; each of these tokens takes the place of its first patch, the
other places are zeros.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tokensieve.core.encode import EncodeCall
from tokensieve.core.method import Method
from tokensieve.core.sample import HostFacts
from tokensieve.core.tower import Block, TowerProgram, TowerSample
from tokensieve.core.tower_stage import Reduction, Sink
from tokensieve.errors import MethodError
from tokensieve.hosts.towers import PackedTower


class PackedStage:
    """Hooks on the blocks of one packed tower.

    Parameters
    ----------
    module
        The tower.
    tower
        How its family is built.
    facts
        About the host.
    method
        Method with an encoder stage that only drops.
    """

    def __init__(self, module: Any, tower: PackedTower, facts: HostFacts, method: Method) -> None:
        self.module, self.tower, self.facts, self.method = module, tower, facts, method
        self._original: Any = None
        self._shadowed: Any = None
        self._handles: list[Any] = []
        self._call: EncodeCall | None = None
        self._sink: Sink | None = None
        self._program: TowerProgram | None = None
        self._reduction: Reduction | None = None
        self._frames = 0
        self._tables: tuple[Tensor, Tensor] | None = None
        self._parts: dict[str, Tensor] = {}
        self._kept: Tensor | None = None

    def attach(self) -> None:
        """Install the hooks."""
        self._shadowed = vars(self.module).get("forward")
        self._original = self.module.forward
        self.module.__dict__["forward"] = self._forward
        blocks: Any = self.module.get_submodule(self.tower.layers_path)
        for index, (block, attention) in enumerate(zip(blocks, self.tower.attentions(self.module), strict=True)):
            projections = self.tower.projections(attention)
            decide = self._decide(index, attention)
            for part, projection in projections.items():
                last = decide if part == list(projections)[-1] else None
                self._handles.append(projection.register_forward_hook(self._keep(part, last)))
            self._handles += [
                block.register_forward_pre_hook(self._before_block, with_kwargs=True),
                block.register_forward_hook(self._behind_block(index), prepend=True),
            ]

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
        """The tower is about to run for an encoder call; see `TowerStage.begin`.

        Groups are given for every patch, times the patches of a temporal step, so that they pool to the group of the
        token; blocks are given as seen by every patch.
        """
        self._call, self._sink = call, sink

    def end(self) -> None:
        """Forget the call."""
        self._call = self._sink = self._program = self._reduction = self._tables = self._kept = None
        self._parts = {}

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        if self._call is None:
            return self._original(*args, **kwargs)
        pixels = args[0] if args else kwargs.pop("hidden_states")
        grids = kwargs.pop("grid_thw") if "grid_thw" in kwargs else args[1]
        outputs: list[Any] = []
        groups: list[Tensor] = []
        seen: list[Tensor] = []
        for item, grid in zip(self._call.items, grids, strict=True):
            steps = len(item.layout.views)
            count = (item.units.stop - item.units.start) // steps
            sample = TowerSample(
                pictures=steps,
                patches=count,
                tokens=item.layout.patches,
                is_video=self._call.modality == "video",
                layers=self.facts.feature_layer + 1,
                class_token=False,
                facts=self.facts,
            )
            self._program, self._reduction, self._frames = self.method.tower_program(sample), None, steps
            output = self._original(pixels[item.units], grid_thw=grid[None], **kwargs)
            assert self._reduction is not None
            group = self._restore(output, self._reduction, count)
            groups.append(group * count)
            layers = torch.tensor(self._reduction.seen, dtype=torch.int32)
            seen.append(layers.expand(group.numel(), -1, -1))
            outputs.append(output)
            self._program = self._reduction = None
        assert self._sink is not None
        self._sink(torch.cat(groups).float(), torch.cat(seen))
        whole = outputs[0]
        for name in ("last_hidden_state", "pooler_output"):
            setattr(whole, name, torch.cat([getattr(output, name) for output in outputs]))
        return whole

    def _restore(self, output: Any, reduction: Reduction, count: int) -> Tensor:
        """Tokens of an output at their places; the group of every patch [steps * count], -1 for empty places."""
        square = self.module.spatial_merge_size**2
        left = reduction.size.shape[1]
        steps = reduction.group.shape[0]
        alive = (reduction.group >= 0).nonzero()[:, 1].view(steps, left)
        start = torch.arange(steps, device=alive.device)[:, None] * (count // square)
        token = (alive[:, ::square] // square + start).flatten()
        merged = output.pooler_output
        spread = merged.new_zeros(steps * count // square, merged.shape[-1])
        output.pooler_output = spread.index_copy(0, token.to(merged.device), merged)
        states = output.last_hidden_state
        rows = (alive + torch.arange(steps, device=alive.device)[:, None] * count).flatten()
        full = states.new_zeros(steps * count, states.shape[-1])
        output.last_hidden_state = full.index_copy(0, rows.to(states.device), states)
        group = torch.full((steps * count // square,), -1, device=token.device)
        group[token] = torch.arange(token.numel(), device=token.device)
        return group.repeat_interleave(square)

    def _keep(self, part: str, then: Callable[[], None] | None) -> Callable[[nn.Module, Any, Tensor], None]:
        def hook(module: nn.Module, args: Any, output: Tensor) -> None:
            if self._program is not None:
                self._parts[part] = output.detach()
                if then is not None:
                    then()

        return hook

    def _before_block(self, module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Bounds and rotary tables of the patches that are left."""
        if self._program is None:
            return None
        values = args[0] if args else kwargs["hidden_states"]
        if self._reduction is None:
            self._reduction = Reduction.start(self._program, values.view(self._frames, -1, values.shape[-1]))
            self._tables = kwargs["position_embeddings"]
        count = self._reduction.size.shape[1]
        self._reduction.seen.append((count, count))
        if count == self._reduction.group.shape[1]:
            return None
        given = kwargs["cu_seqlens"]
        bounds = torch.arange(self._frames + 1, device=given.device, dtype=given.dtype) * count
        changed = {**kwargs, "cu_seqlens": bounds, "position_embeddings": self._left_tables()}
        if kwargs.get("max_seqlen") is not None:
            longest = kwargs["max_seqlen"]
            changed["max_seqlen"] = torch.full_like(longest, count) if isinstance(longest, Tensor) else count
        return args, changed

    def _left_tables(self) -> tuple[Tensor, ...]:
        """Rotary tables of the patches that are left."""
        assert self._tables is not None and self._reduction is not None
        alive = (self._reduction.group >= 0).flatten()
        if bool(alive.all()):
            return self._tables
        return tuple(table[alive.to(table.device)] for table in self._tables)

    def _decide(self, index: int, attention: Any) -> Callable[[], None]:
        """Decides what to drop as soon as queries, keys and values are there, before attention needs more memory."""

        def decide() -> None:
            if self._program is None or self._reduction is None:
                return
            tables = self._left_tables()
            with torch.no_grad():
                self._kept = self._program.drop(self._view(index, attention, tables))
            self._parts = {}

        return decide

    def _behind_block(self, index: int) -> Callable[[nn.Module, Any, Any], Any]:
        """Drops what was decided."""

        def hook(module: nn.Module, args: Any, output: Any) -> Any:
            keep, self._kept = self._kept, None
            if keep is None or self._reduction is None:
                return None
            square = self.module.spatial_merge_size**2
            if index == self.facts.feature_layer and keep.shape[1] % square:
                raise MethodError(
                    f"{self.method.name} left {keep.shape[1]} patches of a temporal step, which squares of {square} do "
                    "not divide."
                )
            values = output[0] if isinstance(output, tuple) else output
            left = self._reduction.drop(values.view(self._frames, -1, values.shape[-1]), keep).flatten(0, 1)
            return (left, *output[1:]) if isinstance(output, tuple) else left

        return hook

    def _view(self, index: int, attention: Any, tables: tuple[Tensor, ...]) -> Block:
        kwargs = {"position_embeddings": tables, "cu_seqlens": None}
        found = self.tower.queries_keys(attention, self._parts, kwargs)
        v = self._parts["qkv"].unflatten(-1, (3, attention.num_heads, -1)).unbind(1)[2].transpose(0, 1)[None]
        q, k, v = (x[0].unflatten(1, (self._frames, -1)).transpose(0, 1) for x in (found.q, found.k, v))
        return Block(index, q, k, v, False)
