"""FastV through the whole runtime on the reference's tiny Llama, against the released code's outputs."""

from __future__ import annotations

from typing import Any

import torch
from tiny_llama import tiny_llama

from tokensieve.core.layout import Layout
from tokensieve.core.runtime import Run
from tokensieve.methods.fastv import FastV

SYSTEM = "fastv"


def test_against_reference(golden: dict[str, Any]) -> None:
    """Kept set, positions, cache lengths exact; prefill and decoding states within 1e-4."""
    layout = Layout.regular("video", int(golden["frames"]), 1, int(golden["tokens_per_frame"]))
    tiny = tiny_llama(golden, [int(golden["config"][5])], layout)
    cut = int(golden["K"])
    method = FastV(retention=1 - float(golden["R"]), layer=cut)
    positions: list[torch.Tensor] = []

    def spy(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        positions.append(kwargs["position_embeddings"][0])

    with Run(tiny.model, tiny.host, [method]) as run:
        handle = tiny.text.layers[cut].register_forward_pre_hook(spy, with_kwargs=True)
        states = tiny.prefill()
        handle.remove()
        kept = run.history[-1].items[0].decoder[cut]
        assert kept.tolist() == golden["kept"].tolist()
        assert tiny.cache_lengths() == golden["cache_lens"].tolist()
        expected, _ = tiny.text.rotary_emb(states, torch.from_numpy(golden["positions"])[None])
        assert torch.equal(positions[0][0], expected[0])
        assert torch.allclose(states, torch.from_numpy(golden["last_hidden_state"]), atol=1e-4)
        for step in range(3):
            reference = torch.from_numpy(golden["decode_hidden"][step])
            assert torch.allclose(tiny.decode(step), reference, atol=1e-4)
