"""Tokenizers of the tiny checkpoints: the real classes over a small vocabulary trained on the spot."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import lru_cache

from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import LlamaTokenizer, PreTrainedTokenizerBase, Qwen2Tokenizer

__all__ = ["CORPUS", "llama_tokenizer", "qwen_tokenizer"]

VOCABULARY_SIZE = 800
"""Entries before the special tokens of a family; large enough that common words are one token."""

CORPUS = """
A red ball rolls across the wooden floor and stops beside a green box. A child picks up the ball and throws it
to a brown dog. The dog runs after the ball, catches it near the fence, and brings it back. The child laughs
and throws the ball again. What happens in the video? The dog brings the ball back to the child. How many
people are in the video? There are two people in the video. What colour is the ball? The ball is red. Where is
the box? The box is on the left, next to the door. Does the dog run before or after the child throws the ball?
It runs after the throw.

In the kitchen a woman cuts three carrots with a small knife, then puts them into a pot of hot water. She
stirs the soup slowly, tastes it with a spoon, and adds some salt. While the soup cooks she reads a book at
the table. At the end of the clip she pours the soup into two white bowls. Which object does the woman use
first? She uses the knife first. What does she do while the soup cooks? She reads a book. Why does she add
salt? Because the soup has no taste yet.

The camera moves slowly over a city street in the evening. Cars wait at the traffic light, a yellow bus turns
to the right, and a man with a black umbrella crosses the road. It starts to rain. The lights of the shops
shine on the wet ground. A bicycle passes in front of the bus. Describe the scene in detail. The scene shows a
busy street at night, with cars, a bus, and people walking in the rain. What is the weather like? It is
raining. How does the man move? He walks quickly from one side of the street to the other.

A blue square moves from the top to the bottom of the frame. At the same time a white circle grows, becomes
larger, and disappears at the edge. The background does not change. Then the square turns around and goes up
again. Describe the motion of the square. The square moves down first and then moves up. Which shape
disappears? The circle disappears. What is shown in this image? The image shows a square and a circle on a
grey background. Is the square larger than the circle? No, the square is smaller than the circle. Please
answer with one word. Yes. No. Left. Right. Up. Down.

Two players stand on a green field. The first player kicks the ball high into the air, the second player jumps
and hits it with the head. The ball flies into the net and the people around the field stand up and cheer.
When does the ball enter the net? The ball enters the net near the end, after about eight seconds. Who kicks
the ball? The first player kicks the ball. Choose the best answer from the options below: (A) a cat, (B) a
dog, (C) a bird, (D) a horse. Answer with the letter of the option only. The answer is B. Time 0.0s, Time
1.0s, Time 2.5s. Frame1: Frame2: Frame3: USER: ASSISTANT: You are a helpful assistant. user assistant system 0
1 2 3 4 5 6 7 8 9 10 20 30 seconds
""".strip()
"""Text the vocabulary is trained on; written for this purpose."""

_LLAMA_CONTROL = ("<unk>", "<s>", "</s>")


def _train(pre_tokenizer: pre_tokenizers.PreTokenizer, fixed: Sequence[str], alphabet: Sequence[str]) -> dict:
    """Train byte-pair merges on the corpus and return the serialised model (``vocab`` and ``merges``)."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        special_tokens=list(fixed),
        initial_alphabet=list(alphabet),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS.split("\n"), trainer)
    model: dict = json.loads(tokenizer.to_str())["model"]
    model["merges"] = [tuple(pair) for pair in model["merges"]]
    return model


@lru_cache(maxsize=1)
def _qwen_model() -> dict:
    return _train(pre_tokenizers.ByteLevel(add_prefix_space=False), (), sorted(pre_tokenizers.ByteLevel.alphabet()))


@lru_cache(maxsize=1)
def _llama_model() -> dict:
    byte_tokens = tuple(f"<0x{value:02X}>" for value in range(256))
    return _train(pre_tokenizers.Metaspace(), _LLAMA_CONTROL + byte_tokens, ())


def _extended(vocabulary: Mapping[str, int], special: Sequence[str]) -> dict[str, int]:
    """Append special tokens in the order given, so that their ids follow the family's own order."""
    extended = dict(vocabulary)
    for token in special:
        extended.setdefault(token, len(extended))
    return extended


def qwen_tokenizer(
    special: Sequence[str],
    *,
    eos_token: str = "<|im_end|>",
    named: Mapping[str, str] | None = None,
) -> PreTrainedTokenizerBase:
    """Byte-level tokenizer of the Qwen2 class.

    Parameters
    ----------
    special : sequence of str
        Tokens that are never split, in the order of their ids; they follow the trained vocabulary.
    eos_token : str
        Token that ends an answer; ``<|endoftext|>`` is always the padding token.
    named : mapping of str to str, optional
        Tokens that become attributes of the tokenizer, for processors that look them up by name
        (``{"image_token": "<image>"}`` gives `tokenizer.image_token`).

    Returns
    -------
    PreTrainedTokenizerBase
        A `Qwen2Tokenizer` of about 800 entries plus the special tokens.
    """
    model = _qwen_model()
    special = ["<|endoftext|>", *special]
    tokenizer = Qwen2Tokenizer(
        vocab=_extended(model["vocab"], special),
        merges=model["merges"],
        unk_token="<|endoftext|>",
        eos_token=eos_token,
        pad_token="<|endoftext|>",
        extra_special_tokens=dict(named) if named else None,
    )
    tokenizer.add_special_tokens({"extra_special_tokens": list(special)})
    return tokenizer


def llama_tokenizer(special: Sequence[str], *, named: Mapping[str, str] | None = None) -> PreTrainedTokenizerBase:
    """SentencePiece-like tokenizer of the Llama class with byte fallback; it puts ``<s>`` before every text.

    Parameters
    ----------
    special : sequence of str
        Tokens that are never split, in the order of their ids; must contain ``<pad>``.
    named : mapping of str to str, optional
        Tokens that become attributes of the tokenizer.

    Returns
    -------
    PreTrainedTokenizerBase
        A `LlamaTokenizer` of about 800 entries plus the special tokens.
    """
    model = _llama_model()
    tokenizer = LlamaTokenizer(
        vocab=_extended(model["vocab"], special),
        merges=model["merges"],
        pad_token="<pad>",
        add_bos_token=True,
        extra_special_tokens=dict(named) if named else None,
    )
    tokenizer.add_special_tokens({"extra_special_tokens": list(special)})
    return tokenizer
