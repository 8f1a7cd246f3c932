"""Frame-budget modules: how many tokens each frame of an item may keep."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from tokensieve.core.sample import TokenSample
from tokensieve.errors import MethodError

BudgetModule = Callable[[TokenSample, float], Tensor]

_BUDGETS: dict[str, BudgetModule] = {}


def register_budget(name: str) -> Callable[[BudgetModule], BudgetModule]:
    """Decorator for a function ``(sample, retention) -> counts [views]`` of at least one token a frame."""

    def store(function: BudgetModule) -> BudgetModule:
        _BUDGETS[name] = function
        return function

    return store


def list_budgets() -> list[str]:
    """Names of the frame-budget modules."""
    return sorted(_BUDGETS)


def allocate(name: str, sample: TokenSample, retention: float) -> Tensor:
    """Tokens that each frame of the sample may keep under a named module, int64 [views] on the CPU."""
    if name not in _BUDGETS:
        raise MethodError(f"There is no frame budget {name!r}; known are {', '.join(list_budgets())}.")
    return _BUDGETS[name](sample, retention).long().cpu()
