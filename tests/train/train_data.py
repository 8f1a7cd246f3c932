"""What the annotated data of these tests says."""

from __future__ import annotations

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (30, 40, 220), "white": (240, 240, 240)}
QUESTION = "What colour is the ball?"


def turns(question: str, answer: str) -> list[dict[str, str]]:
    """A conversation as LLaVA writes it."""
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
