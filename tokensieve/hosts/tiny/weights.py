"""Random weights that are repeatable and lively.

The usual initialisation (standard deviation 0.02) leaves a small model flat: every attention row is nearly
uniform, all logits nearly tie, and any two selections of tokens look alike. Here every matrix is scaled by
its fan-in, so that activations keep unit size, queries and keys a little more, so that attention is peaked,
and the head more again, so that answers are clear. Each tensor is drawn from the seed and its own name, and
therefore depends on nothing else.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

__all__ = ["enliven"]

QUERY_KEY_GAIN = 1.6
"""Scale of query and key projections: attention logits get a standard deviation of about its square."""

HEAD_GAIN = 2.0
"""Scale of the language modelling head, the standard deviation of the logits."""

NEWLINE_STD = 0.5
"""Standard deviation of the newline embedding; word embeddings have 1."""

POSITION_STD = 0.4
"""Standard deviation of learned positions, below that of patch content."""

LAYER_SCALE = 0.6
"""Value of per-channel layer scales."""

_BIAS_STD = 0.1
_NORM_STD = 0.1


def _generator(seed: int, name: str) -> torch.Generator:
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def _gains(name: str, parameter: torch.Tensor, depth: int) -> torch.Tensor | float:
    """Gain of a matrix by its role: one value, or one per row where q, k and v share a matrix."""
    module = name.split(".")[-2]
    if module in ("q_proj", "k_proj"):
        return QUERY_KEY_GAIN
    if module == "qkv":
        rows = torch.full((parameter.shape[0], 1), QUERY_KEY_GAIN)
        rows[parameter.shape[0] * 2 // 3 :] = 1.0
        return rows
    if module in ("o_proj", "out_proj", "projection_layer", "down_proj", "fc2") or name.endswith("attn.proj.weight"):
        # Each layer adds to the residual stream; keep its growth the same for any depth.
        return 2.0 / math.sqrt(depth)
    if module == "lm_head":
        return HEAD_GAIN
    return 1.5 if module in ("gate_proj", "up_proj", "fc1", "linear_fc1") else 1.0


def _draw(name: str, parameter: torch.Tensor, depth: int, seed: int) -> torch.Tensor:
    """Values of one parameter, float32 on the CPU."""
    noise = torch.randn(parameter.shape, generator=_generator(seed, name))
    leaf = name.rsplit(".", 1)[-1]
    if leaf.startswith("lambda_"):
        return torch.full_like(noise, LAYER_SCALE)
    if leaf == "image_newline":
        return NEWLINE_STD * noise
    if "position_embedding" in name or "pos_embed" in name:
        return POSITION_STD * noise
    if leaf in ("class_embedding", "cls_token") or "embed_tokens" in name:
        return noise
    if leaf == "bias":
        return _BIAS_STD * noise
    if parameter.dim() == 1:
        centre = QUERY_KEY_GAIN if ".q_norm." in name or ".k_norm." in name else 1.0
        return centre + _NORM_STD * noise
    fan_in = parameter[0].numel()
    return _gains(name, parameter, depth) * noise / math.sqrt(fan_in)


@torch.no_grad()
def enliven(model: PreTrainedModel, *, seed: int = 0, silent_ids: Sequence[int] = ()) -> None:
    """Overwrite every parameter of a model in place.

    Parameters
    ----------
    model : PreTrainedModel
        A model with a vision tower, a projector and a language model.
    seed : int
        The same seed gives the same weights whatever the machine or the order of parameters.
    silent_ids : sequence of int
        Vocabulary entries that the model shall never answer with (special tokens): their rows of an untied
        head are set to zero, and a zero logit never wins against those of the other words.
    """
    config = model.config
    text_depth = config.text_config.num_hidden_layers
    tower = config.vision_config
    tower_depth = tower.depth if hasattr(tower, "depth") else tower.num_hidden_layers
    for name, parameter in model.named_parameters():
        depth = text_depth if "language_model" in name else tower_depth
        parameter.copy_(_draw(name, parameter, depth, seed))
    head = model.get_output_embeddings()
    if head.weight is not model.get_input_embeddings().weight:
        head.weight[list(silent_ids)] = 0.0
