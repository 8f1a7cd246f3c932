"""FastV through the whole runtime on the reference's tiny Llama, against the released code's outputs."""

from __future__ import annotations

from typing import Any

import torch
from transformers import CLIPVisionConfig, DynamicCache, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration
from transformers.modeling_outputs import BaseModelOutputWithPooling

from tokensieve.core.encode import EncodeCall, EncodedItem
from tokensieve.core.layout import Layout
from tokensieve.core.runtime import Run
from tokensieve.hosts.llava import Llava
from tokensieve.methods.fastv import FastV

SYSTEM = "fastv"


class _GoldenHost(Llava):
    """LLaVA whose one visual item is the reference's clip."""

    def __init__(self, frames: int, tokens_per_frame: int) -> None:
        self.grid = (frames, tokens_per_frame)

    def describe(self, base: Any, call: EncodeCall) -> list[EncodedItem]:
        frames, tokens = self.grid
        return [EncodedItem(Layout.regular("video", frames, 1, tokens), slice(0, frames))]


def _model(golden: Any) -> Any:
    """A LLaVA whose language model carries the reference's weights and whose token i embeds as input row i."""
    layers, hidden, mlp, heads, kv_heads, _, visual, _ = golden["config"].tolist()
    rows = golden["inputs_embeds"].shape[1]
    vocabulary = rows + 4
    text = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        rms_norm_eps=1e-6,
        rope_theta=10000.0,
        max_position_embeddings=4096,
    )
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14
    )
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=rows + 3)
    model = LlavaForConditionalGeneration(config).eval()
    text_model = model.model.language_model
    weights = {name.removeprefix("w."): torch.from_numpy(golden[name]) for name in golden if name.startswith("w.")}
    embeds = torch.from_numpy(golden["inputs_embeds"][0])
    table = torch.zeros(vocabulary, hidden)
    table[:rows] = embeds
    table[rows : rows + 3] = torch.from_numpy(golden["decode_embeds"])
    weights["embed_tokens.weight"] = table
    missing, unexpected = text_model.load_state_dict(weights, strict=False)
    assert not missing, missing
    assert not unexpected, unexpected
    start = int(golden["config"][5])

    def encode(pixel_values: torch.Tensor, **kwargs: Any) -> BaseModelOutputWithPooling:
        return BaseModelOutputWithPooling(pooler_output=[embeds[start : start + visual]])

    model.model.get_image_features = encode
    return model


def test_against_reference(golden: dict[str, Any]) -> None:
    """Kept set, positions, cache lengths exact; prefill and decoding states within 1e-4."""
    model = _model(golden)
    *_, start, visual, suffix = golden["config"].tolist()
    rows = start + visual + suffix
    ids = torch.arange(rows)[None]
    ids[0, start : start + visual] = rows + 3
    cut = int(golden["K"])
    method = FastV(retention=1 - float(golden["R"]), layer=cut)
    positions: list[torch.Tensor] = []
    text = model.model.language_model

    def spy(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        positions.append(kwargs["position_embeddings"][0])

    host = _GoldenHost(int(golden["frames"]), int(golden["tokens_per_frame"]))
    with torch.no_grad(), Run(model, host, [method]) as run:
        spies = [text.layers[cut].register_forward_pre_hook(spy, with_kwargs=True)]
        cache = DynamicCache(config=model.config.text_config)
        out = model.model(input_ids=ids, pixel_values=torch.zeros(1, 3, 28, 28), past_key_values=cache)
        spies[0].remove()
        kept = run.history[-1].items[0].decoder[cut]
        assert kept.tolist() == golden["kept"].tolist()
        assert [layer.get_seq_length() for layer in cache.layers] == golden["cache_lens"].tolist()
        expected, _ = text.rotary_emb(out.last_hidden_state, torch.from_numpy(golden["positions"])[None])
        assert torch.equal(positions[0][0], expected[0])
        reference = torch.from_numpy(golden["last_hidden_state"])
        assert torch.allclose(out.last_hidden_state, reference, atol=1e-4)
        for step in range(3):
            token = torch.tensor([[rows + step]])
            state = model.model(input_ids=token, past_key_values=cache).last_hidden_state[0, 0]
            assert torch.allclose(state, torch.from_numpy(golden["decode_hidden"][step]), atol=1e-4)
