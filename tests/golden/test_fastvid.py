"""FastVID against values of the three released copies: segments, positions and merged tokens."""

from __future__ import annotations

import numpy as np
import torch

from tokensieve.core.layout import Layout
from tokensieve.core.plan import Plan, reading_order
from tokensieve.core.sample import HostFacts, TokenSample
from tokensieve.methods.fastvid import HEAD_ATTENTION, HEAD_VECTOR, MEAN_QUERY, FastVID, Flavour, density_pruning
from tokensieve.ops.merge import apply_merge

SYSTEM = "fastvid"


def test_matches_reference(golden: dict[str, np.ndarray]) -> None:
    frames, tokens = int(golden["frames"]), int(golden["tokens_per_frame"])
    start, length = int(golden["video_start"]), int(golden["video_length"])
    hidden = torch.from_numpy(golden["hidden"])
    # The LLaVA-Video copy runs on square grids with a newline behind every row; the Qwen copy states its grid.
    flavour: Flavour = "qwen" if "grid" in golden else "onevision" if length == frames * tokens else "llava_video"
    side = round(tokens**0.5)
    if flavour == "llava_video":
        layout = Layout.regular("video", frames, side, side, "row")
    else:
        layout = Layout.regular("video", frames, 1, tokens)
    patches = start + layout.patch_tokens[: frames * tokens]
    features = hidden[patches].view(frames, tokens, -1)

    merged, segments = density_pruning(
        features,
        torch.from_numpy(golden["frame_attention"]),
        torch.from_numpy(golden["frame_global"]),
        float(golden["retention"]),
        flavour=flavour,
        segments=int(golden["c"]),
        threshold=float(golden["tau"]),
        context=float(golden["d"]),
        stride=int(golden["p"]),
        beta=float(golden["beta"]),
        ignore=float(golden["tau_ignore"]),
        strict=True,
    )
    assert [last - first + 1 for first, last in segments] == golden["segment_sizes"].tolist()
    order, slots = reading_order(layout, Plan(merged.source, separators="occupied"))
    order, slots = order[order < length], slots[order < length]
    keep = torch.cat((torch.arange(start), start + order, torch.arange(start + length, hidden.shape[0])))
    np.testing.assert_array_equal(keep.numpy(), golden["keep_index"])
    out = hidden[keep].clone()
    is_patch = torch.zeros(keep.numel(), dtype=torch.bool)
    is_patch[start : start + order.numel()] = slots >= 0
    out[is_patch] = merged.features
    np.testing.assert_allclose(out.numpy(), golden["out"], rtol=0, atol=1e-5)
    remade = apply_merge(features.flatten(0, 1).double(), merged.merge_map, merged.source.numel())
    np.testing.assert_allclose(remade.numpy(), merged.features.numpy(), rtol=0, atol=1e-5)


def test_registered_method_matches_reference(golden: dict[str, np.ndarray]) -> None:
    """Options that the host implies, and signals by the names under which hosts give them."""
    frames, tokens = int(golden["frames"]), int(golden["tokens_per_frame"])
    start, length = int(golden["video_start"]), int(golden["video_length"])
    family = "qwen2_5_vl" if "grid" in golden else "llava_onevision" if length == frames * tokens else "llava_video"
    facts = HostFacts(family, 28, 27, 25, False)
    side = round(tokens**0.5)
    regular = family == "llava_video"
    layout = Layout.regular("video", frames, *((side, side, "row") if regular else (1, tokens)))
    attention = torch.from_numpy(golden["frame_attention"]).flatten()
    vectors = torch.from_numpy(golden["frame_global"])
    method = FastVID(retention=float(golden["retention"]), segments=int(golden["c"]))
    signals = {MEAN_QUERY: attention} if "grid" in golden else {HEAD_ATTENTION: attention, HEAD_VECTOR: vectors}
    assert set(method.signals(facts)) == set(signals)
    features = torch.from_numpy(golden["hidden"])[start + layout.patch_tokens[: frames * tokens]]
    plan = method.plan_tokens(TokenSample(features, layout, signals, facts))
    assert [last - first + 1 for first, last in plan.info["segments"].tolist()] == golden["segment_sizes"].tolist()
    order, _ = reading_order(layout, plan)
    inside = golden["keep_index"][(golden["keep_index"] >= start) & (golden["keep_index"] < start + length)]
    np.testing.assert_array_equal(start + order[order < length].numpy(), inside)
