"""The model in vLLM: continuous batching, paged caches, and one method and retention for the life of the engine."""

from __future__ import annotations

import asyncio
import math
import time
import uuid
from collections import OrderedDict
from collections.abc import AsyncIterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

from tokensieve.bridges.chat import render_chat
from tokensieve.bridges.generation import RowTokens, Sampling
from tokensieve.bridges.openai_server.backend import Done, Event, Generation, Piece, Usage
from tokensieve.bridges.vllm import engine_arguments
from tokensieve.bridges.vllm.arguments import check_engine, engine_version
from tokensieve.core.method import Method
from tokensieve.errors import HostError, MethodError
from tokensieve.prompt import _video_arguments

__all__ = ["VllmBackend"]

_STOPPING = "The server is stopping; send the request to another."
# Numbers of tokens by the engine's key of a clip; far more than its cache of prepared clips can hold.
_MOST_KEYS = 1 << 16


class VllmBackend:
    """Answers requests with an engine of its own process, which a method of tokensieve prunes.

    Parameters
    ----------
    model : str
        Folder of a checkpoint or its name on the hub.
    processor
        Of the checkpoint; writes the prompts.
    method, retention
        What the engine prunes by; requests can ask for nothing else. ``none`` prunes nothing.
    batch_size
        Most requests that the engine works on at the same time.
    **arguments
        For ``vllm.AsyncEngineArgs``, for example ``dtype`` or ``max_model_len``.

    Raises
    ------
    HostError
        When the engine is missing, of an unknown version, or cannot start.
    MethodError
        When the method cannot prune the model inside the engine.
    """

    name = "vllm"
    random_weights = False

    def __init__(
        self, model: str, processor: Any, method: str, retention: float, batch_size: int = 16, **arguments: Any
    ) -> None:
        check_engine()
        self.parallel, self._method, self._retention = batch_size, method, retention
        self._processor = processor
        given = {"max_num_seqs": batch_size, "disable_log_stats": True, **arguments}
        self._engine = _started(engine_arguments(model, method, retention, **given))
        self._config = self._engine.model_config.hf_config
        self._longest: int = self._engine.model_config.max_model_len
        self._before: OrderedDict[str, int] = OrderedDict()
        self._preparing: ThreadPoolExecutor | None = None

    def check(self, methods: list[Method]) -> None:
        """Raise MethodError for other methods than the engine was started with."""
        wanted, mine = "+".join(method.name for method in methods), self._method.partition(":")[0].strip()
        if wanted != mine:
            raise MethodError(self._only(f"the method {wanted}"))

    def start(self) -> None:
        """Begin to take requests; the engine runs already."""
        self._preparing = ThreadPoolExecutor(1, thread_name_prefix="tokensieve-prepare")

    def stop(self) -> None:
        """End the engine."""
        if self._preparing is not None:
            self._preparing.shutdown(wait=True, cancel_futures=True)
            self._preparing = None
            self._engine.shutdown()

    @property
    def alive(self) -> bool:
        """Whether the engine runs."""
        return self._preparing is not None and not self._engine.errored

    def describe(self) -> dict[str, Any]:
        """Engine, weight type and longest prompt, and the one retention that it has."""
        return {
            "min_retention": self._retention,
            "max_retention": self._retention,
            "engine": f"vllm {engine_version()}",
            "dtype": str(self._engine.model_config.dtype).removeprefix("torch."),
            "max_model_len": self._longest,
            "batch_size": self.parallel,
        }

    async def generate(self, request: Generation) -> AsyncIterator[Event]:
        """Pieces of an answer, then one `Done`; see `Backend.generate`."""
        if self._preparing is None:
            raise HostError(_STOPPING)
        self._refuse_other(request)
        begun = time.perf_counter()
        prompt, notes = await asyncio.get_running_loop().run_in_executor(self._preparing, self._prompt, request)
        prepared = await self._prepared(prompt)
        tokens = self._tokens(prepared)
        self._check_length(request, tokens)
        handed = first = time.perf_counter()
        count, reason = 0, "length"
        identity = f"tokensieve-{uuid.uuid4().hex}"
        stream = self._engine.generate(prepared, _sampling_parameters(request.sampling), identity)
        try:
            async for output in stream:
                (answer,) = output.outputs
                first = first if count else time.perf_counter()
                count += len(answer.token_ids)
                reason = answer.finish_reason or reason
                if answer.text:
                    yield Piece(answer.text)
        finally:
            # Closing the engine's stream early cancels the request there.
            await stream.aclose()
        ended = time.perf_counter()
        seconds = {"prepare": handed - begun, "prefill": first - handed, "decode": ended - first}
        finish: Literal["stop", "length"] = "stop" if reason == "stop" else "length"
        yield Done(finish, Usage(tokens, count, seconds, notes))

    def _only(self, wanted: str) -> str:
        return (
            f"vLLM was started with {self._method} at a retention of {self._retention:g} and cannot serve {wanted}; "
            "ask for that, or start the server with --engine transformers, where requests may choose."
        )

    def _refuse_other(self, request: Generation) -> None:
        """Raise MethodError for a request that wants another method or retention."""
        if request.method != self._method:
            raise MethodError(self._only(f"the method {request.method}"))
        if self._method != "none" and request.retention != self._retention:
            raise MethodError(self._only(f"a retention of {request.retention:g}"))

    def _prompt(self, request: Generation) -> tuple[dict[str, Any], list[str]]:
        """Text and visuals as the engine takes them."""
        rendered = render_chat(self._processor, request.chat)
        data: dict[str, Any] = {}
        images = [part["image"] for part in rendered.visuals if part["type"] == "image"]
        videos = [part for part in rendered.visuals if part["type"] == "video"]
        if images:
            data["image"] = images
        if videos:
            arguments = _video_arguments(videos, 1, self._processor, False)
            data["video"] = [
                (frames, _metadata(about))
                for frames, about in zip(arguments["videos"], arguments["video_metadata"], strict=True)
            ]
        return ({"prompt": rendered.text, **({"multi_modal_data": data} if data else {})}, rendered.notes)

    async def _prepared(self, prompt: dict[str, Any]) -> Mapping[str, Any]:
        """The engine's own input: tokens with placeholders, and prepared clips."""
        from vllm.renderers.inputs.preprocess import parse_model_prompt

        try:
            parsed = parse_model_prompt(self._engine.model_config, prompt)
            (prepared,) = await self._engine.renderer.render_cmpl_async([parsed])
        except (ValueError, RuntimeError, TypeError, IndexError, KeyError) as error:
            raise HostError(f"vLLM cannot take this input ({' '.join(str(error).split())[:300]}).") from error
        return prepared

    def _tokens(self, prepared: Mapping[str, Any]) -> RowTokens:
        """Tokens of a prompt before and after pruning."""
        length = len(prepared["prompt_token_ids"])
        kept = before = 0
        for kind, ranges in prepared.get("mm_placeholders", {}).items():
            for place, found in enumerate(ranges):
                number = found.get_num_embeds() - (self._newlines if kind == "video" else 0)
                kept += number
                before += self._video_tokens(prepared, place, number) if kind == "video" else number
        return RowTokens(length + before - kept, length, before, kept, kept)

    @property
    def _newlines(self) -> int:
        """Tokens behind a video that are no patches of it."""
        return 1 if self._config.model_type == "llava_onevision" else 0

    def _video_tokens(self, prepared: Mapping[str, Any], place: int, kept: int) -> int:
        """Tokens of a video without pruning; ``kept`` for families that are never pruned."""
        key = prepared["mm_hashes"]["video"][place]
        item = prepared["mm_kwargs"]["video"][place]
        # The engine leaves out what it has cached already.
        if item is not None:
            self._before[key] = _unpruned(self._config, item, kept)
        self._before.move_to_end(key)
        while len(self._before) > _MOST_KEYS:
            self._before.popitem(last=False)
        return self._before[key]

    def _check_length(self, request: Generation, tokens: RowTokens) -> None:
        new, limit = request.sampling.max_new_tokens, request.max_prompt_tokens
        if limit is not None and tokens.prompt_before + new > limit:
            raise MethodError(
                f"The prompt has {tokens.prompt_before} tokens before compression, which with {new} new ones is more "
                f"than {limit}; ask for fewer frames or a shorter answer."
            )
        if tokens.prompt + new > self._longest:
            raise MethodError(
                f"The prompt has {tokens.prompt} tokens after compression, which with {new} new ones is more than the "
                f"{self._longest} of the model; ask for fewer frames or a shorter answer."
            )


def _started(arguments: dict[str, Any]) -> Any:
    """An engine, its model loaded."""
    from vllm import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    try:
        return AsyncLLM.from_engine_args(AsyncEngineArgs(**arguments))
    except (ValueError, RuntimeError, TypeError, OSError) as error:
        words = " ".join(str(error).split())
        raise HostError(f"vLLM cannot start ({words[:500]}); its messages above say more.") from error


def _sampling_parameters(sampling: Sampling) -> Any:
    """How the engine is to generate; it hands over what is new."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(
        temperature=sampling.temperature,
        top_p=1.0 if sampling.top_p is None else sampling.top_p,
        top_k=0 if sampling.top_k is None else sampling.top_k,
        seed=sampling.seed,
        stop=list(sampling.stop),
        max_tokens=sampling.max_new_tokens,
        output_kind=RequestOutputKind.DELTA,
    )


def _metadata(about: Any) -> dict[str, Any]:
    """What the engine wants to know about a video."""
    return {
        "fps": about.fps,
        "duration": about.duration,
        "total_num_frames": about.total_num_frames,
        "frames_indices": list(about.frames_indices),
        "video_backend": about.video_backend,
        "do_sample_frames": False,
    }


def _unpruned(config: Any, item: Mapping[str, Any], kept: int) -> int:
    """Tokens of a prepared video before a method acts: its grid, or its pooled frames."""
    if "video_grid_thw" in item:
        return int(item["video_grid_thw"].data.prod()) // config.vision_config.spatial_merge_size**2
    if config.model_type == "llava_onevision":
        vision = config.vision_config
        side = math.ceil(vision.image_size // vision.patch_size / 2)
        return int(item["pixel_values_videos"].data.shape[-4]) * side**2
    return kept
