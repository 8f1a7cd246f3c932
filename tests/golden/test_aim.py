"""AIM against merged tokens, ranks and a whole decoder of the reference implementation."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny_llama import tiny_llama
from transformers import Qwen2Config, Qwen2Model
from transformers.models.qwen2.modeling_qwen2 import apply_rotary_pos_emb, repeat_kv

from tokensieve.core.layout import Layout
from tokensieve.core.plan import keep_all
from tokensieve.core.runtime import Run
from tokensieve.methods import aim
from tokensieve.ops.merge import apply_merge

SYSTEM = "aim"
MASKED = -1e30


def _visual(golden: dict[str, np.ndarray], length: int) -> torch.Tensor:
    idx, start = torch.arange(length), int(golden["visual_start"])
    return (idx >= start) & (idx < start + int(golden["visual_count"]))


def _check_merge(golden: dict[str, np.ndarray]) -> None:
    features = torch.from_numpy(golden["features"])
    rounds = golden["rounds"].tolist()
    frames = features.shape[0]
    merged = aim.merge_frames(features, rounds)
    output = merged.features.unflatten(0, (frames, -1))
    np.testing.assert_allclose(output.numpy(), golden["output"], rtol=0, atol=1e-5)
    again = apply_merge(features.flatten(0, 1), merged.merge_map, merged.source.numel())
    torch.testing.assert_close(again, merged.features, rtol=0, atol=1e-5)
    after = [aim.merge_frames(features, rounds[: n + 1]).source.numel() // frames for n in range(len(rounds))]
    np.testing.assert_array_equal(after, golden["tokens_after_round"])
    ordered = aim.merge_frames(features, rounds, keep_order=True)
    assert bool((ordered.source.diff() > 0).all())
    assert torch.equal(ordered.features, merged.features[merged.source.argsort()])


def _check_rank(golden: dict[str, np.ndarray]) -> None:
    logits, before = torch.from_numpy(golden["logits"]), torch.from_numpy(golden["mask_before"])
    importance = aim.attention_rank(logits)
    np.testing.assert_allclose(importance.numpy(), golden["importance"], rtol=1e-4, atol=0)
    after = aim.keep_visible(importance, _visual(golden, logits.shape[1]), before, float(golden["keep_rate"]))
    np.testing.assert_array_equal(after.numpy(), golden["mask_after"])


def _decoder(golden: dict[str, np.ndarray]) -> Qwen2Model:
    weights = {name.removeprefix("w."): torch.from_numpy(array) for name, array in golden.items() if name[:2] == "w."}
    hidden = golden["inputs_embeds"].shape[1]
    config = Qwen2Config(
        vocab_size=2,
        hidden_size=hidden,
        intermediate_size=weights["layers.0.mlp.gate_proj.weight"].shape[0],
        num_hidden_layers=len({name.split(".")[1] for name in weights if name.startswith("layers.")}),
        num_attention_heads=2,
        num_key_value_heads=weights["layers.0.self_attn.k_proj.weight"].shape[0] // (hidden // 2),
        max_position_embeddings=4096,
        rms_norm_eps=1e-6,
        attn_implementation="eager",
    )
    model = Qwen2Model(config).eval()
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert missing == ["embed_tokens.weight"] and not unexpected
    return model


def _forward(
    golden: dict[str, np.ndarray], removal: bool, imposed: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Masks after every layer, states behind layer 14 and final states, the last two for tokens of the prompt.

    ``removal`` shortens the sequence instead of masking columns; ``imposed`` gives the masks instead of the rank.
    """
    model = _decoder(golden)
    states = torch.from_numpy(golden["inputs_embeds"])
    length = states.shape[0]
    visual, visible = _visual(golden, length), torch.ones(length, dtype=torch.bool)
    first, last = aim.prune_window(len(model.layers))
    cos, sin = model.rotary_emb(states[None], torch.arange(length)[None])
    masks, middle = [], torch.empty(0)
    for number, layer in enumerate(model.layers):
        rows = visible if removal else torch.ones_like(visible)
        idx = rows.nonzero().flatten()
        blocked = (idx[None, :] > idx[:, None]) | ~visible[idx][None, :]
        mask = torch.zeros(1, 1, idx.numel(), idx.numel()).masked_fill(blocked, MASKED)
        rotary = (cos[:, idx], sin[:, idx])
        attention, normed = layer.self_attn, layer.input_layernorm(states[idx][None])
        q, k = (
            projection(normed).unflatten(2, (-1, attention.head_dim)).transpose(1, 2)
            for projection in (attention.q_proj, attention.k_proj)
        )
        q, k = apply_rotary_pos_emb(q, k, *rotary)
        k = repeat_kv(k, q.shape[1] // k.shape[1])
        logits = (q @ k.transpose(2, 3) * attention.head_dim**-0.5).masked_fill(blocked, MASKED)[0]
        out = layer(states[idx][None], attention_mask=mask, position_embeddings=rotary)
        states = states.clone()
        states[idx] = (out if isinstance(out, torch.Tensor) else out[0])[0]
        if imposed is not None:
            visible = imposed[number]
        elif number >= first:
            importance = torch.zeros(length)
            importance[idx] = aim.attention_rank(logits, total=length)
            visible = aim.keep_visible(importance, visual, visible, aim.visual_share(number, first, last))
        masks.append(visible)
        middle = states if number == 14 else middle
    return torch.stack(masks), middle, model.norm(states)


def _check_decoder(golden: dict[str, np.ndarray]) -> None:
    text = ~_visual(golden, golden["inputs_embeds"].shape[0]).numpy()
    expected = torch.from_numpy(golden["mask_after_layer"])
    with torch.no_grad():
        masks, middle, final = _forward(golden, removal=False)
        np.testing.assert_array_equal(masks.numpy(), expected.numpy())
        for states, name in ((middle, "hidden_after_14"), (final, "last_hidden")):
            np.testing.assert_allclose(states.numpy()[text], golden[name][text], rtol=0, atol=1e-4)
        _, _, imposed = _forward(golden, removal=True, imposed=expected)
        np.testing.assert_allclose(imposed.numpy()[text], golden["last_hidden"][text], rtol=0, atol=1e-4)
        free, _, _ = _forward(golden, removal=True)
    assert free.sum(dim=1).tolist() == expected.sum(dim=1).tolist()
    is_visual = torch.from_numpy(~text)
    common = (free & expected & is_visual).sum(dim=1)
    assert bool((common >= 0.6 * (expected & is_visual).sum(dim=1)).all())


def _check_runtime(golden: dict[str, np.ndarray]) -> None:
    """The method on a model with hooks: hidden as released, and removed as it does by default."""
    hidden, visual = golden["inputs_embeds"].shape[1], int(golden["visual_count"])
    mlp, kv = (golden[f"w.layers.0.{name}.weight"].shape[0] for name in ("mlp.gate_proj", "self_attn.k_proj"))
    start, expected = int(golden["visual_start"]), golden["mask_after_layer"]
    known = dict(golden, config=np.array([28, hidden, mlp, 2, 2 * kv // hidden]))
    known["inputs_embeds"] = golden["inputs_embeds"][None]
    text = ~_visual(golden, expected.shape[1])
    for exact in (True, False):
        tiny = tiny_llama(known, [start], Layout.regular("video", 1, 1, visual))
        method = aim.Aim(exact=exact, metric="features")
        method.plan_tokens = lambda sample: keep_all(visual)  # type: ignore[method-assign]
        with Run(tiny.model, tiny.host, [method]) as run:
            states = tiny.prefill()[0]
            stages = run.history[-1].items[0].decoder
        assert sorted(stages) == list(range(15, 23))
        for layer, kept in stages.items():
            reference = expected[layer - 1][start : start + visual].nonzero()[0].tolist()
            assert kept.numel() == len(reference)
            if exact:
                assert kept.tolist() == reference
            else:
                assert len(set(kept.tolist()) & set(reference)) >= 0.6 * len(reference)
        if exact:
            assert torch.allclose(states[text], torch.from_numpy(golden["last_hidden"])[text], atol=1e-4)
            assert tiny.cache_lengths() == [expected.shape[1]] * 28
        else:
            assert tiny.cache_lengths() == [expected.shape[1]] * 15 + expected.sum(1)[14:27].tolist()


def test_matches_reference(golden: dict[str, np.ndarray]) -> None:
    if "rounds" in golden:
        _check_merge(golden)
    elif "keep_rate" in golden:
        _check_rank(golden)
    elif "mask_after_layer" in golden:
        _check_decoder(golden)
        _check_runtime(golden)
    else:
        pytest.fail(f"a file with the arrays {sorted(golden)} is of no known kind")
