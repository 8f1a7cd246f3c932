"""FlowCut against scores, counts and patch ids of the reference implementation."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import CLIPVisionConfig, CLIPVisionModel

from tokensieve.core.encode import EncodeCall, EncodedItem
from tokensieve.core.layout import Layout
from tokensieve.core.sample import HostFacts
from tokensieve.core.tower_stage import TowerStage
from tokensieve.hosts.towers import PictureTower
from tokensieve.methods import flowcut
from tokensieve.ops import information_flow

SYSTEM = "flowcut"


def _tower(golden: dict[str, np.ndarray]) -> torch.nn.Module:
    """The inner transformer of a CLIP vision model with the weights of the file."""
    hidden, width, layers, heads, image, patch, _ = golden["config"].tolist()
    config = CLIPVisionConfig(
        hidden_size=hidden,
        intermediate_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        image_size=image,
        patch_size=patch,
        hidden_act="quick_gelu",
        layer_norm_eps=1e-5,
    )
    model = CLIPVisionModel(config).eval()
    prefix = "" if any(name.startswith("vision_model.") for name in model.state_dict()) else "vision_model."
    weights = {name[2:].removeprefix(prefix): torch.from_numpy(x) for name, x in golden.items() if name[:2] == "w."}
    model.load_state_dict({name: x for name, x in weights.items() if "position_ids" not in name})
    return getattr(model, "vision_model", model)


def _heads(module: torch.nn.Module, hidden: Tensor, heads: int) -> Tensor:
    return module(hidden).unflatten(2, (heads, -1)).transpose(1, 2)


def _check_encoder(golden: dict[str, np.ndarray]) -> None:
    """The whole encoder, layer by layer, dropping what the functions say."""
    tower = _tower(golden)
    layers, heads, target = (int(golden["config"][i]) for i in (2, 3, 6))
    flow = flowcut.EncoderFlow(target, layers - 3)
    lengths, states = [], []
    with torch.no_grad():
        hidden = tower.pre_layrnorm(tower.embeddings(torch.from_numpy(golden["pixel_values"])))
        for index, layer in enumerate(tower.encoder.layers):
            lengths.append(hidden.shape[1])
            states.append(hidden)
            normed, attention = layer.layer_norm1(hidden), layer.self_attn
            q, k, v = (_heads(getattr(attention, f"{part}_proj"), normed, heads) for part in ("q", "k", "v"))
            row = (q[:, :, :1] @ k.transpose(2, 3) * q.shape[-1] ** -0.5).softmax(dim=-1).mean(dim=1)[:, 0, 1:]
            output = layer(hidden, attention_mask=None)
            hidden = output[0] if isinstance(output, tuple) else output
            keep = flow.step(index, row, information_flow.semantic_attention(v), v.mean(dim=1)[:, 1:])
            if keep is not None:
                place = torch.cat((torch.zeros_like(keep[:, :1]), keep + 1), dim=1)
                hidden = hidden.gather(1, place.unsqueeze(2).expand(-1, -1, hidden.shape[2]))
        lengths.append(hidden.shape[1])
    assert lengths == golden["tokens_per_hidden_state"].tolist()
    assert [list(entry) for entry in flow.trace if entry[1] > 0] == golden["prune_trace"].tolist()
    assert flow.idx is not None
    np.testing.assert_array_equal(flow.idx.numpy(), golden["keep_indices"])
    np.testing.assert_allclose(states[-1][:, 1:].numpy(), golden["features"], rtol=0, atol=1e-4)


def _check_hooks(golden: dict[str, np.ndarray]) -> None:
    """The registered method on the unmodified model: survivors stand at their places, zeros at those of the others."""
    tower = _tower(golden)
    layers, image, patch, target = (int(golden["config"][i]) for i in (2, 4, 5, 6))
    side = image // patch
    facts = HostFacts("llava", 32, layers, layers - 2, True, patch_tokens=True)
    stage = TowerStage(
        tower, PictureTower("encoder.layers", class_token=True), facts, flowcut.FlowCut(target / side**2)
    )
    pixels = torch.from_numpy(golden["pixel_values"])
    pictures = pixels.shape[0]
    whole = EncodedItem(Layout.regular("image", pictures, side, side), slice(0, pictures))
    found: list[Tensor] = []
    with torch.no_grad():
        plain = tower(pixels, output_hidden_states=True).hidden_states[-2]
        stage.attach()
        # The released code couples the pictures of a batch, whatever images they belong to.
        stage.begin(EncodeCall("video", {"pixel_values_videos": pixels}, [whole]), lambda *given: found.extend(given))
        states = tower(pixels, output_hidden_states=True).hidden_states[-2]
        stage.detach()
        assert torch.equal(tower(pixels, output_hidden_states=True).hidden_states[-2], plain)
    groups, seen = found
    keep = torch.from_numpy(golden["keep_indices"])
    kept = torch.zeros(pictures, side * side, dtype=torch.bool).scatter_(1, keep, True)
    assert torch.equal(groups >= 0, kept)
    # Tokens that enter a block and that leave the last one; the plain list of states begins with the embeddings.
    assert [int(entry[0]) for entry in seen[0]] == golden["tokens_per_hidden_state"].tolist()[:layers]
    np.testing.assert_allclose(
        states[:, 1:][kept].view(pictures, -1, states.shape[2]).numpy(), golden["features"], rtol=0, atol=1e-4
    )
    assert bool((states[:, 1:][~kept] == 0).all())


def _check_functions(golden: dict[str, np.ndarray]) -> None:
    attention, semantic, value = (torch.from_numpy(golden[k]) for k in ("cls_attn", "semantic_attn", "value"))
    score = information_flow.flow_scores(attention, semantic, value)
    np.testing.assert_allclose(score.numpy(), golden["score"], rtol=1e-5, atol=1e-5)
    cases = zip(golden["ratio_attn"], golden["ratio_rpl"], golden["ratio_target"], strict=True)
    counts = [int(information_flow.prune_counts(torch.from_numpy(a), int(rem), int(t)).max()) for a, rem, t in cases]
    assert counts == golden["ratio_prune_num"].tolist()


def _rotate(x: Tensor, base: float = 10000.0) -> Tensor:
    """Rotary embedding of ``[H, S, d]`` with halves rotated against each other."""
    half = x.shape[2] // 2
    angle = torch.outer(torch.arange(x.shape[1]).float(), base ** (-torch.arange(half) / half)).repeat(1, 2)
    turned = torch.cat((-x[..., half:], x[..., :half]), dim=-1)
    return x * angle.cos() + turned * angle.sin()


def _check_decoder(golden: dict[str, np.ndarray]) -> None:
    _, heads, kv_heads, start, visual, end, target = golden["config"].tolist()
    hidden = torch.from_numpy(golden["hidden_states"])[0]
    projected = {}
    for part, count in (("q", heads), ("k", kv_heads), ("v", kv_heads)):
        weight = torch.from_numpy(golden[f"w.{part}_proj.weight"])
        projected[part] = (hidden @ weight.T).unflatten(1, (count, -1)).transpose(0, 1)
    q, k, v = _rotate(projected["q"]), _rotate(projected["k"]), projected["v"]
    wide_k, wide_v = (x.repeat_interleave(heads // kv_heads, 0) for x in (k, v))
    attended = torch.nn.functional.scaled_dot_product_attention(q, wide_k, wide_v, is_causal=True)
    output = attended.transpose(0, 1).flatten(1) @ torch.from_numpy(golden["w.o_proj.weight"]).T
    np.testing.assert_allclose(output.numpy(), golden["attn_output"][0], rtol=0, atol=1e-4)
    span = slice(start, start + visual)
    keep = flowcut.select_in_decoder(q[:, end - 1], k[:, span], v[:, end - 1], v[:, span], target)
    np.testing.assert_array_equal(keep.numpy(), golden["keep_indices"][0])


def test_matches_reference(golden: dict[str, np.ndarray]) -> None:
    if "pixel_values" in golden:
        _check_encoder(golden)
        _check_hooks(golden)
    elif "ratio_attn" in golden:
        _check_functions(golden)
    elif "hidden_states" in golden:
        _check_decoder(golden)
    else:
        pytest.fail(f"a file with the arrays {sorted(golden)} is of no known kind")
