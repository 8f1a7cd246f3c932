"""From the states of a vision tower to the space that pictures and texts of a contrastive pair share."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from tokensieve.errors import SignalError

__all__ = ["ClipHead", "SharedHead", "SiglipHead", "Summary"]


class Summary(NamedTuple):
    """What an attention-pooling head makes of pictures.

    Attributes
    ----------
    vector : Tensor [B, C]
        Pooled pictures.
    attention : Tensor [B, N]
        Attention of the probe to the patches, mean over heads.
    """

    vector: Tensor
    attention: Tensor


class SharedHead(Protocol):
    """What both kinds of pairs can do with tower states."""

    def align(self, states: Tensor) -> Tensor:
        """Patches ``[..., Dv]`` in the shared space ``[..., P]``, not normalised."""

    def project(self, states: Tensor) -> Tensor:
        """The visual projection alone, without the norm in front of it."""

    def summarise(self, states: Tensor) -> Summary:
        """Pooled vector and attention of pictures ``[B, N, Dv]``."""


class ClipHead(nn.Module):
    """CLIP: LayerNorm and visual projection, which were trained on the class token.

    Parameters
    ----------
    norm, projection : nn.Module
        ``vision_model.post_layernorm`` and ``visual_projection``.
    """

    def __init__(self, norm: nn.Module, projection: nn.Module) -> None:
        super().__init__()
        self.norm, self.projection = norm, projection

    def align(self, states: Tensor) -> Tensor:
        """Patches ``[..., Dv]`` in the shared space ``[..., P]``, not normalised."""
        return self.project(self.norm(states.to(_dtype(self.norm))))

    def project(self, states: Tensor) -> Tensor:
        """The visual projection alone, without the norm in front of it."""
        aligned: Tensor = self.projection(states.to(_dtype(self.projection)))
        return aligned

    def summarise(self, states: Tensor) -> Summary:
        """CLIP has no attention-pooling head."""
        raise SignalError("A CLIP tower has no attention-pooling head; signals of such a head need a SigLIP tower.")


class SiglipHead(nn.Module):
    """SigLIP: LayerNorm and attention-pooling head with one learned probe.

    Parameters
    ----------
    norm, head : nn.Module
        ``vision_model.post_layernorm`` and ``vision_model.head``.
    """

    def __init__(self, norm: nn.Module, head: Any) -> None:
        super().__init__()
        self.norm, self.head = norm, head

    def align(self, states: Tensor) -> Tensor:
        """Patches through the value path of the head: value projection and residual MLP, ``[..., Dv]``."""
        attention = self.head.attention
        weight, bias = attention.in_proj_weight.chunk(3)[2], attention.in_proj_bias.chunk(3)[2]
        value = linear(self.norm(states.to(_dtype(self.norm))), weight, bias)
        aligned: Tensor = value + self.head.mlp(self.head.layernorm(value))
        return aligned

    def project(self, states: Tensor) -> Tensor:
        """SigLIP has no visual projection."""
        raise SignalError("A SigLIP tower has no visual projection; signals behind it need a CLIP tower.")

    def summarise(self, states: Tensor) -> Summary:
        """Pooled vector ``[B, Dv]`` and attention of the probe to the patches ``[B, N]``, mean over heads."""
        normed = self.norm(states.to(_dtype(self.norm)))
        probe = self.head.probe.repeat(normed.shape[0], 1, 1)
        pooled, weights = self.head.attention(probe, normed, normed, need_weights=True, average_attn_weights=True)
        vector = pooled + self.head.mlp(self.head.layernorm(pooled))
        return Summary(vector[:, 0], weights[:, 0])


def _dtype(module: nn.Module) -> torch.dtype:
    return next(module.parameters()).dtype
