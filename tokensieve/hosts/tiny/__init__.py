"""Small random-weight checkpoints of ten model families, for tests and for the demonstration.

A tiny checkpoint has the real classes, configuration, processor, tokenizer and chat template of its family
and loads like a model from the hub; only its sizes are small and its weights random, so that a prompt of a
few frames takes some 20 milliseconds on one processor core.

    from tokensieve.hosts import tiny

    model, processor = tiny.load("qwen2_5_vl")
    inputs = tiny.example_inputs("qwen2_5_vl", processor, videos=2, batch=3)
    answers = model.generate(**inputs, max_new_tokens=4)
"""

from tokensieve.hosts.tiny.examples import example_inputs, example_messages, synthetic_clip, synthetic_image
from tokensieve.hosts.tiny.families import FAMILIES, TinyFamily, family_of
from tokensieve.hosts.tiny.pairs import pair_of
from tokensieve.hosts.tiny.store import build, build_in_memory, cached, load

__all__ = [
    "FAMILIES",
    "TinyFamily",
    "build",
    "build_in_memory",
    "cached",
    "example_inputs",
    "example_messages",
    "family_of",
    "load",
    "pair_of",
    "synthetic_clip",
    "synthetic_image",
]
