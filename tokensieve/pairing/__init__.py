"""The text tower that belongs to a host's vision tower, and the question that a prompt asks.

Most video LLMs took their vision tower out of a contrastive pair (CLIP, SigLIP) and left its text half behind. This
package finds the pair again, so that methods can compare patches with the words of the question.

    pair = pairing.resolve_pair(model.base_model.vision_tower)        # or text_tower="folder or hub name"
    question = pairing.find_question(tokenizer, ids[0], visual_ids={model.config.image_token_id})
    scores = pair.align(states) @ pair.embed_question(question.text)

Inside of a compressed run methods ask for the same by signals: ``encoder.aligned@feature`` and
``prompt.question_embedding`` (see `tokensieve.core.signals`).
"""

from tokensieve.pairing.geometry import PairSource, VisionGeometry, find_source, list_sources, register_source
from tokensieve.pairing.loading import load_pair, resolve_pair
from tokensieve.pairing.pair import Agreement, ClipPair, SiglipPair, TextPair
from tokensieve.pairing.question import Question, find_question, find_tokenizer

__all__ = [
    "Agreement",
    "ClipPair",
    "PairSource",
    "Question",
    "SiglipPair",
    "TextPair",
    "VisionGeometry",
    "find_question",
    "find_source",
    "find_tokenizer",
    "list_sources",
    "load_pair",
    "register_source",
    "resolve_pair",
]
