"""What PPLLaVA's pooling costs and what it saves: operator, relevance and language model in one run.

    python -m benchmarks.ppllava_operator [--quick] [--dtype bfloat16] [--device cuda] [--layers 32]

One clip of 32 frames of 576 patches becomes 1024 tokens of width 4096. Timed, interleaved: average pooling; the
operator; the relevance map in front of it (projection of all patches to CLIP's joint space, cosines, softmax); one
pass of CLIP's text tower over 248 positions; and the prefill of a Vicuna 7B language model with the pooled and with
all tokens of the clip. On a CPU a few layers of the language model are timed (``--layers``) and the whole depth is
that many times more, which the table says.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, LlamaConfig, LlamaModel

from benchmarks.ppllava_pooling import memory
from benchmarks.results import RESULTS, SHARED, machine, median, show, write
from benchmarks.stopwatch import timed
from tokensieve.measure.text import in_seconds
from tokensieve.models.ppllava.alignment import ClipAlignment
from tokensieve.models.ppllava.pooling import VIDEO_KERNEL, prompt_guided_pool, resolve_window

__all__ = ["main"]

COLUMNS = ("work", "time", "share of the prefill with all tokens", "memory")
AVERAGE, GUIDED = "average pooling", "guided pooling"
RELEVANCE, QUESTION = "relevance map", "text tower, 248 positions"
POOLED, ALL = "language model, pooled tokens", "language model, all tokens"


def workloads(arguments: argparse.Namespace) -> dict[str, Callable[[], Any]]:
    """Everything that is timed, on random weights and features."""
    frames, side, device = arguments.frames, arguments.side, arguments.device
    dtype = getattr(torch, arguments.dtype)
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    projected = draw(frames, side * side, arguments.width)
    states = draw(frames, side * side, arguments.vision_width)
    relevance = (4 * torch.randn(frames, side, side, generator=generator)).flatten().softmax(0)
    relevance = relevance.view(frames, side, side).to(device)
    text = CLIPTextConfig(
        hidden_size=arguments.text_width,
        intermediate_size=4 * arguments.text_width,
        num_hidden_layers=arguments.text_layers,
        num_attention_heads=max(1, arguments.text_width // 64),
        max_position_embeddings=248,
        vocab_size=1000,
        bos_token_id=998,
        eos_token_id=999,
    )
    alignment = ClipAlignment(CLIPTextModel(text), arguments.vision_width, arguments.text_width)
    alignment = alignment.to(device, dtype).eval()
    ids = torch.full((1, 248), 999, device=device)
    question = draw(arguments.text_width)
    llama = LlamaConfig(
        hidden_size=arguments.width,
        intermediate_size=arguments.intermediate,
        num_hidden_layers=arguments.layers,
        num_attention_heads=max(1, arguments.width // 128),
        vocab_size=1000,
    )
    with torch.device("meta"):
        empty = LlamaModel(llama)
    model = _filled(empty, llama, device, dtype)
    grid = (side, side)
    window = resolve_window((frames, side, side))

    def prefill(tokens: int) -> None:
        model(inputs_embeds=draw_once(tokens), use_cache=False)

    stored: dict[int, Tensor] = {}

    def draw_once(tokens: int) -> Tensor:
        if tokens not in stored:
            stored[tokens] = draw(1, tokens, arguments.width)
        return stored[tokens]

    found: dict[str, Callable[[], Any]] = {
        AVERAGE: partial(prompt_guided_pool, projected, grid=grid),
        GUIDED: partial(prompt_guided_pool, projected, relevance, grid=grid),
        RELEVANCE: partial(alignment.compare, states, question, grid),
        QUESTION: partial(alignment.embed_text, ids, torch.ones_like(ids)),
    }
    for name, tokens in ((POOLED, window.tokens), (ALL, frames * side * side)):
        draw_once(tokens + arguments.prompt)
        found[name] = partial(prefill, tokens + arguments.prompt)
    return found


def _filled(empty: nn.Module, config: Any, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """A language model with small constant weights: its time does not depend on their values."""
    model = empty.to_empty(device="cpu").to(dtype)
    for parameter in model.parameters():
        nn.init.constant_(parameter, 1e-3)
    # Rotary frequencies are computed, not stored.
    model.rotary_emb = type(model.rotary_emb)(config)
    return model.to(device).eval()


def _percent(share: float) -> str:
    """Two digits, however small."""
    return f"{100 * share:.2g} %" if share < 1 else "100 %"


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ppllava_operator", description=__doc__.splitlines()[0])
    parser.add_argument("--frames", type=int, default=32)
    parser.add_argument("--side", type=int, default=24, help="patches per row")
    parser.add_argument("--width", type=int, default=4096, help="of the language model")
    parser.add_argument("--intermediate", type=int, default=11008, help="of its feed-forward layers")
    parser.add_argument("--layers", type=int, default=1, help="layers of it that are timed")
    parser.add_argument("--depth", type=int, default=32, help="layers that it has")
    parser.add_argument("--vision-width", type=int, default=1024)
    parser.add_argument("--text-width", type=int, default=768)
    parser.add_argument("--text-layers", type=int, default=12)
    parser.add_argument("--prompt", type=int, default=64, help="text tokens beside the clip")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="one round")
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args(argv)
    if not 1 <= arguments.layers <= arguments.depth:
        parser.error("--layers must lie between 1 and --depth")
    torch.set_num_threads(1)
    device = arguments.device
    factor = arguments.depth / arguments.layers
    with torch.no_grad():
        calls = workloads(arguments)
        seconds: dict[str, list[float]] = {name: [] for name in calls}
        for name in (AVERAGE, GUIDED, RELEVANCE, QUESTION):
            # The first call of an operator sets kernels up.
            calls[name]()
        for _ in range(1 if arguments.quick else arguments.repeats):
            for name, call in calls.items():
                times = factor if name in (POOLED, ALL) else 1.0
                seconds[name].append(times * timed(call, device))
        peaks = {name: memory(call, device) for name, call in calls.items()}
    whole = median(seconds[ALL])
    rows = []
    for name in calls:
        spent = median(seconds[name])
        rows.append([name, in_seconds(spent), _percent(spent / whole), f"{peaks[name] / 1e6:.0f} MB"])
    window = resolve_window((arguments.frames, arguments.side, arguments.side))
    patches = arguments.frames * arguments.side**2
    title = (
        f"PPLLaVA's pooling of {arguments.frames} x {arguments.side**2} x {arguments.width} to {window.tokens} tokens "
        f"by {VIDEO_KERNEL}, beside the prefill of the language model ({arguments.dtype}, {device.type}, one thread)"
    )
    show(title, COLUMNS, rows)
    rounds = len(seconds[ALL])
    notes = [
        SHARED,
        f"Medians of {rounds} rounds." if rounds > 1 else "A single round.",
        f"language model: {arguments.depth} layers of width {arguments.width} with {patches} or {window.tokens} visual "
        f"tokens and {arguments.prompt} of text; {arguments.layers} layers were run"
        + (f", times are {factor:g} times theirs." if factor != 1 else "."),
        "memory: peak of the call beyond its input, results included (CPU: resident set; CUDA: allocator); of the "
        "language model for the layers that were run, whose activations are let go layer by layer.",
    ]
    payload = {
        "machine": {**machine(device), "dtype": arguments.dtype},
        "settings": {**vars(arguments), "device": str(device), "output": None},
        "seconds": seconds,
        "peak_bytes": peaks,
        "tokens": {"all": patches, "pooled": window.tokens},
    }
    path = write(arguments.output, "ppllava_operator", payload, title, [("", COLUMNS, rows)], notes)
    print(f"written: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
