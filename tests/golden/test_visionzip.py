"""VisionZip against patch ids and merged tokens of the reference implementations."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import CLIPVisionConfig, CLIPVisionModel

from tokensieve.methods import visionzip
from tokensieve.ops.select import top_indices

SYSTEM = "visionzip"


def _tower(golden: dict[str, np.ndarray]) -> CLIPVisionModel:
    """A CLIP vision model with the weights of the file; its sizes follow from their shapes."""
    weights = {name.removeprefix("w."): torch.from_numpy(array) for name, array in golden.items() if name[:2] == "w."}
    hidden, _, patch, _ = weights["vision_model.embeddings.patch_embedding.weight"].shape
    layers = {int(name.split(".")[3]) for name in weights if ".layers." in name}
    config = CLIPVisionConfig(
        hidden_size=hidden,
        intermediate_size=weights["vision_model.encoder.layers.0.mlp.fc1.weight"].shape[0],
        num_hidden_layers=len(layers),
        num_attention_heads=hidden // golden["key_metric"].shape[2],
        image_size=golden["pixel_values"].shape[2],
        patch_size=patch,
        hidden_act="quick_gelu",
        layer_norm_eps=1e-5,
        attn_implementation="eager",
    )
    model = CLIPVisionModel(config).eval()
    prefix = "" if any(name.startswith("vision_model.") for name in model.state_dict()) else "vision_model."
    known = model.state_dict()
    state = {name.removeprefix(prefix): value for name, value in weights.items()}
    missing = set(known) - set(state)
    # The reference never reads the block behind the projected one, and its copy may lack the last norm.
    assert all(f"layers.{max(layers)}." in name or "post_layernorm" in name or "ids" in name for name in missing)
    model.load_state_dict({**known, **{name: value for name, value in state.items() if name in known}})
    return model


def _check_model(golden: dict[str, np.ndarray]) -> None:
    model = _tower(golden)
    projected: dict[str, torch.Tensor] = {}
    tower = getattr(model, "vision_model", model)
    attention = tower.encoder.layers[-2].self_attn
    handle = attention.k_proj.register_forward_hook(lambda module, args, output: projected.update(keys=output))
    with torch.no_grad():
        out = model(torch.from_numpy(golden["pixel_values"]), output_hidden_states=True, output_attentions=True)
    handle.remove()
    keys = projected["keys"].unflatten(2, (attention.num_heads, -1)).transpose(1, 2)
    metric = visionzip.mean_head_keys(keys)
    np.testing.assert_allclose(metric.numpy(), golden["key_metric"], rtol=0, atol=1e-4)
    hidden, row = out.hidden_states[-2], out.attentions[-2][:, :, 0]
    np.testing.assert_allclose(hidden.numpy(), golden["hidden_minus2"], rtol=0, atol=1e-4)
    _check_class_form(golden, hidden, row, metric, 1e-4)


def _check_class_form(
    golden: dict[str, np.ndarray], hidden: torch.Tensor, row: torch.Tensor, metric: torch.Tensor, tolerance: float
) -> None:
    dominant, contextual = int(golden["dominant"]), int(golden["contextual"])
    kept = top_indices(row.sum(dim=1)[:, 1:], dominant - 1)
    np.testing.assert_array_equal(kept.numpy(), golden["kept_patches"])
    output = visionzip.compress_with_class(hidden, row, metric, dominant, contextual)
    np.testing.assert_allclose(output.numpy(), golden["output"], rtol=0, atol=tolerance)
    assert torch.equal(output[:, 0], hidden[:, 0])


def _check_video_form(golden: dict[str, np.ndarray]) -> None:
    features, attention, metric = (torch.from_numpy(golden[k]) for k in ("features", "received_attn", "key_metric"))
    dominant, contextual = visionzip.split_budget(int(golden["spatial_tokens"]))
    assert (dominant, contextual) == (int(golden["dominant"]), int(golden["contextual"]))
    merged = visionzip.compress_frames(features, attention, metric, dominant, contextual)
    frames, patches = attention.shape
    place = merged.source.view(frames, -1) % patches
    np.testing.assert_array_equal(place[:, :dominant].numpy(), golden["kept_patches"])
    in_rank = top_indices(attention, dominant, order="rank")
    np.testing.assert_array_equal(in_rank.numpy(), golden["kept_patches_topk_order"])
    if "newline" not in golden:
        output = merged.features.view(frames, -1, features.shape[2])
        np.testing.assert_allclose(output.numpy(), golden["output"], rtol=0, atol=1e-5)
        return
    newline, columns = torch.from_numpy(golden["newline"]), round(patches**0.5)
    official, correct = (
        visionzip.grid_tokens(merged, attention, dominant, newline, columns, official=flag) for flag in (True, False)
    )
    np.testing.assert_allclose(official.numpy(), golden["output"], rtol=0, atol=1e-5)
    grid = visionzip.compress_frames(features, attention, metric, dominant, contextual, layout="grid")
    is_newline = (correct == newline).all(dim=1)
    assert int(is_newline.sum()) == frames * (patches // columns)
    assert torch.equal(correct[~is_newline], grid.features)


def test_matches_reference(golden: dict[str, np.ndarray]) -> None:
    if "pixel_values" in golden:
        _check_model(golden)
    elif "cls_attn" in golden:
        hidden, row, metric = (torch.from_numpy(golden[name]) for name in ("hidden", "cls_attn", "key_metric"))
        _check_class_form(golden, hidden, row, metric, 1e-5)
    elif "received_attn" in golden:
        _check_video_form(golden)
    else:
        pytest.fail(f"a file with the arrays {sorted(golden)} is of no known kind")
