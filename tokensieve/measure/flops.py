"""Arithmetic of a language model's forward pass, from its configuration and the tokens of every layer.

Two counts are offered, because papers and hardware count differently:

`decoder_work`
    What the matrix products of a real decoder cost: grouped-query attention, gated feed-forward, the head.
    Held in multiply-accumulates (`Work.macs`); one multiply-accumulate is two operations
    (`Work.operations`), which is the FLOPs of data sheets and of ``torch.utils.flop_counter``.
`convention_flops`
    The formula of the token-compression papers, ``4 n d^2 + 2 n^2 d + 2 n d m`` per layer with n visual
    tokens. It counts multiply-accumulates of a decoder with full multi-head attention and a feed-forward of
    two matrices, and calls them FLOPs; use it only to compare with published tables.

Norms, activations, rotary embeddings and the softmax are left out of both: they are below one percent.
Attention is counted as the full square of scores; kernels that skip the half behind the causal mask execute
about half of that term.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tokensieve.errors import HostError

__all__ = ["DecoderGeometry", "Work", "convention_flops", "decoder_work", "layer_tokens"]


@dataclass(frozen=True)
class Work:
    """Multiply-accumulates of a forward pass, by part.

    Attributes
    ----------
    projections
        Query, key, value and output projections of attention.
    attention
        Scores and weighted sums of values.
    mlp
        Feed-forward layers.
    other
        Patch embedding and projector of a vision encoder, or the head of a language model.
    """

    projections: int = 0
    attention: int = 0
    mlp: int = 0
    other: int = 0

    @property
    def macs(self) -> int:
        """All multiply-accumulates."""
        return self.projections + self.attention + self.mlp + self.other

    @property
    def operations(self) -> int:
        """Floating-point operations: a multiply-accumulate is two."""
        return 2 * self.macs

    def __add__(self, other: Work) -> Work:
        return Work(
            self.projections + other.projections,
            self.attention + other.attention,
            self.mlp + other.mlp,
            self.other + other.other,
        )

    def __mul__(self, times: int) -> Work:
        return Work(self.projections * times, self.attention * times, self.mlp * times, self.other * times)


@dataclass(frozen=True)
class DecoderGeometry:
    """The sizes of a decoder-only language model that its arithmetic depends on.

    Attributes
    ----------
    hidden, mlp
        Width of the states and of the feed-forward layer.
    layers
        Number of decoder layers.
    heads, kv_heads, head_dim
        Query heads, key / value heads, and channels of a head.
    vocabulary
        Rows of the head.
    gated
        Whether the feed-forward has three matrices (gate, up, down) or two.
    """

    hidden: int
    mlp: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    gated: bool = True

    @classmethod
    def of(cls, config: Any) -> DecoderGeometry:
        """From a Hugging Face configuration, of the language model itself or of a composite around it.

        Raises
        ------
        HostError
            When the configuration does not name the sizes of a plain decoder.
        """
        text = getattr(config, "text_config", None) or config
        sizes = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
        missing = [name for name in sizes if not isinstance(getattr(text, name, None), int)]
        if missing or getattr(text, "num_experts", None):
            reason = "is a mixture of experts" if not missing else f"has no {missing[0]}"
            kind = getattr(text, "model_type", type(text).__name__)
            raise HostError(f"FLOPs are counted for dense decoders, but the configuration {kind!r} {reason}.")
        heads = text.num_attention_heads
        return cls(
            hidden=text.hidden_size,
            mlp=text.intermediate_size,
            layers=text.num_hidden_layers,
            heads=heads,
            kv_heads=getattr(text, "num_key_value_heads", None) or heads,
            head_dim=getattr(text, "head_dim", None) or text.hidden_size // heads,
            vocabulary=text.vocab_size,
        )

    def cache_bytes(self, element_size: int) -> int:
        """Bytes that one token takes in the key / value cache of one layer."""
        return 2 * self.kv_heads * self.head_dim * element_size


def decoder_work(
    geometry: DecoderGeometry, tokens: Sequence[int], cached: Sequence[int] | None = None, logits: int = 1
) -> Work:
    """Multiply-accumulates of one forward pass of a decoder, exact for its matrix products.

    Parameters
    ----------
    geometry : DecoderGeometry
        Sizes of the model.
    tokens : sequence of int
        Tokens that run through every layer, text included; see `layer_tokens`.
    cached : sequence of int, optional
        Entries that are in the cache of every layer before the pass; none by default.
    logits : int
        Positions for which the head is computed; ``generate`` asks for one.

    Returns
    -------
    Work
        The head is under ``other``.

    Raises
    ------
    ValueError
        When the lists are not as long as the model is deep.
    """
    cached = [0] * geometry.layers if cached is None else cached
    if not len(tokens) == len(cached) == geometry.layers:
        raise ValueError(
            f"decoder_work needs one number of tokens per layer, {geometry.layers}, but got {len(tokens)} "
            f"and {len(cached)} for the cache."
        )
    inner = geometry.heads * geometry.head_dim
    weights = geometry.hidden * (2 * inner + 2 * geometry.kv_heads * geometry.head_dim)
    matrices = 3 if geometry.gated else 2
    total = sum(tokens)
    pairs = sum(n * (n + past) for n, past in zip(tokens, cached, strict=True))
    return Work(
        projections=total * weights,
        attention=2 * pairs * inner,
        mlp=total * matrices * geometry.hidden * geometry.mlp,
        other=logits * geometry.hidden * geometry.vocabulary,
    )


def convention_flops(tokens: Sequence[int], hidden: int, mlp: int) -> int:
    """Prefill cost in the convention of the token-compression papers: ``4 n d^2 + 2 n^2 d + 2 n d m`` a layer.

    Parameters
    ----------
    tokens : sequence of int
        n of every layer. HoliTom's tables count visual tokens only, DivPrune's text and visual tokens.
    hidden, mlp : int
        d and m.

    Returns
    -------
    int
        What those papers call FLOPs: multiply-accumulates, attention without grouping, no gate.
    """
    return sum(4 * n * hidden**2 + 2 * n**2 * hidden + 2 * n * hidden * mlp for n in tokens)


def layer_tokens(layers: int, entered: int, cuts: Mapping[int, int] | None = None) -> list[int]:
    """Number of tokens in every decoder layer.

    Parameters
    ----------
    layers : int
        Number of layers.
    entered : int
        Tokens in layer 0.
    cuts : mapping of int to int, optional
        Layer -> tokens from that layer on, for methods that cut inside the LLM.

    Returns
    -------
    list of int
        One number per layer.
    """
    counts, present = [], entered
    for layer in range(layers):
        present = (cuts or {}).get(layer, present)
        counts.append(present)
    return counts
