"""SparseVLM on the reference's tiny Llama, and its rank rule and recycling, against the released code's outputs."""

from __future__ import annotations

from typing import Any

import torch
from tiny_llama import tiny_llama

from tokensieve.core.layout import Layout
from tokensieve.core.plan import Plan
from tokensieve.core.runtime import Run
from tokensieve.core.sample import DecoderSample
from tokensieve.methods.sparsevlm import SparseVLM
from tokensieve.ops.raters import rank_count, rater_attention, text_raters, text_relevance
from tokensieve.ops.recycle import recycle
from tokensieve.ops.select import top_mask

SYSTEM = "sparsevlm"


class _Recorded(SparseVLM):
    """The method, with its samples and plans kept."""

    def plan_decoder(self, sample: DecoderSample) -> Plan:
        plan = super().plan_decoder(sample)
        self.seen.append((sample, plan))
        return plan


def _rank(golden: dict[str, Any]) -> None:
    attention = torch.from_numpy(golden["text_to_visual"])
    rows = rater_attention(attention, torch.from_numpy(golden["raters"]))
    count = rank_count(rows, float(golden["scale"]), float(golden["bias"]))
    assert (count is not None) == bool(golden["sparsify"])
    scores = rows.mean(dim=0)
    assert torch.allclose(scores, torch.from_numpy(golden["relevance"]), atol=1e-6)
    kept = top_mask(scores, scores.numel() if count is None else count)
    assert kept.tolist() == golden["kept_mask"].astype(bool).tolist()


def _recycle(golden: dict[str, Any]) -> None:
    tokens, noise = torch.from_numpy(golden["x"]), torch.from_numpy(golden["noise"])
    for row in range(tokens.shape[0]):
        merged = recycle(tokens[row], int(golden["cluster_num"]), noise[row]).features
        assert torch.allclose(merged, torch.from_numpy(golden["merged"][row]), atol=1e-5)


def _model(golden: dict[str, Any]) -> None:
    prefix, visual = golden["config"][5:7].tolist()
    tiny = tiny_llama(golden, [prefix], Layout.regular("image", 1, 1, visual))
    layers = golden["prune_layers"].tolist()
    recycles = int(golden["version"]) == 1
    noise = [torch.from_numpy(golden[f"noise_{stage}"]) for stage in range(len(layers))] if recycles else None
    counts = golden["keep_counts"].tolist()
    heads = None if recycles else 1
    method = _Recorded(version="1.5" if recycles else "2.0", layers=layers, counts=counts, noise=noise, heads=heads)
    method.seen = []
    embeds = torch.from_numpy(golden["inputs_embeds"][0])
    relevance = text_relevance(embeds[prefix : prefix + visual], embeds[prefix + visual :])
    assert torch.allclose(relevance, torch.from_numpy(golden["rater_relevance"]), atol=1e-5)
    assert text_raters(relevance).tolist() == golden["raters"].tolist()
    with Run(tiny.model, tiny.host, [method]):
        states = tiny.prefill()
        for stage, (sample, plan) in enumerate(method.seen):
            kept = torch.from_numpy(golden[f"kept_mask_{stage}"]).nonzero()[:, 0]
            assert plan.keep[: kept.numel()].tolist() == kept.tolist()
            assert plan.keep.numel() - kept.numel() == int(golden[f"clusters_{stage}"])
            assert torch.allclose(plan.info["scores"], torch.from_numpy(golden[f"score_{stage}"]), atol=1e-5)
            assert sample.memory["raters"].tolist() == golden["raters"].tolist()
            if recycles:
                assert plan.features is not None
                merged = torch.from_numpy(golden[f"recycle_out_{stage}"])
                assert torch.allclose(plan.features[kept.numel() :], merged, atol=1e-4)
        assert tiny.cache_lengths() == golden["cache_lens"].tolist()
        assert torch.allclose(states, torch.from_numpy(golden["last_hidden_state"]), atol=1e-4)
        for step in range(len(golden["decode_hidden"])):
            reference = torch.from_numpy(golden["decode_hidden"][step])
            assert torch.allclose(tiny.decode(step), reference, atol=1e-4)


def test_against_reference(golden: dict[str, Any]) -> None:
    """Raters, scores, kept sets, merged tokens, cache lengths and states, or one part of the method alone."""
    if "text_to_visual" in golden:
        _rank(golden)
    elif "cluster_num" in golden:
        _recycle(golden)
    else:
        _model(golden)
