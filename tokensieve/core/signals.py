"""The named quantities that methods ask for and hosts provide.

A request is a name, optionally with a layer: ``"encoder.received_attention@feature"``. Layers are counted from
zero; ``feature`` is the tower layer whose output is projected, ``last`` the last layer the tower runs. A number behind
a colon is a parameter of the signal: ``"encoder.focused_attention@feature:34.76"``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Availability = Literal["native", "recomputed", "extra pass", "absent"]
Unit = Literal["patch", "view", "prompt"]


@dataclass(frozen=True)
class Signal:
    """A named quantity: what it is, its shape, the stage at which it exists, and what there is one of it for.

    Signals of a pair of towers exist on towers of the kinds in ``pair`` (see `tokensieve.pairing`).
    """

    name: str
    stage: str
    shape: str
    meaning: str
    unit: Unit = "patch"
    pair: tuple[str, ...] = ()


SIGNALS: dict[str, Signal] = {
    signal.name: signal
    for signal in (
        Signal(
            "tokens.features",
            "tokens",
            "[n, D]",
            "Patch features as they enter the LLM, after projector and pooling.",
        ),
        Signal(
            "tokens.first_attention",
            "tokens",
            "[n]",
            "Attention of the text behind the last visual item to a visual token in the first layer of the LLM, mean "
            "over heads and text tokens; needs that layer's norm and projections only.",
        ),
        Signal(
            "encoder.received_attention",
            "encoder",
            "[n]",
            "Attention that a patch receives in one tower layer, mean over heads and queries, pooled like the "
            "features; recomputed from queries and keys in chunks.",
        ),
        Signal(
            "encoder.class_attention",
            "encoder",
            "[n]",
            "Attention of the class token to a patch in one tower layer, mean over heads, pooled like the features.",
        ),
        Signal(
            "encoder.patch_attention",
            "encoder",
            "[n]",
            "Attention that a patch receives from the patches alone in one tower layer with a class token, mean over "
            "heads and querying patches, pooled like the features.",
        ),
        Signal(
            "encoder.given_attention",
            "encoder",
            "[n]",
            "Attention that a patch gives to the patches instead of the class token in one tower layer, mean over "
            "heads and patches, pooled like the features.",
        ),
        Signal(
            "encoder.mean_key",
            "encoder",
            "[n, d]",
            "Keys of a patch in one tower layer, mean over heads, pooled like the features.",
        ),
        Signal(
            "encoder.focused_attention",
            "encoder",
            "[n]",
            "Attention that a patch receives in one tower layer from the patches that receive more than a multiple "
            "(the parameter) of the mean, mean over heads and these patches, pooled like the features.",
        ),
        Signal(
            "encoder.pixel_entropy",
            "encoder",
            "[n]",
            "Softmax over a picture of the entropy of the grey values of its patches, pooled like the features.",
        ),
        Signal(
            "encoder.joined_keys",
            "encoder",
            "[n, C]",
            "Output of the key projection of one tower layer with a class token, heads not split, pooled like the "
            "features.",
        ),
        Signal(
            "encoder.joined_class_attention",
            "encoder",
            "[n]",
            "Attention of the class token to a patch in one tower layer as if it had a single head, pooled like the "
            "features.",
        ),
        Signal(
            "encoder.mean_query_attention",
            "encoder",
            "[n]",
            "Attention of the mean query of a frame to the mean keys of the patches behind each token, in one layer of "
            "a tower that merges patches, mean over heads.",
        ),
        Signal(
            "encoder.states",
            "encoder",
            "[n, C]",
            "Output of one tower layer in front of norm and projector, pooled like the features.",
        ),
        Signal(
            "encoder.aligned",
            "encoder",
            "[n, P]",
            "Output of one tower layer in the space that the tower shares with its text tower, not normalised, pooled "
            "like the features.",
            pair=("clip", "siglip"),
        ),
        Signal(
            "encoder.projected",
            "encoder",
            "[n, P]",
            "Output of one tower layer behind CLIP's visual projection without the norm in front of it, pooled like "
            "the features.",
            pair=("clip",),
        ),
        Signal(
            "encoder.head_attention",
            "encoder",
            "[n]",
            "Attention of the probe of SigLIP's pooling head to a patch of one tower layer, mean over heads, pooled "
            "like the features.",
            pair=("siglip",),
        ),
        Signal(
            "encoder.head_vector",
            "encoder",
            "[F, C]",
            "What SigLIP's pooling head makes of each frame, from the output of one tower layer.",
            unit="view",
            pair=("siglip",),
        ),
        Signal(
            "prompt.question_embedding",
            "tokens",
            "[P]",
            "Question of the prompt in the space that tower and text tower share, cut to the context of the text "
            "tower; not normalised.",
            unit="prompt",
            pair=("clip", "siglip"),
        ),
        Signal(
            "prompt.question_segments",
            "tokens",
            "[M, P]",
            "The same of every segment of a question that may be longer than the context of the text tower.",
            unit="prompt",
            pair=("clip", "siglip"),
        ),
        Signal(
            "prompt.question_last_state",
            "tokens",
            "[P]",
            "Projected state of CLIP's text tower at the last position of the padded first line of the question.",
            unit="prompt",
            pair=("clip",),
        ),
        Signal(
            "prompt.similarity_scale",
            "tokens",
            "[]",
            "Inverse temperature that the pair of towers multiplies its cosines with.",
            unit="prompt",
            pair=("clip", "siglip"),
        ),
        Signal(
            "prompt.question_words",
            "tokens",
            "[T, D]",
            "Input embeddings of the LLM for the tokens of the question.",
            unit="prompt",
        ),
        Signal(
            "prompt.newline",
            "tokens",
            "[D]",
            "Input embedding of the LLM for a line break, [0] where its vocabulary has none.",
            unit="prompt",
        ),
        Signal(
            "encoder.groups",
            "encoder",
            "[n]",
            "Token of the shortened tower that a patch became part of, -1 for dropped ones, where a method acts "
            "inside the tower and every patch is a token of the LLM.",
        ),
        Signal(
            "tower.blocks",
            "encoder",
            "[B, H, T, d]",
            "Queries, keys and values of every tower block while it runs, for methods that shorten its sequence.",
        ),
        Signal(
            "tower.packed_blocks",
            "encoder",
            "[F, H, n, d]",
            "Queries, keys and values of every block, while it runs, of a tower that takes all pictures as one "
            "sequence.",
        ),
        Signal(
            "tower.class_token",
            "encoder",
            "[B, H, T, d]",
            "The same of a tower with a class token, whose attention and value the patches are compared with.",
        ),
        Signal(
            "decoder.last_query_attention",
            "decoder",
            "[n]",
            "Attention of the last prompt token to a visual token in the decoder layer before the cut, mean over "
            "heads; one row, recomputed from queries and keys.",
        ),
        Signal(
            "decoder.text_attention",
            "decoder",
            "[H, T, n]",
            "Attention of the text behind the visual tokens to them in the decoder layer before the cut, head by head.",
        ),
        Signal(
            "decoder.next_last_query_attention",
            "decoder",
            "[n]",
            "Attention of the last prompt token to a visual token as the layer behind the cut would compute it, mean "
            "over heads.",
        ),
        Signal(
            "decoder.next_text_attention",
            "decoder",
            "[T, n]",
            "Attention of the text behind the visual tokens to them as the layer behind the cut would compute it, mean "
            "over heads.",
        ),
        Signal(
            "decoder.transition",
            "decoder",
            "[n]",
            "How much attention and MLP of one layer between the last cut and this one rewrite a visual token, "
            "relative to the whole sequence.",
        ),
        Signal(
            "decoder.position_bias",
            "decoder",
            "[T, n]",
            "Attention logit between two vectors of ones at the positions of a text token behind the visual tokens and "
            "of a visual token, in the layer before the cut: what the rotary positions alone favour.",
        ),
        Signal(
            "decoder.visual_attention",
            "decoder",
            "[n]",
            "Attention of the last prompt token to the visual tokens alone (softmax over these) in the layer before "
            "the cut, mean over heads.",
        ),
        Signal(
            "decoder.value_likeness",
            "decoder",
            "[n]",
            "Softmax over the visual tokens of the scaled products of their values with that of the last prompt token, "
            "in the layer before the cut, mean over heads.",
        ),
        Signal(
            "decoder.value_length",
            "decoder",
            "[n]",
            "Sum of magnitudes of the value of a visual token, mean over heads first, in the layer before the cut.",
        ),
        Signal(
            "decoder.keys",
            "decoder",
            "[n + T, d]",
            "Rotated keys of the visual tokens and of the text behind them in the layer before the cut, heads joined; "
            "angles count from the first real token of the row, so that padding does not change them.",
        ),
        Signal(
            "decoder.normed_states",
            "decoder",
            "[n + T, D]",
            "States in front of the cut behind the final norm, of the visual tokens and of the text behind them.",
        ),
        Signal(
            "decoder.earlier_last_query_attention",
            "decoder",
            "[n]",
            "Attention of the last prompt token to a visual token two layers before the cut, mean over heads.",
        ),
        Signal(
            "decoder.attention_walk",
            "decoder",
            "[n]",
            "Where a random walk on the sharpened attention of the layer before the cut ends up, root mean square over "
            "heads; all rows are recomputed, one head at a time.",
        ),
        Signal(
            "decoder.attention_shares",
            "decoder",
            "[2]",
            "Part of the attention of the text behind the first visual token that goes to visual tokens, and of these "
            "that goes to that text, in the layer before the cut, mean over heads.",
        ),
        Signal(
            "decoder.states",
            "decoder",
            "[n + T, D]",
            "States at the cut of the visual tokens and of the text behind them; input embeddings in front of the "
            "first layer.",
        ),
        Signal(
            "decoder.text_states",
            "decoder",
            "[T, D]",
            "States at the cut of all text tokens of the row.",
        ),
        Signal(
            "decoder.hidden_states",
            "decoder",
            "[n, D]",
            "States of the visual tokens in front of the decoder layer at which the method cuts.",
        ),
        Signal("frames.count", "frames", "int", "Number of frames (temporal steps) of a video before encoding."),
    )
}


@dataclass(frozen=True)
class SignalRequest:
    """A signal; for tower signals its layer, an index or ``"feature"`` / ``"last"``; and its parameter, if any."""

    name: str
    layer: int | str | None = None
    parameter: float | None = None

    @classmethod
    def parse(cls, text: str) -> SignalRequest:
        """From ``name``, ``name@layer`` or ``name@layer:parameter``."""
        name, _, rest = text.partition("@")
        if not rest:
            return cls(name)
        layer, _, number = rest.partition(":")
        parameter = float(number) if number else None
        return cls(name, int(layer) if layer.lstrip("-").isdigit() else layer, parameter)

    def __str__(self) -> str:
        text = self.name if self.layer is None else f"{self.name}@{self.layer}"
        return text if self.parameter is None else f"{text}:{self.parameter!r}"


def unit_of(request: str, default: Unit = "patch") -> Unit:
    """What a signal has one entry for, by the text of its request."""
    signal = SIGNALS.get(SignalRequest.parse(request).name)
    return default if signal is None else signal.unit
