"""Processor of PPLLaVA: pixels, placeholders, and the question for the text tower."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import BatchFeature, ProcessorMixin

from tokensieve.errors import HostError
from tokensieve.models.ppllava.pooling import IMAGE_KERNEL, VIDEO_KERNEL
from tokensieve.models.ppllava.templates import question_of
from tokensieve.models.ppllava.views import image_tokens, tile_shape

__all__ = ["PPLlavaProcessor"]

_TEXT_OPTIONS = ("padding", "padding_side", "truncation", "max_length", "add_special_tokens", "pad_to_multiple_of")
_VIDEO_OPTIONS = ("do_sample_frames", "num_frames", "fps")
_UNUSED = ("return_mm_token_type_ids", "return_metadata")


class PPLlavaProcessor(ProcessorMixin):
    """Turns images, videos and prompts into the inputs of `PPLlavaForConditionalGeneration`.

    Parameters
    ----------
    image_processor : LlavaNextImageProcessor
        For single images, which are cut into views.
    tokenizer : PreTrainedTokenizerBase
        Of the language model; it must know both placeholders as single tokens.
    video_processor : BaseVideoProcessor
        Stretches frames to a square; also for the images of prompts with several.
    question_tokenizer : PreTrainedTokenizerBase
        Of the contrastive text tower.
    patch_size : int
        Pixels along one side of a patch.
    question_length : int
        Longest question in tokens: 248 for CLIP with extended context, 196 for SigLIP.
    video_kernel, image_kernel : sequence of int
        Windows (frames, rows, columns), as in the configuration of the model.
    image_token, video_token : str
        Placeholders in prompts, one per image or video.
    chat_template : str, optional
        Jinja source.
    """

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        video_processor: Any = None,
        question_tokenizer: Any = None,
        patch_size: int = 14,
        question_length: int = 248,
        video_kernel: Sequence[int] = VIDEO_KERNEL,
        image_kernel: Sequence[int] = IMAGE_KERNEL,
        image_token: str = "<image>",
        video_token: str = "<video>",
        chat_template: str | None = None,
        **kwargs: Any,
    ) -> None:
        self.patch_size = patch_size
        self.question_length = question_length
        self.video_kernel, self.image_kernel = list(video_kernel), list(image_kernel)
        self.image_token, self.video_token = image_token, video_token
        self.image_token_id = tokenizer.convert_tokens_to_ids(image_token)
        self.video_token_id = tokenizer.convert_tokens_to_ids(video_token)
        super().__init__(image_processor, tokenizer, video_processor, question_tokenizer, chat_template=chat_template)

    @property
    def model_input_names(self) -> list[str]:
        """Names that a call can return."""
        return [
            "input_ids",
            "attention_mask",
            "question_ids",
            "question_mask",
            "pixel_values",
            "image_sizes",
            "batch_num_images",
            "image_index",
            "pixel_values_videos",
            "video_frames",
            "batch_num_videos",
            "video_index",
        ]

    def __call__(
        self,
        images: Any = None,
        text: str | Sequence[str] | None = None,
        videos: Any = None,
        audio: Any = None,
        *,
        questions: str | Sequence[str] | None = None,
        return_tensors: str | None = "pt",
        video_metadata: Any = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """Prepare a batch of prompts.

        Parameters
        ----------
        images : image, list, or list of lists
            In the order of the placeholders of all prompts. A prompt with one image gets all views of it, one with
            several gets one square view each.
        text : str or sequence of str
            Prompts, with one placeholder per image or video.
        videos : video, list, or list of lists
            Clips of frames ``[T, H, W, 3]`` (or what the video processor takes), in the order of the placeholders.
            The same object given for several prompts is encoded once, and so is a single clip or image that every
            prompt shows once.
        audio : None
            There is none.
        questions : str or sequence of str, optional
            What the text tower reads, one per prompt. By default the last user turn of each prompt, as the chat
            template marks it.
        return_tensors : str
            Only ``"pt"``.
        video_metadata : list, optional
            For a video processor that samples frames.
        **kwargs
            Options of the tokenizer (``padding``, ``padding_side``, ``truncation``, ``max_length``) and of the video
            processor (``do_sample_frames``, ``num_frames``, ``fps``).

        Returns
        -------
        BatchFeature
            Everything that the model takes; all of it has to be passed on.

        Raises
        ------
        HostError
            If prompts, placeholders, images, videos and questions do not go together.
        """
        if text is None or audio is not None or return_tensors != "pt":
            raise HostError("PPLLaVA takes text with images or videos, without audio, as tensors ('pt').")
        options = _flatten(kwargs)
        prompts = [text] if isinstance(text, str) else list(text)
        asked = [questions] if isinstance(questions, str) else questions
        if asked is not None and len(asked) != len(prompts):
            raise HostError(f"There are {len(asked)} questions for {len(prompts)} prompts; give one per prompt.")
        if asked is None:
            asked = [question_of(self, prompt, (self.image_token, self.video_token)) for prompt in prompts]
        written, data = self.expand(prompts, images, videos, video_metadata, options)
        chosen = {key: options[key] for key in _TEXT_OPTIONS if key in options}
        tokens = self.tokenizer(written, return_tensors="pt", **{"padding": len(written) > 1, **chosen})
        data |= self.read_questions(list(asked))
        return BatchFeature({"input_ids": tokens["input_ids"], "attention_mask": tokens["attention_mask"], **data})

    # -- text ------------------------------------------------------------------------------------------------

    def expand(
        self,
        prompts: Sequence[str],
        images: Any = None,
        videos: Any = None,
        video_metadata: Any = None,
        options: Mapping[str, Any] | None = None,
    ) -> tuple[list[str], dict[str, Tensor]]:
        """Process what prompts show and write one placeholder per visual token.

        Parameters
        ----------
        prompts : sequence of str
            With one placeholder per image or video.
        images, videos, video_metadata
            As for a call.
        options : mapping, optional
            Of the video processor.

        Returns
        -------
        prompts : list of str
            Ready to tokenise.
        data : dict
            Visual inputs of the model.
        """
        replacements: dict[str, list[str]] = {self.image_token: [], self.video_token: []}
        data: dict[str, Tensor] = {}
        counts = self._counts(prompts, self.image_token)
        shown = _match(_leaves(images), counts, "image")
        if shown is not None:
            data |= self._images(shown, counts, replacements[self.image_token])
        counts = self._counts(prompts, self.video_token)
        shown = _match(_clips(videos), counts, "video")
        if shown is not None:
            data |= self._videos(shown, counts, replacements[self.video_token], video_metadata, options or {})
        return [self._expand(prompt, replacements) for prompt in prompts], data

    def read_questions(self, questions: list[str]) -> dict[str, Tensor]:
        """Questions tokenised for the text tower: ``question_ids`` and ``question_mask``, ``[B, question_length]``."""
        tokens = self.question_tokenizer(
            questions,
            padding="max_length",
            truncation=True,
            max_length=self.question_length,
            return_attention_mask=True,
            return_tensors="pt",
        )
        return {"question_ids": tokens["input_ids"], "question_mask": tokens["attention_mask"]}

    @staticmethod
    def _counts(prompts: Sequence[str], placeholder: str) -> list[int]:
        return [prompt.count(placeholder) for prompt in prompts]

    def _expand(self, prompt: str, replacements: Mapping[str, list[str]]) -> str:
        """Write as many placeholders as there are visual tokens; uses up ``replacements`` from the front."""
        for placeholder, waiting in replacements.items():
            first, *rest = prompt.split(placeholder)
            # The written placeholders hold the searched one, so they are joined and not searched again.
            prompt = first + "".join(waiting.pop(0) + part for part in rest)
        return prompt

    # -- pixels ----------------------------------------------------------------------------------------------

    @property
    def side(self) -> int:
        """Pixels along one side of a view or frame."""
        size = self.video_processor.size
        return int(size["height"])

    @property
    def grid(self) -> int:
        """Patches along one side."""
        return self.side // self.patch_size

    def pooled(self, frames: int, kernel: Sequence[int]) -> tuple[int, int, int]:
        """Frames, rows and columns of tokens that ``frames`` become."""
        time = min(int(kernel[0]), frames)
        rows, columns = (1 + (self.grid - size) // size for size in kernel[1:])
        return 1 + (frames - time) // time, rows, columns

    def _images(self, images: list[Any], counts: list[int], replacements: list[str]) -> dict[str, Tensor]:
        """Pixels of images; one that all prompts show alone is processed once."""
        several = [count > 1 for count in counts for _ in range(count)]
        entries, index = _unique(images, several)
        pixels, sizes = [], []
        for entry in entries:
            image, alone = images[entry], not several[entry]
            frame = _as_array(image)
            sizes.append(frame.shape[:2])
            if alone and self.image_processor.image_grid_pinpoints:
                pixels.append(self.image_processor(image, return_tensors="pt")["pixel_values"][0])
            else:
                pixels.append(self._frames([frame])[0])
        _, rows, columns = self.pooled(1, self.image_kernel)
        pinpoints = self.image_processor.image_grid_pinpoints
        for place, number in enumerate(index):
            tokens = rows * columns
            if not several[place]:
                tiles = tile_shape(sizes[number], pinpoints, self.side)
                tokens = image_tokens(sizes[number], tiles, (rows, columns))
            replacements.append(self.image_token * tokens)
        data = {
            "pixel_values": _stack(pixels),
            "image_sizes": torch.tensor(sizes),
            "batch_num_images": torch.tensor(counts),
        }
        return data if len(entries) == len(index) else data | {"image_index": torch.tensor(index)}

    def _videos(
        self,
        videos: list[Any],
        counts: list[int],
        replacements: list[str],
        metadata: Any,
        options: Mapping[str, Any],
    ) -> dict[str, Tensor]:
        """Pixels of clips, each distinct one once."""
        entries, index = _unique(videos, [False] * len(videos))
        chosen = {key: options[key] for key in _VIDEO_OPTIONS if key in options}
        if metadata is not None and chosen.get("do_sample_frames"):
            chosen["video_metadata"] = [metadata[entry] for entry in entries]
        pixels = self._frames([videos[entry] for entry in entries], **chosen)
        frames = [clip.shape[0] for clip in pixels]
        for number in index:
            time, rows, columns = self.pooled(frames[number], self.video_kernel)
            replacements.append(self.video_token * (time * rows * columns))
        data = {"pixel_values_videos": _stack(pixels), "batch_num_videos": torch.tensor(counts)}
        if len(set(frames)) > 1:
            data["video_frames"] = torch.tensor(frames)
        return data if len(entries) == len(index) else data | {"video_index": torch.tensor(index)}

    def _frames(self, clips: Sequence[Any], **options: Any) -> list[Tensor]:
        """Square, normalised frames ``[T, 3, S, S]`` of every clip."""
        metadata = options.pop("video_metadata", None)
        found = []
        for number, clip in enumerate(clips):
            extra = {} if metadata is None else {"video_metadata": [metadata[number]]}
            output = self.video_processor(
                [clip], return_tensors="pt", **{"do_sample_frames": False, **options}, **extra
            )
            found.append(output["pixel_values_videos"][0])
        return found


def _flatten(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Options from the grouped and the plain notation of transformers."""
    options: dict[str, Any] = {}
    for key, value in kwargs.items():
        if key in ("text_kwargs", "images_kwargs", "videos_kwargs", "common_kwargs"):
            options |= value or {}
        elif key not in _UNUSED:
            options[key] = value
    unknown = sorted(set(options) - {*_TEXT_OPTIONS, *_VIDEO_OPTIONS, "return_tensors", *_UNUSED})
    if unknown:
        raise HostError(
            f"The processor of PPLLaVA has no option {unknown[0]!r}; see its documentation for those it has."
        )
    return options


def _leaves(images: Any) -> list[Any] | None:
    """Images of a nested list, in order."""
    if images is None:
        return None
    if isinstance(images, list | tuple):
        return [leaf for item in images for leaf in _leaves(item) or []]
    return [images]


def _clips(videos: Any) -> list[Any] | None:
    """Clips of a nested list, in order; a list of pictures is one clip."""
    if videos is None:
        return None
    if not isinstance(videos, list | tuple):
        return [videos]
    if videos and all(_is_picture(item) for item in videos):
        return [np.stack([_as_array(item) for item in videos])]
    return [clip for item in videos for clip in _clips(item) or []]


def _is_picture(item: Any) -> bool:
    return not isinstance(item, list | tuple | str) and getattr(item, "ndim", 3) == 3 and not isinstance(item, dict)


def _match(visuals: list[Any] | None, counts: list[int], kind: str) -> list[Any] | None:
    """Visuals in the order of the placeholders; a single one that every prompt shows once serves them all."""
    given = [] if visuals is None else visuals
    if len(given) == 1 and len(counts) > 1 and all(count == 1 for count in counts):
        given = given * len(counts)
    if len(given) != sum(counts):
        raise HostError(
            f"The prompts hold {sum(counts)} {kind} placeholders for {len(given)} {kind}s; make them equal."
        )
    return given or None


def _unique(visuals: Sequence[Any], marks: Sequence[bool]) -> tuple[list[int], list[int]]:
    """First places of distinct objects, and which of them every place shows; different marks are distinct."""
    seen: dict[tuple[int, bool], int] = {}
    entries: list[int] = []
    index: list[int] = []
    for place, (visual, mark) in enumerate(zip(visuals, marks, strict=True)):
        number = seen.setdefault((id(visual), mark), len(entries))
        if number == len(entries):
            entries.append(place)
        index.append(number)
    return entries, index


def _as_array(image: Any) -> np.ndarray:
    """A picture as ``[H, W, 3]``, 8 bits."""
    if hasattr(image, "convert"):
        image = image.convert("RGB")
    array = np.asarray(image)
    if array.ndim == 3 and array.shape[0] == 3 and array.shape[2] != 3:
        array = array.transpose(1, 2, 0)
    if array.ndim != 3 or array.shape[2] != 3:
        raise HostError(f"An image has the shape {list(array.shape)}; give pictures with three colours.")
    return array


def _stack(parts: Sequence[Tensor]) -> Tensor:
    """Parts ``[n, 3, S, S]`` with zeros behind the shorter ones, ``[items, longest, 3, S, S]``."""
    return torch.nn.utils.rnn.pad_sequence(list(parts), batch_first=True)
