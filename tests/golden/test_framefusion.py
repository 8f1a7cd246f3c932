"""FrameFusion against the calls of the released code: what stays, merged states, flags and sparsities."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from tokensieve.core.cuts import Cut
from tokensieve.core.sample import DecoderSample, HostFacts
from tokensieve.methods.framefusion import FrameFusion

SYSTEM = "framefusion"


def test_calls_of_the_released_code(golden: dict[str, Any]) -> None:
    """Every call on the stored states, with the text and everything else left as it is."""
    layers = int(golden["num_layers"])
    facts = HostFacts("any", layers, 24, 22, False)
    method = FrameFusion(
        retention=float(golden["cost"]),
        similarity=float(golden["similarity_lower_bound"]),
        least_ratio=float(golden["ratio_lower_bound"]),
        official=True,
    )
    memory = method.read_prompt(None)  # type: ignore[arg-type]
    types, positions = torch.from_numpy(golden["patch_type"]), torch.arange(golden["patch_type"].size)
    for call in range(int(golden["calls"])):
        states, kind = torch.from_numpy(golden[f"in{call}"]), types[positions]
        visual = (kind >= 0).nonzero().flatten()
        cut = Cut(0) if call == 0 else Cut(call - 1, "feed")
        assert method.acts(cut, memory)
        zeros = torch.zeros_like(visual)
        signals = {}
        if memory["merged"]:
            signals["decoder.last_query_attention"] = torch.from_numpy(golden["attn"]).mean(0)[visual]
        sample = DecoderSample(
            states[visual], cut.layer, 0, zeros, zeros, signals, memory, facts=facts, cut=cut, cell=kind[visual]
        )
        plan = method.plan_decoder(sample)
        kept = torch.cat(((kind < 0).nonzero().flatten(), visual[plan.keep])).sort().values
        expected = states.clone()
        if plan.features is not None:
            expected[visual[plan.keep]] = plan.features
        positions = positions[kept]
        np.testing.assert_array_equal(positions.numpy(), golden[f"kept{call}"])
        np.testing.assert_allclose(expected[kept].numpy(), golden[f"out{call}"], rtol=0, atol=1e-5)
        assert [memory["merged"], memory["pruned"]] == [bool(flag) for flag in golden[f"flags{call}"]]
    np.testing.assert_allclose(memory["sparsity"], golden["sparsity"], rtol=0, atol=1e-12)
