"""DyCoke against values of the released code: kept patches, and visible keys while decoding a tiny Qwen2."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from tiny_llama import tiny_llama
from transformers import DynamicCache, Qwen2Config, Qwen2Model

from tokensieve.core.layout import Layout
from tokensieve.core.plan import keep_all
from tokensieve.core.runtime import Run
from tokensieve.core.sample import StepSample
from tokensieve.methods.dycoke import DyCoke, DynamicPruning, frame_counts, temporal_pruning

SYSTEM = "dycoke"


def _check_merging(golden: dict[str, np.ndarray]) -> None:
    features = torch.from_numpy(golden["feat"])
    counts = frame_counts(features.shape[0], int(golden["tokens_per_frame"]), float(golden["K"]), official=True)
    np.testing.assert_array_equal(counts.numpy(), golden["per_frame"])
    kept = temporal_pruning(features, counts, "similarity")
    np.testing.assert_array_equal(kept.numpy(), golden["kept_index_in_output_order"])


def _model(golden: dict[str, np.ndarray]) -> Any:
    layers, hidden, mlp, heads, kv_heads, *_ = golden["config"].tolist()
    config = Qwen2Config(
        vocab_size=4,
        hidden_size=hidden,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        rms_norm_eps=1e-6,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )
    config._attn_implementation = "eager"
    model = Qwen2Model(config).eval()
    weights = {name.removeprefix("w."): torch.from_numpy(golden[name]) for name in golden if name.startswith("w.")}
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert set(missing) <= {"embed_tokens.weight"}, missing
    assert not unexpected, unexpected
    return model


def _check_decoding(golden: dict[str, np.ndarray]) -> None:
    model, layer = _model(golden), int(golden["layer"])
    start, length = int(golden["image_token_start"]), int(golden["image_token_length"])
    pruning = DynamicPruning(start, length, float(golden["P"]), reuse=False)
    assert pruning.count == int(golden["num_kept"])
    rows: list[torch.Tensor] = []
    visible: list[torch.Tensor] = []

    def read(module: Any, args: Any, output: Any) -> None:
        row = output[1][0].mean(dim=0)[-1]
        rows.append(row[start : start + length])
        visible.append(pruning.step(rows[-1], row.numel()))

    def hide(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        kwargs["attention_mask"] = torch.zeros(visible[-1].shape).masked_fill(~visible[-1], -torch.inf)[
            None, None, None
        ]
        return args, kwargs

    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        prefill = model(inputs_embeds=torch.from_numpy(golden["inputs_embeds"]), past_key_values=cache)
        expected = torch.from_numpy(golden["prefill_last_hidden"])
        assert torch.allclose(prefill.last_hidden_state[0, -1], expected, atol=1e-4)
        model.layers[layer - 1].self_attn.register_forward_hook(read)
        for later in model.layers[layer:]:
            later.register_forward_pre_hook(hide, with_kwargs=True)
        for step, embed in enumerate(torch.from_numpy(golden["decode_embeds"])):
            out = model(inputs_embeds=embed[None, None], past_key_values=cache).last_hidden_state[0, 0]
            assert abs(pruning.similarity - float(golden["similarity"][step])) < 1e-4
            attended = golden["attended"][step][: visible[-1].numel()]
            np.testing.assert_array_equal(visible[-1].numpy(), attended)
            assert not golden["attended"][step][visible[-1].numel() :].any()
            assert torch.allclose(out, torch.from_numpy(golden["decode_hidden"][step]), atol=1e-4)
    np.testing.assert_allclose(torch.stack(rows).numpy(), golden["visual_attention"], rtol=0, atol=1e-5)


def _check_runtime(golden: dict[str, Any]) -> None:
    """The method on a model with hooks: attention, cosine, visible keys and states of every step."""
    start, visual = int(golden["config"][5]), int(golden["config"][6])
    prompt = golden["inputs_embeds"].shape[1]
    tiny = tiny_llama(golden, [start], Layout.regular("video", 1, 1, visual))
    method = DyCoke(removed=0.0, hidden_share=float(golden["P"]), layer=int(golden["layer"]), official=True)
    # The reference has one frame; the released loops of the first stage need more.
    method.plan_tokens = lambda sample: keep_all(visual)  # type: ignore[method-assign]
    attention: list[torch.Tensor] = []
    visible: list[torch.Tensor] = []
    rules: list[DynamicPruning] = []

    def spy(sample: StepSample) -> torch.Tensor | None:
        shown = DyCoke.plan_step(method, sample)
        assert shown is not None
        attention.append(sample.attention)
        visible.append(shown)
        rules.append(sample.memory["rule"])
        return shown

    method.plan_step = spy  # type: ignore[method-assign]
    with Run(tiny.model, tiny.host, [method]):
        states = tiny.prefill()
        assert torch.allclose(states[0, -1], torch.from_numpy(golden["prefill_last_hidden"]), atol=1e-4)
        assert not visible
        for step in range(len(golden["decode_hidden"])):
            reference = torch.from_numpy(golden["decode_hidden"][step])
            assert torch.allclose(tiny.decode(step), reference, atol=1e-4)
            assert abs(rules[-1].similarity - float(golden["similarity"][step])) < 1e-4
            np.testing.assert_array_equal(visible[-1].numpy(), golden["attended"][step][start : start + visual])
    assert tiny.cache_lengths() == [prompt + len(visible)] * int(golden["config"][0])
    np.testing.assert_allclose(torch.stack(attention)[:, :-1].numpy(), golden["visual_attention"], rtol=0, atol=1e-5)


def test_matches_reference(golden: dict[str, np.ndarray]) -> None:
    if "attended" in golden:
        _check_decoding(golden)
        _check_runtime(golden)
    else:
        _check_merging(golden)
