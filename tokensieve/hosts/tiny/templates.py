"""Chat templates of the families: role markers and placeholders, in as few lines as the format needs."""

from __future__ import annotations

__all__ = ["MISTRAL", "VICUNA", "chatml"]

_TEXT = """
{%- macro text_of(message) -%}
{%- if message.content is string -%}{{ message.content }}
{%- else -%}
{%- for part in message.content if part.type == 'text' -%}{{ part.text }}{%- endfor -%}
{%- endif -%}
{%- endmacro -%}
{%- macro visuals_of(message, newline) -%}
{%- if message.content is not string -%}
{%- for kind in ('image', 'video') -%}
{%- for part in message.content if part.type == kind -%}{{ '<' + kind + '>' + newline }}{%- endfor -%}
{%- endfor -%}
{%- endif -%}
{%- endmacro -%}
"""
"""Macros of the formats that write all images, then all videos, then the text."""

VICUNA = (
    _TEXT
    + """
{%- for message in messages -%}
{%- if message.role == 'system' -%}{{ text_of(message) + ' ' }}
{%- elif message.role == 'user' -%}{{ 'USER: ' + visuals_of(message, '\\n') + text_of(message) + ' ' }}
{%- else -%}{{ 'ASSISTANT: ' + text_of(message) + eos_token }}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ 'ASSISTANT:' }}{%- endif -%}
"""
)
"""``USER: <image>\\n... ASSISTANT:``, of LLaVA-1.5 and LLaVA-NeXT-Video."""

MISTRAL = (
    _TEXT
    + """
{%- for message in messages -%}
{%- if message.role == 'system' -%}{{ '<<SYS>>\\n' + text_of(message) + '\\n<</SYS>>\\n\\n' }}
{%- elif message.role == 'user' -%}
{{ '[INST] ' + visuals_of(message, '\\n') + text_of(message) + ' [/INST]' }}
{%- else -%}{{ ' ' + text_of(message) + eos_token }}{%- endif -%}
{%- endfor -%}
"""
)
"""``[INST] <image>\\n... [/INST]``, of LLaVA-NeXT with a Mistral language model."""

_CHATML_ONEVISION = (
    _TEXT
    + """
{%- for message in messages -%}
{{ '<|im_start|>' + message.role + ' ' + visuals_of(message, '') + '\\n' + text_of(message) + '<|im_end|>' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}
"""
)

_CHATML_IN_ORDER = """
{%- if system_prompt and messages[0].role != 'system' -%}
{{ '<|im_start|>system\\n' + system_prompt + '<|im_end|>\\n' }}
{%- endif -%}
{%- for message in messages -%}
{{ '<|im_start|>' + message.role + '\\n' }}
{%- if message.content is string -%}{{ message.content }}
{%- else -%}
{%- for part in message.content -%}
{%- if part.type == 'image' -%}{{ image_placeholder }}
{%- elif part.type == 'video' -%}{{ video_placeholder }}
{%- elif part.type == 'text' -%}{{ part.text }}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{ '<|im_end|>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}
"""


def chatml(image: str = "", video: str = "", *, system: str = "", in_order: bool = True) -> str:
    """ChatML template (``<|im_start|>role ... <|im_end|>``).

    Parameters
    ----------
    image, video : str
        What one image or one video is written as; used with `in_order`.
    system : str
        System prompt that is written where the conversation brings none; used with `in_order`.
    in_order : bool
        Write the parts of a message in their own order (Qwen-VL, InternVL). Otherwise the LLaVA-OneVision
        variant: all images, all videos, then a line break and the text.

    Returns
    -------
    str
        Jinja source.
    """
    if not in_order:
        return _CHATML_ONEVISION
    settings = {"image_placeholder": image, "video_placeholder": video, "system_prompt": system}
    head = "".join(f"{{%- set {name} = {value!r} -%}}\n" for name, value in settings.items())
    return head + _CHATML_IN_ORDER
