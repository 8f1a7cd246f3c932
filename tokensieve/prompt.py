"""From clips and questions to model inputs, through the model's own processor and chat template.

Frames are handed over as they were read, with the true times of the clip, so that families that write times
into the prompt (Qwen3-VL, VideoLLaMA3) or into the positions (Qwen2.5-VL) get the right ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image

from tokensieve.errors import HostError
from tokensieve.video.clip import Clip

__all__ = ["Prompt", "build_prompt"]


@dataclass
class Prompt:
    """Model inputs and what a user should know about them.

    Attributes
    ----------
    inputs : dict
        Tensors on the CPU, as the model's ``forward`` and ``generate`` take them; one row per question.
    as_video : bool
        Whether the first clip went in as a video; False for images and families without video.
    notes : list of str
        What was done differently from what one might expect, one sentence each.
    """

    inputs: dict[str, Any]
    as_video: bool
    notes: list[str] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        """Number of tokens of the longest row, visual tokens included."""
        return int(self.inputs["input_ids"].shape[1])

    def on(self, model: Any) -> dict[str, Any]:
        """The inputs on the model's device, with pixels in the model's dtype."""
        moved = {}
        for name, value in self.inputs.items():
            if hasattr(value, "to"):
                # Only pixels change their type: times and grids must keep their precision.
                value = value.to(model.device)
                value = value.to(model.dtype) if name.startswith("pixel_values") else value
            moved[name] = value
        return moved


def build_prompt(
    processor: Any,
    clips: Clip | Sequence[Clip],
    questions: str | Sequence[str],
    *,
    whole_frames: bool = False,
    padding_side: str = "left",
) -> Prompt:
    """Prepare questions about one or several clips.

    Every question becomes one row of the batch and sees all clips, in their order, before its text. A still
    image goes in as an image. A family without video input gets every frame as an image of its own.

    Parameters
    ----------
    processor : ProcessorMixin
        The processor of the model's checkpoint.
    clips : Clip or sequence of Clip
        From `tokensieve.video.read_clip`.
    questions : str or sequence of str
        One or more questions.
    whole_frames : bool
        Ask the processor to pass all tokens of all frames on, where it would leave out those that hardly
        change (VideoLLaMA3); methods that compare frames patch by patch need this.
    padding_side : str
        Side on which shorter rows are padded; generation needs ``"left"``.

    Returns
    -------
    Prompt

    Raises
    ------
    HostError
        If the processor has no chat template or cannot take the clips.
    """
    shown = [clips] if isinstance(clips, Clip) else list(clips)
    asked = [questions] if isinstance(questions, str) else list(questions)
    if not shown or not asked:
        raise HostError(f"A prompt needs a clip and a question, not {len(shown)} clips and {len(asked)} questions.")
    if getattr(processor, "chat_template", None) is None:
        raise HostError(
            f"This model's {type(processor).__name__} has no chat template; copy chat_template.jinja of the "
            "published checkpoint into its folder."
        )
    takes_video = getattr(processor, "video_processor", None) is not None
    notes: list[str] = []
    parts: list[dict[str, Any]] = []
    for clip in shown:
        parts += _parts(clip, takes_video, notes)
    videos = [part for part in parts if part["type"] == "video"]
    images = [part["image"] for part in parts if part["type"] == "image"]
    arguments: dict[str, Any] = {}
    if images:
        arguments["images"] = [images for _ in asked]
    if videos:
        arguments |= _video_arguments(videos, len(asked), processor, whole_frames)
    texts = [_render(processor, parts, question) for question in asked]
    try:
        inputs = processor(
            text=texts,
            return_tensors="pt",
            padding=len(texts) > 1,
            padding_side=padding_side,
            **arguments,
        )
    except (ValueError, RuntimeError, TypeError, IndexError) as error:
        raise HostError(
            f"The processor {type(processor).__name__} cannot take this input ({' '.join(str(error).split())})."
        ) from error
    return Prompt(dict(inputs), parts[0]["type"] == "video", notes)


def _parts(clip: Clip, takes_video: bool, notes: list[str]) -> list[dict[str, Any]]:
    """Parts of a chat message that show one clip."""
    if takes_video and not clip.info.is_image:
        return [{"type": "video", "clip": clip}]
    if not clip.info.is_image:
        note = f"This model takes no video; the {len(clip)} frames go in as single images."
        notes += [note] if note not in notes else []
    return [{"type": "image", "image": Image.fromarray(frame)} for frame in clip.frames]


def _video_arguments(videos: Sequence[dict[str, Any]], rows: int, processor: Any, whole_frames: bool) -> dict[str, Any]:
    """Frames and their times for every video of every row."""
    step = getattr(processor.video_processor, "temporal_patch_size", None) or 1
    frames, times = [], []
    for _ in range(rows):
        for part in videos:
            clip: Clip = part["clip"]
            metadata, missing = clip.video_metadata(), step - len(clip)
            pictures = clip.frames
            if missing > 0:
                # One temporal step covers several frames, and some processors refuse a clip of fewer.
                pictures = np.concatenate((pictures, np.repeat(pictures[-1:], missing, axis=0)))
                metadata.frames_indices = list(metadata.frames_indices) + metadata.frames_indices[-1:] * missing
            frames.append(pictures)
            times.append(metadata)
    arguments: dict[str, Any] = {"videos": frames, "video_metadata": times, "do_sample_frames": False}
    if whole_frames and hasattr(processor.video_processor, "use_token_compression"):
        arguments["use_token_compression"] = False
    return arguments


def _render(processor: Any, parts: Sequence[dict[str, Any]], question: str) -> str:
    """Text of one row, with a placeholder for every visual."""
    content = [{"type": part["type"]} for part in parts] + [{"type": "text", "text": question}]
    text = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
    )
    return str(text)
