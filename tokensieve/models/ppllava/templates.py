"""Chat templates of the published models, and how to find the question in a prompt that one of them has written."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

__all__ = ["CHATML", "VICUNA", "question_of"]

_PARTS = """
{%- macro written(message) -%}
{%- if message.content is string -%}{{ message.content }}
{%- else -%}
{%- for part in message.content if part.type != 'text' -%}
{{ '<image>' if part.type == 'image' else '<video>' }}{{ '\\n' if loop.last else '' }}
{%- endfor -%}
{%- for part in message.content if part.type == 'text' -%}{{ part.text }}{%- endfor -%}
{%- endif -%}
{%- endmacro -%}
"""

VICUNA = (
    _PARTS
    + """
{%- for message in messages -%}
{%- if message.role == 'system' -%}{{ written(message) + ' ' }}
{%- elif message.role == 'user' -%}{{ 'USER: ' + written(message) + ' ' }}
{%- else -%}{{ 'ASSISTANT: ' + written(message) + eos_token }}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ 'ASSISTANT: ' }}{%- endif -%}
"""
)
"""``USER: <image>\\n... ASSISTANT: ...</s>`` of the Vicuna models; the tokenizer writes the token in front."""

CHATML = (
    _PARTS
    + """
{%- for message in messages -%}
{{ '<|im_start|>' + message.role + '\\n' + written(message) + '<|im_end|>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}
"""
)
"""``<|im_start|>user\\n<image>\\n...<|im_end|>`` of the Qwen2 models."""

_MARKS = ("\u2063first\u2063", "\u2063answer\u2063", "\u2063second\u2063")
"""Texts that no prompt holds: they show where a template puts its turns."""


def question_of(processor: Any, text: str, placeholders: Sequence[str]) -> str:
    """The last question of a prompt: the text of its last user turn.

    Parameters
    ----------
    processor : ProcessorMixin
        Its chat template says how turns are written.
    text : str
        A prompt, visual placeholders not expanded yet. What follows the start of the answer does not count.
    placeholders : sequence of str
        Visual placeholders to leave out.

    Returns
    -------
    str
        The question. A text that the template has not written is taken whole, without its placeholders.
    """
    start, end = _markers(processor)
    begin = text.rfind(start) if start else -1
    if begin >= 0:
        text = text[begin + len(start) :]
        stop = text.find(end) if end else -1
        text = text if stop < 0 else text[:stop]
    for placeholder in placeholders:
        text = text.replace(placeholder, "")
    return text.strip()


def _markers(processor: Any) -> tuple[str, str]:
    """What stands in front of the text of a user turn, and behind it."""
    template = getattr(processor, "chat_template", None)
    if template is None:
        return "", ""
    known = vars(processor).get("_turn_markers")
    if known is not None and known[0] == template:
        return known[1], known[2]
    first, answer, second = _MARKS
    turns = [_turn("user", first), _turn("assistant", answer), _turn("user", second)]
    text = str(processor.apply_chat_template(turns, add_generation_prompt=True, tokenize=False))
    head, between = text.split(first)[0], text.split(answer)[-1].split(second)[0]
    same = 0
    while same < min(len(head), len(between)) and head[-1 - same] == between[-1 - same]:
        same += 1
    start, end = head[len(head) - same :] or between, text.split(second)[-1]
    vars(processor)["_turn_markers"] = (template, start, end)
    return start, end


def _turn(role: str, text: str) -> dict[str, Any]:
    return {"role": role, "content": [{"type": "text", "text": text}]}
