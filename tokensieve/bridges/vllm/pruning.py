"""What happens to one video inside the engine: geometry, the number of its tokens, and which of them stay."""

from __future__ import annotations

import torch
from torch import Tensor

from tokensieve.bridges.vllm.choice import Choice
from tokensieve.bridges.vllm.families import Family
from tokensieve.core.budget import allocate
from tokensieve.core.layout import Layout
from tokensieve.core.method import Method
from tokensieve.core.plan import Plan, reading_order
from tokensieve.core.sample import FrameSample, TokenSample
from tokensieve.errors import MethodError


def grid_layout(grid: tuple[int, int, int], merge: int) -> Layout:
    """Layout of a video of a Qwen family from its grid of patches (T, H, W) and the side of a merged square."""
    steps, height, width = grid
    return Layout.regular("video", steps, height // merge, width // merge)


def kept_count(choice: Choice, layout: Layout) -> int:
    """Number of tokens of a video that enter the LLM, separators included, from its geometry alone.

    Raises
    ------
    MethodError
        When the method cannot say.
    """
    patches = choice.method.token_count(layout)
    if patches is None:
        raise MethodError(f"{choice.method.name} cannot say how many tokens of a video of {layout.views} it keeps.")
    return patches + layout.tokens - layout.patches


def kept_tokens(choice: Choice, family: Family, features: Tensor, layout: Layout) -> Tensor:
    """Tokens of a video that enter the LLM, in reading order.

    Parameters
    ----------
    features : Tensor [n, D]
        Embeddings of its patches as the LLM would read them, separators left out.
    layout
        Its geometry; ``layout.patches == n``.

    Returns
    -------
    Tensor [kept_count]
        Token ids of the layout, int64 on the CPU.

    Raises
    ------
    MethodError
        When the features are not finite, or the method keeps another number of tokens than it stated.
    """
    plan = _plan(choice.method, family, features, layout)
    tokens, slots = reading_order(layout, plan)
    expected = kept_count(choice, layout)
    if tokens.numel() != expected or bool((slots < -1).any()) or plan.features is not None:
        raise MethodError(
            f"{choice.method.name} kept {tokens.numel()} tokens of a video of {len(layout.views)} frames but had "
            f"stated {expected}; it cannot run inside vLLM."
        )
    return tokens


def _plan(method: Method, family: Family, features: Tensor, layout: Layout) -> Plan:
    """The plan of the method for one video, made as on transformers."""
    if method.stages == ("frames",):
        views = method.plan_frames(FrameSample(len(layout.views))).long().cpu()
        kept = torch.isin(layout.patch_view, views).nonzero().flatten()
        return Plan(kept, positions=method.position_policy, views=views)
    if not torch.isfinite(features.sum(dtype=torch.float32)):
        raise MethodError(
            "The visual features hold NaN or infinity; check the weights and the dtype (float16 overflows in some "
            "towers, bfloat16 does not)."
        )
    sample = TokenSample(features, layout, {}, family.facts())
    if method.budget is not None:
        sample.budget = allocate(method.budget, sample, method.retention)
    return method.run_tokens(sample).checked(layout.patches, method.name)
