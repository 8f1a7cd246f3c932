"""The same tiny checkpoint inside vLLM and on transformers."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor
from vllm import LLM, SamplingParams

import tokensieve
from tokensieve.bridges.vllm import FAMILIES, engine_arguments
from tokensieve.bridges.vllm.choice import PREFIX, read_choice
from tokensieve.hosts import tiny
from tokensieve.hosts.tiny.examples import _metadata as metadata_of

NEW_TOKENS = 10
CHUNK = 64
TEXT = {"hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}


@dataclass
class Prompt:
    """What one request shows and asks."""

    videos: Sequence[int] = (0,)
    images: Sequence[int] = ()
    question: str = "What happens in the video?"
    frames: int = 8

    @property
    def clips(self) -> list[Any]:
        """The videos, by their seeds."""
        return [tiny.synthetic_clip(self.frames, seed=seed) for seed in self.videos]

    @property
    def pictures(self) -> list[Any]:
        """The images, by their seeds."""
        return [tiny.synthetic_image(seed=seed) for seed in self.images]


@dataclass
class Answer:
    """What one path did with a request: ids after pruning, tokens kept of every video, the answer."""

    length: int
    kept: list[list[int]]
    tokens: list[int]
    cached: int = 0


class EnginePair:
    """An engine with prefix caching and chunks of 64 tokens, and the reference."""

    def __init__(self, host: str) -> None:
        self.host = host
        folder = tiny.cached(host, text=TEXT)
        self.family = next(family for family in FAMILIES.values() if family.slug == host)
        self.llm = LLM(
            **engine_arguments(
                str(folder),
                "uniform",
                0.25,
                dtype="float32",
                enforce_eager=True,
                max_model_len=2048,
                max_num_seqs=8,
                max_num_batched_tokens=CHUNK,
                enable_prefix_caching=True,
                block_size=32,
                disable_log_stats=True,
                # The engine would normalise videos with the mean of images, which differs in this checkpoint.
                mm_device_do_normalize=False,
                limit_mm_per_prompt={"video": 2, "image": 1},
            )
        )
        self.model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
        self.model.generation_config.eos_token_id = None
        self.processor = AutoProcessor.from_pretrained(folder)
        self.module = importlib.import_module(self.family.target.partition(":")[0])
        self.engine_model = self.llm.llm_engine.model_executor.driver_worker.model_runner.get_model()

    def close(self) -> None:
        """Free the engine."""
        self.llm.llm_engine.engine_core.shutdown()
        del self.llm, self.model, self.engine_model

    def choose(self, method: str, retention: float) -> Any:
        """Another method for the running engine, whose caches stay as they are."""
        rate = round(1 - retention, 12)
        choice = read_choice(PREFIX + method, rate)
        for config in (
            self.llm.llm_engine.vllm_config.model_config.multimodal_config,
            self.engine_model.multimodal_config,
        ):
            config.video_pruning_method, config.video_pruning_rate = choice.text, rate
        self.engine_model.choice = choice
        return choice

    def text(self, prompt: Prompt) -> str:
        """The chat as the template writes it."""
        content = [{"type": "video", "video": clip} for clip in prompt.clips]
        content += [{"type": "image", "image": image} for image in prompt.pictures]
        content.append({"type": "text", "text": prompt.question})
        chat = [{"role": "user", "content": content}]
        return str(self.processor.apply_chat_template(chat, add_generation_prompt=True))

    def ask_engine(self, prompts: Sequence[Prompt]) -> list[Answer]:
        """All prompts at once, in one batch of requests."""
        requests = []
        for prompt in prompts:
            data: dict[str, Any] = {}
            if prompt.videos:
                data["video"] = [self._engine_video(clip) for clip in prompt.clips]
            if prompt.images:
                data["image"] = prompt.pictures
            requests.append({"prompt": self.text(prompt), "multi_modal_data": data})
        sampling = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True)
        outputs = self.llm.generate(requests, sampling, use_tqdm=False)
        return [
            Answer(len(out.prompt_token_ids), [], list(out.outputs[0].token_ids), out.num_cached_tokens or 0)
            for out in outputs
        ]

    def _engine_video(self, clip: Any) -> Any:
        if self.host == "llava_onevision":
            return clip
        about = {key: value for key, value in self._metadata(clip).items() if key not in ("height", "width")}
        return clip, {**about, "do_sample_frames": False}

    @staticmethod
    def _metadata(clip: Any) -> dict[str, Any]:
        """Twice as many frames per second as usual: the steps of Qwen2.5-VL are then one position apart.

        Behind a video whose last step is later than its frames are wide, vLLM (and the original model) goes on after
        the step, transformers after the width; the clips here are wider than long so that both agree.
        """
        return metadata_of(clip, 4.0)

    def ask_reference(self, method: Any, prompt: Prompt) -> Answer:
        """One prompt on transformers, under ``tokensieve.compress``."""
        given: dict[str, Any] = {}
        if prompt.videos:
            clips = prompt.clips
            given |= {
                "videos": clips,
                "video_metadata": [self._metadata(clip) for clip in clips],
                "do_sample_frames": False,
            }
        if prompt.images:
            given["images"] = prompt.pictures
        inputs = self.processor(text=[self.text(prompt)], return_tensors="pt", **given)
        with tokensieve.compress(self.model, method) as run, torch.no_grad():
            out = self.model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
        length = inputs["input_ids"].shape[1]
        tokens = out[0, length:].tolist()
        if not run.history:
            return Answer(length, [], tokens)
        trace = run.history[0]
        kept = [item.keep.tolist() for item in trace.items if item.layout.kind == "video"]
        return Answer(trace.after[0], kept, tokens)

    def same(self, method: str, retention: float, prompts: Sequence[Prompt], fresh: bool = False) -> list[Answer]:
        """Both paths, which must agree on kept tokens, lengths and answers.

        With ``fresh`` the engine must not have seen the videos before, so that it encodes and prunes all of them.
        """
        choice = self.choose(method, retention)
        kept: dict[tuple[int, int], list[int]] = {}
        answers = self._recorded(prompts, kept)
        for prompt, answer in zip(prompts, answers, strict=True):
            expected = self.ask_reference(choice.method, prompt)
            for tokens in expected.kept:
                if kept or fresh:
                    assert tokens in list(kept.values()), f"{method}: the engine kept other tokens"
            assert answer.length == expected.length, f"{method}: {answer.length} tokens, not {expected.length}"
            assert answer.tokens == expected.tokens, f"{method}: {answer.tokens} is not {expected.tokens}"
        return answers

    def _recorded(self, prompts: Sequence[Prompt], kept: dict[Any, list[int]]) -> list[Answer]:
        """Ask the engine and note the patches that it keeps of every video that it encodes."""
        original = self.module.kept_tokens

        def recording(choice: Any, family: Any, features: Any, layout: Any) -> Any:
            tokens = original(choice, family, features, layout)
            index = torch.full((layout.tokens,), -1)
            index[layout.patch_tokens] = torch.arange(layout.patches)
            kept[len(kept), 0] = [i for i in index[tokens].tolist() if i >= 0]
            return tokens

        self.module.kept_tokens = recording
        try:
            return self.ask_engine(prompts)
        finally:
            self.module.kept_tokens = original
