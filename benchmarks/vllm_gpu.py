"""vLLM with and without pruning on one GPU: throughput and time to first token at 1, 8 and 32 requests at a time.

    pip install 'tokensieve[vllm]' 'tokensieve[serve]'
    python -m benchmarks.vllm_gpu [--model FOLDER_OR_NAME] [--method vidcom2] [--retention 0.25] [--smoke]

Unless a model is named, one of the geometry of Qwen2.5-VL-7B (with a small vocabulary) is described on disk and filled
with random weights by the engine (`load_format=dummy`): speed does not depend on their values. Every request shows
another video, so that no cache helps. The unpruned engine runs in the same call, in a process of its own before the
pruned one. `--smoke` takes a tiny model and few requests, on any machine; its figures mean nothing and are not written.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import sys
import tempfile
import time
import uuid
from collections.abc import Sequence
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import numpy as np

from benchmarks.results import RESULTS, machine, show, write
from tokensieve.bridges.vllm import engine_arguments
from tokensieve.hosts import tiny
from tokensieve.measure.text import in_seconds

__all__ = ["main"]

CONCURRENCY = (1, 8, 32)
NEW_TOKENS = 32
SIZE = (336, 448)
TEXT_7B = {
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "max_position_embeddings": 32768,
}
VISION_7B = {
    "hidden_size": 1280,
    "intermediate_size": 3420,
    "depth": 32,
    "num_heads": 16,
    "out_hidden_size": 3584,
    "fullatt_block_indexes": [7, 15, 23, 31],
    "window_size": 112,
}
COLUMNS = ("pruning", "at a time", "requests", "prompt tokens", "requests/s", "TTFT p50", "TTFT p95", "against none")


def describe_7b(folder: Path) -> Path:
    """Configuration and processor of a model of 7B geometry, without weights."""
    from transformers import AutoConfig, AutoProcessor

    small = tiny.cached("qwen2_5_vl")
    processor = AutoProcessor.from_pretrained(small)
    processor.video_processor.size = {"shortest_edge": 128 * 28 * 28, "longest_edge": 24576 * 28 * 28}
    processor.save_pretrained(folder)
    config = AutoConfig.from_pretrained(small).to_dict()
    config["text_config"] |= TEXT_7B | {"rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}}
    config["vision_config"] |= VISION_7B
    config["dtype"] = config["text_config"]["dtype"] = "bfloat16"
    config["text_config"].pop("layer_types", None)
    (folder / "config.json").write_text(json.dumps(config, default=str), encoding="utf-8")
    return folder


def requests(model: str, frames: int, number: int, seed: int) -> list[dict[str, Any]]:
    """Prompts with one video each, all different."""
    from transformers import AutoProcessor

    content = [{"type": "video"}, {"type": "text", "text": "What happens in the video?"}]
    chat = [{"role": "user", "content": content}]
    text = AutoProcessor.from_pretrained(model).apply_chat_template(chat, add_generation_prompt=True)
    about = {
        "fps": 2.0,
        "duration": frames / 2,
        "total_num_frames": frames,
        "frames_indices": list(range(frames)),
        "do_sample_frames": False,
    }
    draw = np.random.default_rng(seed)
    clips = [draw.integers(0, 256, (frames, *SIZE, 3), dtype=np.uint8) for _ in range(number)]
    return [{"prompt": text, "multi_modal_data": {"video": [(clip, about)]}} for clip in clips]


async def one(engine: Any, prompt: dict[str, Any], sampling: Any) -> tuple[float, int]:
    """Seconds to the first token, and tokens of the prompt."""
    begun, first, length = time.perf_counter(), 0.0, 0
    async for output in engine.generate(prompt, sampling, uuid.uuid4().hex):
        first = first or time.perf_counter() - begun
        length = len(output.prompt_token_ids)
    return first, length


async def level(engine: Any, prompts: Sequence[dict[str, Any]], concurrency: int, sampling: Any) -> dict[str, Any]:
    """All prompts, so many at a time."""
    waiting, firsts, lengths = iter(prompts), [], []

    async def client() -> None:
        for prompt in waiting:
            first, length = await one(engine, prompt, sampling)
            firsts.append(first)
            lengths.append(length)

    begun = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(concurrency)))
    seconds = time.perf_counter() - begun
    return {
        "concurrency": concurrency,
        "requests": len(firsts),
        "prompt_tokens": max(lengths),
        "requests_per_second": len(firsts) / seconds,
        "first_p50": median(firsts),
        "first_p95": quantiles(firsts, n=20, method="inclusive")[-1] if len(firsts) > 1 else firsts[0],
    }


def measure(given: dict[str, Any], frames: int, per_level: int, levels: Sequence[int], pipe: Any) -> None:
    """Start an engine, warm it up, and measure every level; sends the results through a pipe."""
    from vllm import AsyncEngineArgs, SamplingParams
    from vllm.v1.engine.async_llm import AsyncLLM

    async def work() -> list[dict[str, Any]]:
        engine = AsyncLLM.from_engine_args(AsyncEngineArgs(**given))
        sampling = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True)
        try:
            await level(engine, requests(given["model"], frames, 2, 0), 2, sampling)
            found = []
            for number in levels:
                prompts = requests(given["model"], frames, max(per_level, 2 * number), number)
                found.append(await level(engine, prompts, number, sampling))
            return found
        finally:
            engine.shutdown()

    pipe.send(asyncio.run(work()))


def run(given: dict[str, Any], frames: int, per_level: int, levels: Sequence[int]) -> list[dict[str, Any]]:
    """The same in a process of its own, so that no memory of another engine is left."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=measure, args=(given, frames, per_level, levels, there))
    process.start()
    there.close()
    try:
        found: list[dict[str, Any]] = here.recv()
    except EOFError:
        raise SystemExit("The engine ended without results; its messages above say why.") from None
    finally:
        process.join()
    return found


def rows(label: str, found: Sequence[dict[str, Any]], full: Sequence[dict[str, Any]]) -> list[tuple[str, ...]]:
    """Cells of the table."""
    return [
        (
            label,
            str(one["concurrency"]),
            str(one["requests"]),
            str(one["prompt_tokens"]),
            f"{one['requests_per_second']:.2f}",
            in_seconds(one["first_p50"]),
            in_seconds(one["first_p95"]),
            f"{one['requests_per_second'] / base['requests_per_second']:.2f} x requests/s",
        )
        for one, base in zip(found, full, strict=True)
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.vllm_gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="7B geometry with random weights unless given")
    parser.add_argument("--method", default="vidcom2")
    parser.add_argument("--retention", type=float, default=0.25)
    parser.add_argument("--frames", type=int, default=32)
    parser.add_argument("--requests", type=int, default=64, help="per level, at least two per client")
    parser.add_argument("--smoke", action="store_true", help="tiny model, few requests, nothing written")
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args(argv)
    import torch

    levels = CONCURRENCY
    given: dict[str, Any] = {"max_model_len": 16384, "enable_prefix_caching": False, "disable_log_stats": True}
    with tempfile.TemporaryDirectory(prefix="tokensieve-vllm-") as place:
        if arguments.smoke:
            arguments.frames, arguments.requests, levels = 8, 4, (1, 2)
            model = str(tiny.cached("qwen2_5_vl", text={"hidden_size": 128, "num_key_value_heads": 2}))
            given |= {"max_model_len": 4096, "enforce_eager": True, "dtype": "float32"}
        elif not torch.cuda.is_available():
            parser.error("there is no GPU; --smoke tries the script without one")
        else:
            model = arguments.model or str(describe_7b(Path(place)))
            given |= {} if arguments.model else {"load_format": "dummy"}
        settings = arguments.frames, arguments.requests, levels
        full = run(engine_arguments(model, None, **given), *settings)
        pruned = run(engine_arguments(model, arguments.method, arguments.retention, **given), *settings)
    label = f"{arguments.method}, {arguments.retention:g} kept"
    table = rows("none", full, full) + rows(label, pruned, full)
    named = "tiny model" if arguments.smoke else arguments.model or "7B geometry"
    title = f"vLLM under load: {arguments.frames} frames, {NEW_TOKENS} new tokens, {named}"
    show(title, COLUMNS, table)
    if not arguments.smoke:
        device = torch.device("cuda")
        payload = {"machine": machine(device), "settings": vars(arguments) | {"output": ""}, "none": full}
        payload |= {"pruned": pruned}
        print(f"written: {write(arguments.output, 'vllm_gpu', payload, title, [('', COLUMNS, table)], ())}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
