"""ToMe against matchings, merged tokens, schedules and a whole vision transformer of the reference implementation."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional

from tokensieve.methods import tome
from tokensieve.ops.bipartite import alternate_match, merge_groups, run_match, unmerge_groups

SYSTEM = "tome"
HEADS = 4


def _close(actual: torch.Tensor, expected: np.ndarray) -> None:
    np.testing.assert_allclose(actual.numpy(), expected, rtol=0, atol=1e-5)


def _check_match(golden: dict[str, np.ndarray]) -> None:
    metric, values, size = (torch.from_numpy(golden[name]) for name in ("metric", "x", "size"))
    flags = {name: bool(golden[name]) for name in ("class_token", "distill_token")}
    groups = alternate_match(metric, int(golden["r"]), **flags)
    assert metric.shape[1] - groups.source.shape[1] == int(golden["r_effective"])
    merged, merged_size = tome.merge_weighted(values, size[..., 0], groups)
    _close(merged, golden["merged"])
    _close(merged_size, golden["merged_size"][..., 0])
    _close(merge_groups(values, groups), golden["merged_mean"])
    np.testing.assert_array_equal(tome.source_map(groups).numpy(), golden["source"])
    if not flags["distill_token"]:
        _close(unmerge_groups(merged, groups), golden["unmerged"])


def _check_runs(golden: dict[str, np.ndarray]) -> None:
    groups = run_match(torch.from_numpy(golden["metric"]), int(golden["k"]))
    merged = merge_groups(torch.from_numpy(golden["x"]), groups)
    _close(merged, golden["merged"])
    _close(unmerge_groups(merged, groups), golden["unmerged"])


def _check_schedules(golden: dict[str, np.ndarray]) -> None:
    cases = [name.removeprefix("schedule_") for name in golden if name.startswith("schedule_")]
    assert cases
    for case in cases:
        layers, r, inflect = (golden[f"{name}_{case}"].item() for name in ("layers", "r", "inflect"))
        assert tome.merge_schedule(layers, r, inflect) == golden[f"schedule_{case}"].tolist(), case


def _check_encoder(golden: dict[str, np.ndarray]) -> None:
    """Pre-norm blocks with a fused projection; the weights come from the file."""
    weights = {name.removeprefix("w."): torch.from_numpy(array) for name, array in golden.items() if name[:2] == "w."}
    values = torch.from_numpy(golden["x"])
    width = values.shape[2]

    def linear(values: torch.Tensor, name: str) -> torch.Tensor:
        return functional.linear(values, weights[f"{name}.weight"], weights.get(f"{name}.bias"))

    def norm(values: torch.Tensor, name: str) -> torch.Tensor:
        return functional.layer_norm(values, (width,), weights[f"{name}.weight"], weights[f"{name}.bias"], 1e-6)

    state = tome.initial_state(*values.shape[:2])
    for number, r in enumerate(golden["r_schedule"].tolist()):
        block = f"blocks.{number}"

        def attend(
            values: torch.Tensor, bias: torch.Tensor | None, block: str = block
        ) -> tuple[torch.Tensor, torch.Tensor]:
            fused = linear(norm(values, f"{block}.norm1"), f"{block}.attn.qkv")
            q, k, v = fused.unflatten(2, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
            logits = q @ k.transpose(2, 3) * (width // HEADS) ** -0.5
            mixed = (logits if bias is None else logits + bias).softmax(dim=-1) @ v
            return linear(mixed.transpose(1, 2).flatten(2), f"{block}.attn.proj"), k.mean(dim=1)

        def feed(values: torch.Tensor, block: str = block) -> torch.Tensor:
            inner = functional.gelu(linear(norm(values, f"{block}.norm2"), f"{block}.mlp.fc1"))
            return linear(inner, f"{block}.mlp.fc2")

        values, state = tome.merge_block(
            values,
            state,
            attend,
            feed,
            r,
            class_token=bool(golden["class_token"]),
            proportional=bool(golden["prop_attn"]),
        )
    _close(norm(values, "norm"), golden["out"])
    np.testing.assert_array_equal(state.size.numpy(), golden["size"][..., 0])
    np.testing.assert_array_equal(tome.source_map(state.groups).numpy(), golden["source"])


def test_matches_reference(golden: dict[str, np.ndarray]) -> None:
    if "r_effective" in golden:
        _check_match(golden)
    elif "k" in golden:
        _check_runs(golden)
    elif "r_schedule" in golden:
        _check_encoder(golden)
    elif "schedule_0" in golden:
        _check_schedules(golden)
    else:
        pytest.fail(f"a file with the arrays {sorted(golden)} is of no known kind")
