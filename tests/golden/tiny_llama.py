"""A tiny LLaVA that carries a reference's Llama (or Qwen2) weights, run through the whole runtime.

Token i of row b embeds as row i of the reference's input embeddings of row b; the visual rows come out of the
encoder. Decoding steps have token ids of their own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import (
    CLIPVisionConfig,
    DynamicCache,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen2Config,
)
from transformers.modeling_outputs import BaseModelOutputWithPooling

from tokensieve.core.encode import EncodeCall, EncodedItem
from tokensieve.core.layout import Layout
from tokensieve.hosts.llava import Llava


class _GoldenHost(Llava):
    """LLaVA whose visual items are the reference's: one per row."""

    def __init__(self, layout: Layout, rows: int) -> None:
        self.layout, self.rows = layout, rows

    def describe(self, base: Any, call: EncodeCall) -> list[EncodedItem]:
        frames = len(self.layout.views)
        return [EncodedItem(self.layout, slice(row * frames, (row + 1) * frames)) for row in range(self.rows)]


@dataclass
class TinyLlama:
    """The model, its host, and the prompt of the reference.

    Attributes
    ----------
    ids : Tensor [B, S]
        Prompt with placeholders at the visual tokens.
    """

    model: Any
    host: Llava
    ids: torch.Tensor
    cache: DynamicCache

    @property
    def text(self) -> Any:
        """The language model."""
        return self.model.model.language_model

    def prefill(self) -> torch.Tensor:
        """Last hidden states [B, S', D] of the prompt, caches filled."""
        pixels = torch.zeros(self.ids.shape[0], 3, 28, 28)
        arguments = {"input_ids": self.ids, "pixel_values": pixels, "past_key_values": self.cache}
        with torch.no_grad():
            return self.model.model(**arguments).last_hidden_state

    def decode(self, step: int) -> torch.Tensor:
        """State [D] of the next single token, by the number of its stored embedding."""
        token = torch.tensor([[self.ids.numel() + step]])
        with torch.no_grad():
            return self.model.model(input_ids=token, past_key_values=self.cache).last_hidden_state[0, 0]

    def cache_lengths(self) -> list[int]:
        """Entries that every layer's cache holds."""
        return [int(layer.get_seq_length()) for layer in self.cache.layers]


def tiny_llama(golden: dict[str, Any], starts: list[int], layout: Layout) -> TinyLlama:
    """Build the model of one golden file.

    Parameters
    ----------
    golden
        Arrays ``config`` (layers, hidden, mlp, heads, kv heads, ...), ``inputs_embeds``, ``w.*`` and, for decoding,
        ``decode_embeds``.
    starts
        First visual position of every row.
    layout
        Geometry of the visual item of a row.
    """
    layers, hidden, mlp, heads, kv_heads, *_ = golden["config"].tolist()
    embeds = torch.from_numpy(golden["inputs_embeds"])
    steps = torch.from_numpy(golden["decode_embeds"]).view(-1, hidden) if "decode_embeds" in golden else embeds[0, :0]
    rows, length, _ = embeds.shape
    placeholder = rows * length + steps.shape[0]
    biased = "w.layers.0.self_attn.q_proj.bias" in golden
    text = (Qwen2Config if biased else LlamaConfig)(
        vocab_size=placeholder + 1,
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
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=placeholder)
    model = LlavaForConditionalGeneration(config).eval()
    weights = {name.removeprefix("w."): torch.from_numpy(golden[name]) for name in golden if name.startswith("w.")}
    weights["embed_tokens.weight"] = torch.cat((embeds.flatten(0, 1), steps, torch.zeros(1, hidden)))
    missing, unexpected = model.model.language_model.load_state_dict(weights, strict=False)
    assert not missing, missing
    assert not unexpected, unexpected
    spans = [slice(start, start + layout.tokens) for start in starts]
    encoded = [embeds[row, span] for row, span in enumerate(spans)]

    def encode(pixel_values: torch.Tensor, **kwargs: Any) -> BaseModelOutputWithPooling:
        return BaseModelOutputWithPooling(pooler_output=encoded)

    model.model.get_image_features = encode
    ids = torch.arange(rows * length).view(rows, length)
    for row, span in enumerate(spans):
        ids[row, span] = placeholder
    return TinyLlama(model, _GoldenHost(layout, rows), ids, DynamicCache(config=text))
