"""PyramidDrop through the whole runtime on the reference's tiny Llama, against the released code's outputs."""

from __future__ import annotations

from typing import Any

import torch
from tiny_llama import tiny_llama

from tokensieve.core.layout import Layout
from tokensieve.core.runtime import Run
from tokensieve.methods.pyramiddrop import PyramidDrop

SYSTEM = "pyramiddrop"


def test_against_reference(golden: dict[str, Any]) -> None:
    """Kept sets of every stage and cache lengths exact; prefill and decoding states within 1e-4."""
    layout = Layout.regular("image", 1, 1, int(golden["config"][5]))
    tiny = tiny_llama(golden, golden["image_start"].tolist(), layout)
    cuts = golden["layer_list"].tolist()
    method = PyramidDrop(layers=cuts, ratios=golden["ratios"].tolist())
    rows = int(golden["batch"])
    with Run(tiny.model, tiny.host, [method]) as run:
        states = tiny.prefill()
        for stage, cut in enumerate(cuts):
            for row, item in enumerate(run.history[-1].items):
                name = f"kept_{stage}_b{row}" if rows > 1 else f"kept_{stage}"
                assert item.decoder[cut].tolist() == golden[name].tolist()
        assert tiny.cache_lengths() == golden["cache_lens"].tolist()
        assert torch.allclose(states, torch.from_numpy(golden["last_hidden_state"]), atol=1e-4)
        for step in range(len(golden.get("decode_hidden", ()))):
            reference = torch.from_numpy(golden["decode_hidden"][step, 0])
            assert torch.allclose(tiny.decode(step), reference, atol=1e-4)
