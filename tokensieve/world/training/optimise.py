"""Optimisers of the bundled models: Muon for the matrices inside the layers, AdamW for everything else."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import nn


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
        found["muon"] = torch.optim.Muon(
            matrices, lr=muon, weight_decay=0.02, momentum=0.95, adjust_lr_fn="match_rms_adamw"
        )
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
