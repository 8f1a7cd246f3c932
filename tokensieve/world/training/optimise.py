"""Optimisers of the bundled models: Muon for the matrices inside the layers, AdamW for everything else."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable

import torch
from torch import nn

from tokensieve.world.training.precision import fast_dtype


class Muon(torch.optim.Optimizer):
    """Momentum whose matrices are made nearly orthogonal before they are applied (Jordan et al., 2024).

    The optimiser of PyTorch does this in bf16, matrix by matrix; on a processor without bf16 it took two thirds of
    a step. Here matrices of one shape go together, in the precision that is fast.

    Parameters
    ----------
    params
        Matrices ``[m, n]``.
    lr, weight_decay, momentum
        Learning rate (of updates whose size is that of AdamW), decoupled weight decay, and Nesterov momentum.
    """

    def __init__(
        self, params: Iterable[nn.Parameter], lr: float, weight_decay: float = 0.02, momentum: float = 0.95
    ) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update all matrices that have a gradient."""
        for group in self.param_groups:
            alike: dict[torch.Size, list[nn.Parameter]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    alike[parameter.shape].append(parameter)
            for parameters in alike.values():
                self._update(parameters, group)

    def _update(self, parameters: list[nn.Parameter], group: dict[str, float]) -> None:
        directions = []
        for parameter in parameters:
            gradient, state = parameter.grad, self.state[parameter]
            assert gradient is not None
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(parameter)
            average = state["momentum_buffer"].lerp_(gradient, 1 - group["momentum"])
            directions.append(gradient.lerp(average, group["momentum"]))
        size = 0.2 * math.sqrt(max(parameters[0].shape))
        for parameter, update in zip(parameters, orthogonal(torch.stack(directions)), strict=True):
            parameter.mul_(1 - group["lr"] * group["weight_decay"])
            parameter.sub_(update.to(parameter.dtype), alpha=group["lr"] * size)


def orthogonal(matrices: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """Matrices ``[B, m, n]`` with all singular values brought near 1 by Newton-Schulz iterations of fifth order."""
    wide = matrices.to(fast_dtype())
    tall = wide.shape[1] > wide.shape[2]
    if tall:
        wide = wide.mT
    wide = wide / wide.flatten(1).norm(dim=1)[:, None, None].clamp(min=1e-7)
    for _ in range(steps):
        gram = wide @ wide.mT
        wide = torch.baddbmm(wide, torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315), wide, beta=3.4445)
    return wide.mT if tall else wide


def optimisers(modules: Iterable[nn.Module], muon: float, adam: float) -> dict[str, torch.optim.Optimizer]:
    """Optimisers by name over all trainable parameters of some modules.

    Parameters
    ----------
    modules
        What is trained; shared parameters are taken once.
    muon, adam
        Peak learning rates.
    """
    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    seen: set[int] = set()
    for module in modules:
        for name, parameter in module.named_parameters():
            if id(parameter) in seen or not parameter.requires_grad:
                continue
            seen.add(id(parameter))
            inside = parameter.ndim == 2 and ".layers." in f".{name}"
            (matrices if inside else others).append(parameter)
    found: dict[str, torch.optim.Optimizer] = {
        "adam": torch.optim.AdamW(others, lr=adam, betas=(0.9, 0.98), weight_decay=0.01)
    }
    if matrices:
        found["muon"] = Muon(matrices, lr=muon)
    for optimiser in found.values():
        for group in optimiser.param_groups:
            group["peak"] = group["lr"]
    return found


def set_rate(optimisers: dict[str, torch.optim.Optimizer], step: int, steps: int, warm_up: int = 100) -> float:
    """Linear warm-up, constant, and a cosine fall over the second half of the steps; returns the factor used."""
    factor = min(1.0, (step + 1) / warm_up)
    begin = 0.5 * steps
    if step > begin:
        factor *= 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, (step - begin) / (steps - begin))))
    for optimiser in optimisers.values():
        for group in optimiser.param_groups:
            group["lr"] = group["peak"] * factor
    return factor
