"""PPLLaVA against pooled tokens, position tables, relevance maps and adapted towers of the reference implementation."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    SiglipTextConfig,
    SiglipTextModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from tokensieve.models.ppllava import (
    BTAdapterVisionModel,
    ClipAlignment,
    ExtendedTextEmbeddings,
    SiglipAlignment,
    extend_positions,
    prompt_guided_pool,
    split_tables,
)

SYSTEM = "ppllava"
Golden = dict[str, np.ndarray]


def _close(actual: Tensor, expected: np.ndarray) -> None:
    assert tuple(actual.shape) == expected.shape
    np.testing.assert_allclose(actual.detach().numpy(), expected, rtol=0, atol=1e-5)


def _triple(golden: Golden, name: str) -> tuple[int, int, int] | None:
    return tuple(golden[name].tolist()) if name in golden else None  # type: ignore[return-value]


def _weights(golden: Golden) -> dict[str, Tensor]:
    return {name.removeprefix("w/"): torch.from_numpy(array) for name, array in golden.items() if name[:2] == "w/"}


def _layers(weights: dict[str, Tensor], pattern: str) -> int:
    return len({match[1] for name in weights if (match := re.match(pattern + r"\.(\d+)\.", name))})


def _load(module: nn.Module, weights: dict[str, Tensor]) -> None:
    """Every weight of the module comes from the file, in the module's own names and shapes."""
    projector = {name for name in weights if name.startswith("linear_")}
    module.load_state_dict({name: value for name, value in weights.items() if name not in projector}, strict=True)
    module.eval()


def _check_pool(golden: Golden) -> None:
    kernel, stride = _triple(golden, "kernel"), _triple(golden, "stride")
    output = _triple(golden, "out_size") if kernel is None or stride is None else None
    relevance = torch.from_numpy(golden["weights"]) if golden["has_weights"].item() else None
    pooled = prompt_guided_pool(
        torch.from_numpy(golden["features"]),
        relevance,
        grid=tuple(golden["grid"][1:].tolist()),
        kernel=kernel,
        stride=stride,
        output_size=output,
        temperature=golden["temperature"].item(),
    )
    _close(pooled, golden["pooled"])
    assert tuple(pooled.shape[:3]) == _triple(golden, "out_size")


def _check_positions(golden: Golden) -> None:
    old, keep, ratio = torch.from_numpy(golden["pos_old"]), golden["keep_len"].item(), golden["ratio"].item()
    new = extend_positions(old, keep, ratio)
    _close(new, golden["pos_new"])
    assert torch.equal(new[:keep], old[:keep])
    _close(ExtendedTextEmbeddings(nn.Embedding(1, old.shape[1]), new, keep).weight, golden["pos_effective"])


def _text_model(text: Any, config: Any, weights: dict[str, Tensor], **sizes: Any) -> nn.Module:
    """A text tower of the sizes of the file, with as many position tables as the file has."""
    prefix = "clip_text_model."
    tables = f"{prefix}embeddings.position_embedding"
    positions = weights.get(tables, weights.get(f"{tables}.weight"))
    assert positions is not None
    model = text(
        config(
            hidden_size=positions.shape[1],
            intermediate_size=weights[f"{prefix}encoder.layers.0.mlp.fc1.weight"].shape[0],
            num_hidden_layers=_layers(weights, prefix + r"encoder\.layers"),
            max_position_embeddings=positions.shape[0],
            vocab_size=weights[f"{prefix}embeddings.token_embedding.weight"].shape[0],
            **sizes,
        )
    )
    return split_tables(model) if tables in weights else model


def _check_projected(golden: Golden, weights: dict[str, Tensor], relevance: Tensor) -> None:
    """The projector of the hosts on every patch, then the pooling."""
    hidden = nn.functional.linear(
        torch.from_numpy(golden["features"]), weights["linear_1.weight"], weights["linear_1.bias"]
    )
    tokens = nn.functional.linear(nn.functional.gelu(hidden), weights["linear_2.weight"], weights["linear_2.bias"])
    pooled = prompt_guided_pool(
        tokens,
        relevance,
        grid=tuple(golden["grid"][1:].tolist()),
        kernel=_triple(golden, "kernel"),
        temperature=golden["temperature"].item(),
    )
    _close(pooled.flatten(0, 2), golden["output"])


def _check_clip(golden: Golden) -> None:
    weights = _weights(golden)
    heads = int(golden["cfg_text"][3])
    text = _text_model(CLIPTextModel, CLIPTextConfig, weights, num_attention_heads=heads, eos_token_id=2)
    joint, width = weights["clip_visual_projection.weight"].shape
    align = ClipAlignment(text, width, joint)
    _load(align, weights)
    ids, mask = (torch.from_numpy(golden[name]) for name in ("input_ids", "attention_mask"))
    _close(align.clip_text_model(input_ids=ids, attention_mask=mask).pooler_output, golden["text_pooled"])
    _close(align.embed_text(ids, mask), golden["text_embed"])
    found = align(torch.from_numpy(golden["features"]), ids, mask, grid=tuple(golden["grid"][1:].tolist()))
    _check_maps(golden, align, found)
    _check_projected(golden, weights, found.relevance)


def _check_siglip(golden: Golden) -> None:
    weights = _weights(golden)
    heads, inner = golden["probe_attention"].shape[1], weights["clip_visual_head.mlp.fc1.weight"].shape[0]
    width = weights["clip_visual_ln.weight"].shape[0]
    text = _text_model(SiglipTextModel, SiglipTextConfig, weights, num_attention_heads=heads)
    vision = SiglipVisionModel(
        SiglipVisionConfig(
            hidden_size=width, intermediate_size=inner, num_hidden_layers=1, num_attention_heads=heads, image_size=16
        )
    )
    align = SiglipAlignment(text, vision.head, value_attention=bool(golden["valuew_plus"].item()))
    _load(align, weights)
    ids, features = torch.from_numpy(golden["input_ids"]), torch.from_numpy(golden["features"])
    _close(align.embed_text(ids), golden["text_embed"])
    _close(align.embed_patches(features), golden["patch_embed"])
    _close(align.probe_attention(features), golden["probe_attention"])
    found = align(features, ids, grid=tuple(golden["grid"][1:].tolist()))
    _close(align.logit_bias, golden["logit_bias"])
    _check_maps(golden, align, found)
    _check_projected(golden, weights, found.relevance)


def _check_maps(golden: Golden, align: Any, found: Any) -> None:
    _close(found.cosine, golden["cosine"])
    _close(found.relevance, golden["relevance"])
    np.testing.assert_allclose(align.logit_scale.exp().reshape(1).numpy(), golden["logit_scale_exp"], rtol=1e-6)


def _check_adapter(golden: Golden) -> None:
    weights = _weights(golden)
    patch = weights["vision_model.embeddings.patch_embedding.weight"]
    fc1 = weights["vision_model.encoder.layers.0.mlp.fc1.weight"]
    depth, count = golden["depth"].item(), golden["n_layers"].item()
    # The file does not say how many heads: the tiny tower of the reference has four.
    config = CLIPVisionConfig(
        hidden_size=patch.shape[0],
        intermediate_size=fc1.shape[0],
        num_hidden_layers=count,
        num_attention_heads=4,
        image_size=golden["pixel_values"].shape[-1],
        patch_size=patch.shape[-1],
    )
    frames = weights["vision_model.btadapter_time_embed.weight"].shape[0]
    tower = BTAdapterVisionModel(CLIPVisionModel(config), depth, frames)
    _load(tower, weights)
    pixels = torch.from_numpy(golden["pixel_values"])
    found = tower(pixels)
    assert found.hidden_states is not None and len(found.hidden_states) == golden["n_hidden"].item()
    for index, name in ((-2, "hidden_m2"), (-1, "hidden_m1"), (count - depth + 1, "hidden_first_combined")):
        _close(found.hidden_states[index], golden[name])
    _close(found.pooler_output, golden["pooler"])
    _close(tower(pixels[:1]).hidden_states[-2], golden["hidden_m2_single"])


def test_matches_reference(golden: Golden) -> None:
    checks = {
        "pooled": _check_pool,
        "pos_old": _check_positions,
        "probe_attention": _check_siglip,
        "cfg_text": _check_clip,
        "pixel_values": _check_adapter,
    }
    kinds = [name for name in checks if name in golden]
    if not kinds:
        pytest.fail(f"a file with the arrays {sorted(golden)} is of no known kind")
    with torch.no_grad():
        checks[kinds[0]](golden)
