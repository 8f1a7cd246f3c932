"""Conversations with clips in them, one or several at a time, as model inputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from tokensieve.errors import HostError
from tokensieve.prompt import Prompt, _parts, _video_arguments
from tokensieve.video.clip import Clip

__all__ = ["Rendered", "Role", "Turn", "build_chats", "render_chat", "shape_of"]

Role = Literal["system", "user", "assistant"]


@dataclass(frozen=True)
class Turn:
    """One message of a conversation.

    Attributes
    ----------
    role : {"system", "user", "assistant"}
        Who speaks.
    parts : tuple of str or Clip
        Text and clips in the order in which the model is to see them.
    """

    role: Role
    parts: tuple[str | Clip, ...]


def shape_of(chat: Sequence[Turn]) -> tuple[tuple[bool, int], ...]:
    """What decides which conversations can share a batch: (still image?, frames) of every clip, in order."""
    clips = [part for turn in chat for part in turn.parts if isinstance(part, Clip)]
    return tuple((clip.info.is_image, len(clip)) for clip in clips)


def build_chats(processor: Any, chats: Sequence[Sequence[Turn]], *, whole_frames: bool = False) -> Prompt:
    """Prepare conversations for generation; every conversation becomes one row, padded on the left.

    Clips go in where they stand in their message, with their true times. A still image goes in as an image; a
    family without video input gets every frame as an image of its own.

    Parameters
    ----------
    processor : ProcessorMixin
        The processor of the model's checkpoint.
    chats : sequence of sequences of Turn
        One or more conversations. Those of one batch need the same `shape_of`.
    whole_frames : bool
        As in `tokensieve.prompt.build_prompt`.

    Returns
    -------
    Prompt

    Raises
    ------
    HostError
        If there is nothing to answer, the processor has no chat template, or it cannot take the input.
    """
    if len({shape_of(chat) for chat in chats}) > 1:
        raise HostError("Conversations of one batch must show the same kinds of clips of the same lengths; split it.")
    rendered = [render_chat(processor, chat) for chat in chats]
    if not rendered:
        raise HostError("There is no message to answer; send at least one.")
    texts = [one.text for one in rendered]
    videos = [part for one in rendered for part in one.visuals if part["type"] == "video"]
    images = [[part["image"] for part in one.visuals if part["type"] == "image"] for one in rendered]
    arguments: dict[str, Any] = {"images": images} if any(images) else {}
    if videos:
        arguments |= _video_arguments(videos, 1, processor, whole_frames)
    try:
        inputs = processor(text=texts, return_tensors="pt", padding=len(texts) > 1, padding_side="left", **arguments)
    except (ValueError, RuntimeError, TypeError, IndexError, KeyError) as error:
        raise HostError(
            f"The processor {type(processor).__name__} cannot take this input ({' '.join(str(error).split())})."
        ) from error
    notes = list(dict.fromkeys(note for one in rendered for note in one.notes))
    return Prompt(dict(inputs), bool(videos), notes)


@dataclass(frozen=True)
class Rendered:
    """A conversation as the text that the model reads, and what it shows.

    Attributes
    ----------
    text : str
        With a placeholder for every visual.
    visuals : list of dict
        ``{"type": "video", "clip": Clip}`` and ``{"type": "image", "image": PIL image}``, in the order of the text.
    notes : list of str
        What was done differently from what one might expect.
    """

    text: str
    visuals: list[dict[str, Any]]
    notes: list[str]


def render_chat(processor: Any, chat: Sequence[Turn]) -> Rendered:
    """Write a conversation with the model's own chat template.

    Parameters
    ----------
    processor : ProcessorMixin
        The processor of the model's checkpoint.
    chat : sequence of Turn
        The conversation.

    Returns
    -------
    Rendered

    Raises
    ------
    HostError
        If there is nothing to answer, or the processor has no chat template or one that refuses the messages.
    """
    if not chat:
        raise HostError("There is no message to answer; send at least one.")
    if getattr(processor, "chat_template", None) is None:
        raise HostError(
            f"This model's {type(processor).__name__} has no chat template; copy chat_template.jinja of the "
            "published checkpoint into its folder."
        )
    takes_video = getattr(processor, "video_processor", None) is not None
    notes: list[str] = []
    messages = [_Message(turn, takes_video, notes) for turn in chat]
    visuals = [part for message in messages for part in message.visuals]
    try:
        text = processor.apply_chat_template(
            [message.rendered for message in messages], add_generation_prompt=True, tokenize=False
        )
    except (ValueError, RuntimeError, TypeError, IndexError, KeyError) as error:
        raise HostError(
            f"The processor {type(processor).__name__} cannot take this input ({' '.join(str(error).split())})."
        ) from error
    except Exception as error:
        # Chat templates refuse orders of roles that they do not know by an error class of their own.
        if type(error).__name__ != "TemplateError":
            raise
        raise HostError(f"The model's chat template refuses these messages ({error}).") from error
    return Rendered(str(text), visuals, notes)


class _Message:
    """One turn as the chat template takes it, and the visuals that it shows."""

    def __init__(self, turn: Turn, takes_video: bool, notes: list[str]) -> None:
        self.visuals: list[dict[str, Any]] = []
        content: list[dict[str, Any]] = []
        for part in turn.parts:
            if isinstance(part, str):
                content.append({"type": "text", "text": part})
                continue
            shown = _parts(part, takes_video, notes)
            self.visuals += shown
            content += [{"type": one["type"]} for one in shown]
        self.rendered = {"role": turn.role, "content": content}
