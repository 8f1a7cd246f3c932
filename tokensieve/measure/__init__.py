"""FLOPs, memory and the report of a run."""

from tokensieve.measure.flops import (
    DecoderGeometry,
    Work,
    convention_flops,
    decoder_work,
    layer_tokens,
)
from tokensieve.measure.memory import PeakMemory
from tokensieve.measure.vision import encoder_work, tower_grids, tower_work

__all__ = [
    "DecoderGeometry",
    "PeakMemory",
    "Work",
    "convention_flops",
    "decoder_work",
    "encoder_work",
    "layer_tokens",
    "tower_grids",
    "tower_work",
]
