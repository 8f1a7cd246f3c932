"""TransPrune through the whole runtime on the reference's tiny Llama, against the released code's outputs."""

from __future__ import annotations

from typing import Any

import torch
from tiny_llama import tiny_llama

from tokensieve.core.layout import Layout
from tokensieve.core.runtime import Run
from tokensieve.methods.transprune import TransPrune
from tokensieve.ops.token_transition import token_transition

SYSTEM = "transprune"


def test_against_reference(golden: dict[str, Any]) -> None:
    """Transitions within 1e-6; kept sets of every cut exact; states within 1e-4."""
    if "ttv" in golden:
        moved = token_transition(torch.from_numpy(golden["before"]), torch.from_numpy(golden["after"]))
        assert torch.allclose(moved, torch.from_numpy(golden["ttv"]), atol=1e-6)
        return
    prefix, visual = golden["config"][5:7].tolist()
    tiny = tiny_llama(golden, [prefix], Layout.regular("image", 1, 1, visual))
    cuts = golden["prune_layers"].tolist()
    accumulated = [layer - 1 for layer in golden["accumulate_layers"].tolist()]
    method = TransPrune(layers=cuts, ratios=golden["ratios"].tolist(), accumulate=accumulated)
    with Run(tiny.model, tiny.host, [method]) as run:
        states = tiny.prefill()
    for stage, cut in enumerate(cuts):
        assert run.history[-1].items[0].decoder[cut].tolist() == golden[f"kept_{stage}"].tolist()
    assert torch.allclose(states, torch.from_numpy(golden["last_hidden_state"]), atol=1e-4)
