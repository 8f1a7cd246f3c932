"""ToMe against matchings, merged tokens, schedules and a whole vision transformer of the reference implementation."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional
from transformers import CLIPVisionConfig, CLIPVisionModel
from transformers.modeling_outputs import BaseModelOutput

from tokensieve.core.encode import EncodeCall, EncodedItem
from tokensieve.core.layout import Layout
from tokensieve.core.sample import HostFacts
from tokensieve.core.tower import TowerProgram, TowerSample
from tokensieve.core.tower_stage import TowerStage
from tokensieve.hosts.towers import PictureTower
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


class _Tower(torch.nn.Module):
    """The blocks of a CLIP tower alone: takes tokens in the place of pixels."""

    def __init__(self, weights: dict[str, torch.Tensor], layers: int, width: int) -> None:
        super().__init__()
        config = CLIPVisionConfig(
            hidden_size=width,
            intermediate_size=weights["blocks.0.mlp.fc1.weight"].shape[0],
            num_hidden_layers=layers,
            num_attention_heads=HEADS,
            hidden_act="gelu",
            layer_norm_eps=1e-6,
            image_size=8,
            patch_size=1,
        )
        model = CLIPVisionModel(config)
        self.encoder = getattr(model, "vision_model", model).encoder
        self.config = config
        for number, layer in enumerate(self.encoder.layers):
            names = {
                "layer_norm1": "norm1",
                "layer_norm2": "norm2",
                "mlp.fc1": "mlp.fc1",
                "mlp.fc2": "mlp.fc2",
                "self_attn.out_proj": "attn.proj",
            }
            for kind in ("weight", "bias"):
                state = {
                    f"{ours}.{kind}": weights[f"blocks.{number}.{theirs}.{kind}"] for ours, theirs in names.items()
                }
                fused = weights.get(f"blocks.{number}.attn.qkv.{kind}", torch.zeros(3 * width)).chunk(3)
                state |= {f"self_attn.{p}_proj.{kind}": x for p, x in zip("qkv", fused, strict=True)}
                layer.load_state_dict(state, strict=False)

    def forward(self, pixel_values: torch.Tensor) -> BaseModelOutput:
        return self.encoder(inputs_embeds=pixel_values)


class _Scheduled(tome.Tome):
    """The method with a schedule of its own."""

    schedule: tuple[int, ...] = ()

    def tower_program(self, sample: TowerSample) -> TowerProgram:
        return tome.MergeProgram(self.schedule, sample.class_token, self.proportional)


def _check_hooks(golden: dict[str, np.ndarray]) -> None:
    """The same through hooks on unmodified blocks; every patch finds the token that stands for it."""
    weights = {name.removeprefix("w."): torch.from_numpy(array) for name, array in golden.items() if name[:2] == "w."}
    values, schedule = torch.from_numpy(golden["x"]), golden["r_schedule"].tolist()
    batch, tokens, width = values.shape
    tower = _Tower(weights, len(schedule), width).eval()
    method = _Scheduled(proportional=bool(golden["prop_attn"]))
    method.schedule = tuple(schedule)
    marked = bool(golden["class_token"])
    facts = HostFacts("llava", 32, len(schedule), len(schedule) - 1, marked)
    stage = TowerStage(tower, PictureTower("encoder.layers", class_token=marked), facts, method)
    item = EncodedItem(Layout.regular("image", batch, 1, tokens - int(marked)), slice(0, batch))
    found: list[torch.Tensor] = []
    with torch.no_grad():
        stage.attach()
        stage.begin(EncodeCall("image", {"pixel_values": values}, [item]), lambda *given: found.extend(given))
        out = tower(values).last_hidden_state
        stage.detach()
    source = torch.from_numpy(golden["source"]).long()
    member = source.argmax(dim=1)
    assert torch.equal(source.gather(1, member.unsqueeze(1)), torch.ones(batch, 1, tokens, dtype=torch.long))
    first = int(marked)
    starts = torch.arange(batch).unsqueeze(1) * (tokens - first)
    assert torch.equal(found[0], member[:, first:] - first + starts)
    normed = functional.layer_norm(out, (width,), weights["norm.weight"], weights["norm.bias"], 1e-6)
    expected = torch.from_numpy(golden["out"])
    _close(normed, expected.gather(1, member.unsqueeze(2).expand(-1, -1, width)).numpy())


def test_matches_reference(golden: dict[str, np.ndarray]) -> None:
    if "r_effective" in golden:
        _check_match(golden)
    elif "k" in golden:
        _check_runs(golden)
    elif "r_schedule" in golden:
        _check_encoder(golden)
        _check_hooks(golden)
    elif "schedule_0" in golden:
        _check_schedules(golden)
    else:
        pytest.fail(f"a file with the arrays {sorted(golden)} is of no known kind")
