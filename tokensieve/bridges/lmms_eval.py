"""Any supported model with any method, as a model of lmms-eval.

    lmms-eval --model tokensieve --model_args pretrained=Qwen/Qwen2.5-VL-7B-Instruct,method=vidcom2,retention=0.25 \
        --tasks mvbench --batch_size 4
"""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms
from lmms_eval.models.model_utils.gen_metrics import log_metrics
from lmms_eval.protocol import ChatMessages
from PIL import Image
from tqdm import tqdm

from tokensieve.bridges.chat import Turn, build_chats, shape_of
from tokensieve.bridges.generation import Answer, Sampling, answer_rows
from tokensieve.core.registry import resolve
from tokensieve.core.runtime import Run
from tokensieve.errors import HostError, TokensieveError
from tokensieve.hosts.registry import host_for
from tokensieve.load import load_model
from tokensieve.video import Clip, ClipInfo, read_clip
from tokensieve.video.convert import on_white

__all__ = ["TokensieveModel"]

_DEFAULT_NEW_TOKENS = 128


class TokensieveModel(lmms):
    """A video or image LLM whose visual tokens a method compresses.

    Parameters
    ----------
    pretrained : str
        Folder of a checkpoint or a name on the Hugging Face hub.
    method : str
        Compression method in the one-line notation.
    retention : float
        Share of the visual tokens to keep.
    batch_size : int
        Most prompts per call; those whose clips have other numbers of frames go in calls of their own.
    device : str, optional
        Device; with several processes each takes its own GPU.
    dtype, attn : str
        Type of the weights, and attention kernel.
    max_frames_num : int
        Frames taken of a video.
    fps : float, optional
        Frames per second instead, at most ``max_frames_num``.
    max_pixels : int, optional
        Scale frames down to so many pixels while decoding.
    system_prompt : str, optional
        First message of every prompt, or a file that holds it.
    max_batch_size : int, optional
        Handed over by lmms-eval; without a use here.
    **options
        Options of the method.

    Raises
    ------
    TokensieveError
        If the model cannot be loaded, or the method does not fit it.
    """

    is_simple = False

    def __init__(
        self,
        pretrained: str,
        method: str = "vidcom2",
        retention: float = 0.25,
        batch_size: int | str = 1,
        device: str | None = None,
        dtype: str = "auto",
        attn: str | None = None,
        max_frames_num: int = 32,
        fps: float | None = None,
        max_pixels: int | None = None,
        system_prompt: str | None = None,
        max_batch_size: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        if not str(batch_size).isdecimal() or int(batch_size) < 1:
            raise HostError(f"batch_size must be a number above 0, not {batch_size!r}.")
        state = PartialState()
        if state.num_processes > 1:
            self._rank, self._world_size = state.process_index, state.num_processes
            device = str(state.device)
        self.batch_size = int(batch_size)
        self._methods = resolve(method, retention=float(retention), **options)
        self._model, self._processor = load_model(pretrained, dtype, device or "auto", attn)
        # What does not fit is said now, and not after the data have been fetched.
        Run(self._model, host_for(self._model), self._methods)
        self._whole_frames = any(one.uniform_views for one in self._methods)
        self._frames, self._fps, self._max_pixels = int(max_frames_num), fps, max_pixels
        self._system = self._resolve_system_prompt(system_prompt) if system_prompt else None
        self._answers: list[Answer] = []

    @property
    def model(self) -> Any:
        """The model itself."""
        return self._model

    @property
    def tokenizer(self) -> Any:
        """Its tokenizer."""
        return self._processor.tokenizer

    @property
    def device(self) -> torch.device:
        """Where it is."""
        return torch.device(self._model.device)

    def generate_until(self, requests: list[Instance]) -> list[GenerationResult]:
        """Answer all requests, in their order, and log achieved tokens and stage times.

        Raises
        ------
        TokensieveError
            For a clip that cannot be read or a prompt that does not fit: a score over fewer items would mislead.
        """
        results: list[GenerationResult | None] = [None] * len(requests)
        begun, first = time.perf_counter(), len(self._answers)
        bar = tqdm(total=len(requests), disable=self.rank != 0, desc="tokensieve")
        for places, sampling in self._chunks(requests):
            for group, chats in self._read(requests, places):
                for place, answer in zip(group, self._answer(chats, sampling), strict=True):
                    counts = TokenCounts(input_tokens=answer.tokens.prompt, output_tokens=answer.new_tokens)
                    results[place] = GenerationResult(answer.text, counts)
                    context, _, settings = requests[place].args[:3]
                    self.cache_hook.add_partial("generate_until", (context, settings), answer.text)
                    self._answers.append(answer)
                bar.update(len(group))
        bar.close()
        _log(self._answers[first:], time.perf_counter() - begun, self.rank)
        return [result for result in results if result is not None]

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Refused: compression is measured on answers."""
        raise HostError("tokensieve answers tasks that generate text; this one asks for log-likelihoods.")

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        """Refused: no video benchmark asks in rounds."""
        raise HostError("tokensieve answers tasks of one round; this one asks in several.")

    def _chunks(self, requests: Sequence[Instance]) -> Iterator[tuple[list[int], Sampling]]:
        """Places of requests that are generated alike, at most a batch of them."""
        alike: dict[Sampling, list[int]] = defaultdict(list)
        for place, request in enumerate(requests):
            alike[_sampling(request.args[2])].append(place)
        for sampling, places in alike.items():
            for start in range(0, len(places), self.batch_size):
                yield places[start : start + self.batch_size], sampling

    def _read(
        self, requests: Sequence[Instance], places: Sequence[int]
    ) -> Iterable[tuple[list[int], list[list[Turn]]]]:
        """Conversations with their clips decoded, grouped by what can share a batch."""
        groups: dict[Any, tuple[list[int], list[list[Turn]]]] = {}
        for place in places:
            _, to_messages, _, document, task, split = requests[place].args
            messages = to_messages(self.task_dict[task][split][document])
            chat = self._chat(ChatMessages(messages=messages))
            found = groups.setdefault(shape_of(chat), ([], []))
            found[0].append(place)
            found[1].append(chat)
        return groups.values()

    def _chat(self, messages: ChatMessages) -> list[Turn]:
        turns = [Turn("system", (self._system,))] if self._system else []
        for message in messages.messages:
            turns.append(Turn(message.role, tuple(self._part(content) for content in message.content)))
        return turns

    def _part(self, content: Any) -> str | Clip:
        """Text or clip of one content."""
        if content.type == "text":
            return str(content.text)
        if content.type == "image":
            return _picture(content.url) if isinstance(content.url, Image.Image) else read_clip(_source(content.url), 1)
        if content.type == "video":
            options = {"start": content.start_time, "end": content.end_time, "max_pixels": self._max_pixels}
            if self._fps is None:
                return read_clip(_source(content.url), self._frames, **options)
            source = _source(content.url)
            return read_clip(source, sampling="fps", fps=float(self._fps), max_frames=self._frames, **options)
        raise HostError(f"The task shows {content.type}, which no supported model takes; choose a video or image task.")

    def _answer(self, chats: Sequence[Sequence[Turn]], sampling: Sampling) -> list[Answer]:
        prompt = build_chats(self._processor, chats, whole_frames=self._whole_frames)
        return answer_rows(self._model, self.tokenizer, prompt.on(self._model), self._methods, sampling)


def _sampling(settings: dict[str, Any]) -> Sampling:
    """How a task wants its answers."""
    until = settings.get("until") or ()
    temperature = float(settings.get("temperature") or 0.0)
    return Sampling(
        max_new_tokens=int(settings.get("max_new_tokens") or _DEFAULT_NEW_TOKENS),
        temperature=temperature if settings.get("do_sample", temperature > 0) else 0.0,
        top_p=settings.get("top_p"),
        top_k=settings.get("top_k"),
        num_beams=int(settings.get("num_beams") or 1),
        stop=(until,) if isinstance(until, str) else tuple(until),
    )


def _source(url: Any) -> Any:
    """What `read_clip` takes."""
    if isinstance(url, (str, Path, bytes)):
        return url
    raise TokensieveError(
        f"The task gives a clip as {type(url).__name__}; only paths, addresses and bytes can be read."
    )


def _picture(image: Image.Image) -> Clip:
    """A decoded image as a clip of one frame, transparent parts on white."""
    see_through = image.has_transparency_data
    pixels = np.asarray(image.convert("RGBA" if see_through else "RGB"))
    frame = on_white(pixels) if see_through else pixels
    info = ClipInfo(label="image of the task", width=image.width, height=image.height, is_image=True)
    return Clip(np.ascontiguousarray(frame)[None], np.zeros(1), np.zeros(1, dtype=np.int64), info, 0.0)


def _log(answers: Sequence[Answer], elapsed: float, rank: int) -> None:
    """Hand the totals to lmms-eval, which reports them beside the accuracy."""
    new = sum(answer.new_tokens for answer in answers)
    counts: Counter[str] = Counter()
    for answer in answers:
        counts.update(answer.tokens.to_dict())
    number, before = max(1, len(answers)), counts["visual_before"]
    additional = {
        "visual_tokens_before": before / number,
        "visual_tokens": counts["visual"] / number,
        "visual_tokens_last": counts["visual_last"] / number,
        "prompt_tokens": counts["prompt"] / number,
        "retention_achieved": counts["visual"] / before if before else 1.0,
        "retention_last": counts["visual_last"] / before if before else 1.0,
        **{f"seconds_{stage}": value / number for stage, value in _seconds(answers).items()},
        "rank": rank,
    }
    log_metrics(
        total_elapsed_time=elapsed,
        total_gen_tokens=new,
        avg_speed=new / elapsed if elapsed > 0 else 0.0,
        additional_metrics=additional,
    )


def _seconds(answers: Sequence[Answer]) -> dict[str, float]:
    """Time per stage; answers of one call share their record, which counts once."""
    found: dict[str, float] = defaultdict(float)
    for seconds in {id(answer.seconds): answer.seconds for answer in answers}.values():
        for stage, value in seconds.items():
            found[stage] += value
    return dict(found)
