"""Tiny PPLLaVA models of random weights: a CLIP or SigLIP pair over 12 x 12 patches, and a small Llama or Qwen2."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from tokenizers import Tokenizer as RawTokenizer
from tokenizers import models, pre_tokenizers, processors
from torch import nn
from transformers import (
    CLIPConfig,
    CLIPModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    SiglipConfig,
    SiglipModel,
)

from tokensieve.hosts.tiny.vocabulary import CORPUS, llama_tokenizer, qwen_tokenizer
from tokensieve.models.ppllava import PPLlavaForConditionalGeneration, PPLlavaProcessor, assemble, assemble_processor

SIDE = 48
GRID = 12
TILES = [[48, 96], [96, 48], [96, 96]]


@lru_cache(maxsize=1)
def _words() -> dict[str, int]:
    words = sorted({word for word in pre_tokenizers.Whitespace().pre_tokenize_str(CORPUS) for word in [word[0]]})
    vocabulary = {word: number for number, word in enumerate(words)}
    for special in ("<unk>", "<start>", "<end>"):
        vocabulary[special] = len(vocabulary)
    return vocabulary


def question_tokenizer() -> PreTrainedTokenizerFast:
    """Whole words between a start and an end token; padded with the end token, as CLIP's."""
    vocabulary = _words()
    raw = RawTokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    special = [(token, vocabulary[token]) for token in ("<start>", "<end>")]
    raw.post_processor = processors.TemplateProcessing(single="<start> $A <end>", special_tokens=special)
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token="<start>", eos_token="<end>", pad_token="<end>", unk_token="<unk>"
    )


def pair(kind: str = "clip", **fields: Any) -> Any:
    """A CLIP or SigLIP pair; its positions and scale differ from those of a fresh one, so that questions matter."""
    torch.manual_seed(1)
    vocabulary = _words()
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = {**sizes, "vocab_size": len(vocabulary), "bos_token_id": vocabulary["<start>"]}
    text |= {"eos_token_id": vocabulary["<end>"], "pad_token_id": vocabulary["<end>"]}
    vision = {**sizes, "num_hidden_layers": 3, "image_size": SIDE, "patch_size": 4} | fields
    if kind == "clip":
        model: Any = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=24))
        nn.init.normal_(model.text_model.embeddings.token_embedding.weight)
    else:
        model = SiglipModel(SiglipConfig(text_config={**text, "max_position_embeddings": 64}, vision_config=vision))
        nn.init.normal_(model.text_model.embeddings.token_embedding.weight)
        nn.init.constant_(model.logit_scale, 4.0)
    nn.init.normal_(model.text_model.embeddings.position_embedding.weight, std=0.3)
    return model.eval()


def language_model(vocabulary: int, **fields: Any) -> LlamaForCausalLM:
    """Two layers of width 32."""
    torch.manual_seed(2)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(**{**sizes, "vocab_size": vocabulary, "bos_token_id": 1, "eos_token_id": 2, **fields})
    return LlamaForCausalLM(config).eval()


def build(
    kind: str = "clip", *, template: str = "vicuna", **fields: Any
) -> tuple[PPLlavaForConditionalGeneration, PPLlavaProcessor]:
    """A model in evaluation mode and its processor."""
    if template == "vicuna":
        tokenizer: Any = llama_tokenizer(["<image>", "<pad>"])
    else:
        tokenizer = qwen_tokenizer(["<|im_start|>", "<|im_end|>", "<image>", "<video>"])
    size = {"image_grid_pinpoints": TILES, **fields}
    tie = {"tie_word_embeddings": fields.pop("tie_word_embeddings")} if "tie_word_embeddings" in fields else {}
    size.pop("tie_word_embeddings", None)
    model = assemble(pair(kind), language_model(len(tokenizer), **tie), **size)
    nn.init.normal_(model.model.image_newline)
    return model, assemble_processor(model, tokenizer, question_tokenizer())
