"""A `tokensieve serve` of a small random model in a process of its own, and clips for it, for the load test."""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import psutil
from safetensors.torch import load_file, save_file

from tokensieve.hosts import tiny

__all__ = ["CLIPS", "FRAMES", "processor_seconds", "resident", "server", "write_clips"]

FRAMES, CLIPS = 8, 8
TEXT = {
    "hidden_size": 192,
    "intermediate_size": 768,
    "num_hidden_layers": 6,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
}
ENGINE_ON_CPU = {"VLLM_CPU_KVCACHE_SPACE": "2", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_LOGGING_LEVEL": "ERROR"}


def write_clips(folder: Path) -> list[str]:
    """Small clips of moving shapes; their addresses."""
    addresses = []
    for seed in range(CLIPS):
        path = folder / f"{seed}.mp4"
        with av.open(str(path), "w") as output:
            stream: Any = output.add_stream("libx264", rate=4)
            stream.height, stream.width, stream.pix_fmt = 112, 168, "yuv420p"
            for place, picture in enumerate(tiny.synthetic_clip(2 * FRAMES, seed=seed)):
                frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
                frame.pts, frame.time_base = place, Fraction(1, 4)
                output.mux(stream.encode(frame))
            output.mux(stream.encode(None))
        addresses.append(path.as_uri())
    return addresses


def with_published_names(model: Path, target: Path) -> Path:
    """A copy of a model with the weight names of the published checkpoints, the only ones that the engine reads."""
    shutil.copytree(model, target)
    weights = load_file(target / "model.safetensors")
    names = {name: name.replace("vision_tower.", "vision_tower.vision_model.") for name in weights}
    save_file({names[name]: value for name, value in weights.items()}, target / "model.safetensors", {"format": "pt"})
    return target


def processor_seconds(process: psutil.Process) -> float:
    """Processor time of a process and its children so far."""
    times = [one.cpu_times() for one in (process, *process.children(recursive=True))]
    return sum(one.user + one.system for one in times)


def resident(process: psutil.Process) -> int:
    """Memory of a process and its children, bytes."""
    return sum(one.memory_info().rss for one in (process, *process.children(recursive=True)))


@contextmanager
def server(
    folder: Path, arguments: argparse.Namespace, engine: str, batch: int, methods: Sequence[str]
) -> Iterator[tuple[str, psutil.Process]]:
    """A running server that offers methods: its address and process."""
    model = tiny.cached("llava_onevision", text=TEXT, vision={"image_size": 378, "patch_size": 14})
    words = [str(model), "--port", "0", "--served-model-name", "load", "--media-root", str(folder), "--no-progress"]
    words += ["--engine", engine, "--method", methods[-1], "--retention", str(arguments.retention)]
    words += ["--dtype", "float32", "--batch-size", str(batch)]
    for method in methods[:-1]:
        words += ["--allow-method", method]
    if engine == "vllm":
        words[0] = str(with_published_names(model, folder / "model"))
        for option in ("enforce_eager=true", "max_model_len=4096", "gpu_memory_utilization=0.3"):
            words += ["--engine-option", option]
    words += ["--frames", str(FRAMES), "--queue", str(2 * arguments.concurrency), "--max-body", str(1 << 20)]
    command = [sys.executable, "-m", "tokensieve.cli", "serve", *words]
    with (
        (folder / "log").open("w+") as log,
        subprocess.Popen(command, stderr=log, env={**ENGINE_ON_CPU, **os.environ}) as process,
    ):
        try:
            deadline = time.monotonic() + 240
            while "at http://" not in (text := (folder / "log").read_text()):
                if process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"the server did not start: {text}")
                time.sleep(0.1)
            yield text.partition("at ")[2].partition("/v1")[0], psutil.Process(process.pid)
        finally:
            process.terminate()
