"""Conversations with clips in them, one or several at a time, as model inputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from tokensieve.errors import HostError
from tokensieve.prompt import Prompt, _parts, _video_arguments
from tokensieve.video.clip import Clip

__all__ = ["Role", "Turn", "build_chats", "shape_of"]

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
    if not chats or not all(chats):
        raise HostError("There is no message to answer; send at least one.")
    if len({shape_of(chat) for chat in chats}) > 1:
        raise HostError("Conversations of one batch must show the same kinds of clips of the same lengths; split it.")
    if getattr(processor, "chat_template", None) is None:
        raise HostError(
            f"This model's {type(processor).__name__} has no chat template; copy chat_template.jinja of the "
            "published checkpoint into its folder."
        )
    takes_video = getattr(processor, "video_processor", None) is not None
    notes: list[str] = []
    rows = [[_Message(turn, takes_video, notes) for turn in chat] for chat in chats]
    visuals = [[part for message in row for part in message.visuals] for row in rows]
    videos = [part for row in visuals for part in row if part["type"] == "video"]
    images = [[part["image"] for part in row if part["type"] == "image"] for row in visuals]
    arguments: dict[str, Any] = {"images": images} if any(images) else {}
    if videos:
        arguments |= _video_arguments(videos, 1, processor, whole_frames)
    try:
        texts = [
            str(processor.apply_chat_template([m.rendered for m in row], add_generation_prompt=True, tokenize=False))
            for row in rows
        ]
        inputs = processor(text=texts, return_tensors="pt", padding=len(texts) > 1, padding_side="left", **arguments)
    except (ValueError, RuntimeError, TypeError, IndexError, KeyError) as error:
        raise HostError(
            f"The processor {type(processor).__name__} cannot take this input ({' '.join(str(error).split())})."
        ) from error
    except Exception as error:
        # Chat templates refuse orders of roles that they do not know by an error class of their own.
        if type(error).__name__ != "TemplateError":
            raise
        raise HostError(f"The model's chat template refuses these messages ({error}).") from error
    return Prompt(dict(inputs), bool(videos), notes)


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
