"""The two kinds of workers: processor cores read clips and prepare prompts, accelerators answer them."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from typing import Any

from tokensieve.bridges.ray_batch.items import Item
from tokensieve.bridges.ray_batch.settings import BatchSettings
from tokensieve.errors import TokensieveError

__all__ = ["Answerer", "Decoder"]

Batch = dict[str, Any]


class Decoder:
    """Turns items into prepared prompts; needs no accelerator and loads no weights.

    Called with ``{"item": [JSON]}``; gives rows of ``records`` (JSON: what is known of each clip so far) and
    ``inputs`` (the tensors of a batch of prompts as safetensors, empty for clips that failed).

    Parameters
    ----------
    settings : BatchSettings
        How to read and prepare.
    """

    def __init__(self, settings: BatchSettings) -> None:
        from tokensieve.core.registry import resolve
        from tokensieve.load import _load_processor, read_config

        self._settings = settings
        read_config(settings.model)
        self._processor = _load_processor(settings.model, trust_remote_code=False)
        methods = resolve(settings.method, retention=settings.retention)
        self._whole_frames = any(method.uniform_views for method in methods)

    def __call__(self, batch: Batch) -> Batch:
        """Read and prepare some clips."""
        from tokensieve.bridges.chat import Turn, shape_of

        rows: list[tuple[list[dict[str, Any]], bytes]] = []
        groups: dict[Any, list[tuple[dict[str, Any], list[Turn]]]] = {}
        for text in batch["item"]:
            item = Item(**json.loads(str(text)))
            record = item.to_dict()
            begun = time.perf_counter()
            try:
                clip = self._read(item)
            except TokensieveError as error:
                rows.append(([_failed(record, str(error))], b""))
                continue
            except Exception as error:
                rows.append(([_failed(record, f"{type(error).__name__}: {error}")], b""))
                continue
            record |= {
                "frames": len(clip),
                "duration": clip.info.duration,
                "seconds_read": time.perf_counter() - begun,
            }
            chat = [Turn("user", (clip, item.question))]
            groups.setdefault(shape_of(chat), []).append((record, chat))
        for group in groups.values():
            rows += self._prepare(group)
        return {
            "records": [json.dumps(records) for records, _ in rows],
            "inputs": [inputs for _, inputs in rows],
        }

    def _read(self, item: Item) -> Any:
        from tokensieve.video import read_clip

        settings = self._settings
        options: dict[str, Any] = {"start": item.start, "end": item.end, "max_pixels": settings.max_pixels}
        if settings.fps is None:
            return read_clip(item.video, settings.frames, **options)
        return read_clip(item.video, sampling="fps", fps=settings.fps, max_frames=settings.frames, **options)

    def _prepare(self, group: Sequence[tuple[dict[str, Any], Any]]) -> list[tuple[list[dict[str, Any]], bytes]]:
        """One row for clips that share a batch, or a row for each if they cannot."""
        from safetensors.torch import save

        from tokensieve.bridges.chat import build_chats

        records = [record for record, _ in group]
        begun = time.perf_counter()
        try:
            prompt = build_chats(self._processor, [chat for _, chat in group], whole_frames=self._whole_frames)
        except TokensieveError as error:
            if len(group) == 1:
                return [([_failed(records[0], str(error))], b"")]
            return [row for one in group for row in self._prepare([one])]
        taken = (time.perf_counter() - begun) / len(group)
        return [
            (
                [{**record, "seconds_prepare": taken} for record in records],
                save({name: value.contiguous() for name, value in prompt.inputs.items()}),
            )
        ]


class Answerer:
    """Holds one model and answers prepared prompts; gives one finished record (JSON) per clip.

    Parameters
    ----------
    settings : BatchSettings
        Model, methods and length of the answers.
    device : str
        ``"auto"``, ``"cpu"`` or ``"cuda"``.
    """

    def __init__(self, settings: BatchSettings, device: str = "auto") -> None:
        from tokensieve.core.registry import resolve
        from tokensieve.load import load_model

        self._settings = settings
        self._model, self._processor = load_model(settings.model, settings.dtype, device, settings.attn)
        self._methods = resolve(settings.method, retention=settings.retention)

    def __call__(self, batch: Batch) -> Batch:
        """Answer some batches of prompts."""
        finished: list[str] = []
        for text, inputs in zip(batch["records"], batch["inputs"], strict=True):
            records = json.loads(str(text))
            finished += [json.dumps(record) for record in (self._answer(records, bytes(inputs)) if inputs else records)]
        return {"record": finished}

    def _answer(self, records: list[dict[str, Any]], inputs: bytes) -> list[dict[str, Any]]:
        import torch
        from safetensors.torch import load

        from tokensieve.bridges.generation import Sampling, answer_rows
        from tokensieve.prompt import Prompt

        sampling = Sampling(self._settings.max_new_tokens)
        try:
            moved = Prompt(load(inputs), True).on(self._model)
            answers = answer_rows(self._model, self._processor.tokenizer, moved, self._methods, sampling)
        except (TokensieveError, torch.OutOfMemoryError, MemoryError) as error:
            reason = str(error) if isinstance(error, TokensieveError) else "The memory did not suffice for this clip."
            if len(records) > 1:
                reason += f" (in a batch of {len(records)}; try --batch-size 1 --retry-failed)"
            return [_failed(record, reason) for record in records]
        return [
            record
            | {
                "status": "ok",
                "answer": answer.text,
                "new_tokens": answer.new_tokens,
                **{f"tokens_{name}": value for name, value in answer.tokens.to_dict().items()},
                **{f"seconds_{name}": value / len(records) for name, value in answer.seconds.items()},
            }
            for record, answer in zip(records, answers, strict=True)
        ]


def _failed(record: dict[str, Any], reason: str) -> dict[str, Any]:
    """The record of a clip without an answer."""
    return {**record, "status": "failed", "reason": " ".join(reason.split())}
