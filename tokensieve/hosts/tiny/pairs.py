"""Contrastive pairs whose vision half is the tower of a tiny checkpoint, with a random text tower."""

from __future__ import annotations

from typing import Any

import torch
from tokenizers import processors
from transformers import CLIPConfig, CLIPModel, PreTrainedModel, PreTrainedTokenizerBase, SiglipConfig, SiglipModel

from tokensieve.errors import HostError
from tokensieve.hosts.tiny.vocabulary import qwen_tokenizer

__all__ = ["pair_of"]

_LENGTHS = {"clip_vision_model": 77, "siglip_vision_model": 64}


def pair_of(model: Any, *, seed: int = 0) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The pair that the tower of a tiny checkpoint might have been taken from.

    Parameters
    ----------
    model
        A model with a CLIP or SigLIP tower, for example from `build_in_memory`.
    seed
        Of the weights that the tower does not determine: text tower, projections, pooling head.

    Returns
    -------
    tuple of PreTrainedModel and PreTrainedTokenizerBase
        A `CLIPModel` or `SiglipModel` in float32 and its tokenizer; ``save_pretrained`` of both makes a folder that
        can be named as ``text_tower``.

    Raises
    ------
    HostError
        If the tower is neither.
    """
    vision = model.config.vision_config
    if vision.model_type not in _LENGTHS:
        raise HostError(f"A tower of type {vision.model_type!r} is no half of a pair; take a LLaVA family.")
    tokenizer = qwen_tokenizer(["<start>", "<end>"], eos_token="<end>")
    start, end = (tokenizer.convert_tokens_to_ids(token) for token in ("<start>", "<end>"))
    template = "<start> $A <end>" if vision.model_type.startswith("clip") else "$A <end>"
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[("<start>", start), ("<end>", end)]
    )
    length = _LENGTHS[vision.model_type]
    tokenizer.model_max_length = length
    tokenizer.padding_side = "right"
    text: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": 24 if vision.model_type.startswith("clip") else vision.hidden_size,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": length,
        "bos_token_id": start,
        "eos_token_id": end,
        "pad_token_id": tokenizer.pad_token_id,
    }
    shape = vision.to_dict() | {"vision_use_head": True}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if vision.model_type.startswith("clip"):
            pair: Any = CLIPModel(CLIPConfig(text_config=text, vision_config=shape, projection_dim=20))
        else:
            pair = SiglipModel(SiglipConfig(text_config=text, vision_config=shape))
        for parameter in pair.parameters():
            # Weights as small as at the start of training would leave all texts alike.
            parameter.data += 0.1 * torch.randn_like(parameter)
    tower = model.base_model.vision_tower.state_dict()
    pair.vision_model.load_state_dict({name: value.float() for name, value in tower.items()}, strict=False)
    return pair.eval(), tokenizer
