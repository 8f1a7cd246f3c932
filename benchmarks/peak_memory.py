"""Peak memory with every method beside the uncompressed run: 128 frames, a narrow model with random weights.

    python -m benchmarks.peak_memory [--methods vidcom2 divprune] [--frames 128] [--resume]

Every run is a process of its own that answers one prompt twice. The first answer gives the peak of the resident set;
it varies from run to run. The second gives the peak of what the tensor allocator had handed out, from the profiler's
record of every allocation: the same number in every run. Both count from the loaded model and its inputs.

Most methods run on the first host; those that need a class token in the vision tower run on the second one, and one
that drops patches inside of a tower without pooling behind it on the third, each beside an uncompressed run there.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch.profiler import ProfilerActivity, profile

import tokensieve
from benchmarks.results import RESULTS, machine, show, write
from tokensieve.core.guided import PairedMethod, ReadingMethod
from tokensieve.core.registry import method_class
from tokensieve.core.signals import SIGNALS
from tokensieve.hosts import host_for, tiny
from tokensieve.measure.memory import PeakMemory
from tokensieve.measure.text import in_bytes, in_percent
from tokensieve.methods.explainability_compression import MapperConfig, RelevanceMapper
from tokensieve.pairing import load_pair

__all__ = ["HOSTS", "allocated_peak", "host_of", "main"]

FULL = "full model"
TEXT: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 1024,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 65536,
}
TOWER: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
}
HOSTS: dict[str, dict[str, Any]] = {
    "llava_onevision": {"text": TEXT, "vision": {**TOWER, "image_size": 378}},
    "llava_next_video": {"text": TEXT, "vision": {**TOWER, "image_size": 336}},
    "qwen2_vl": {
        "text": {
            "hidden_size": 128,
            "intermediate_size": 512,
            "num_hidden_layers": 5,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "max_position_embeddings": 65536,
        },
        "vision": {"depth": 4, "embed_dim": 64, "num_heads": 4, "mlp_ratio": 4},
        "video_processor": {"size": {"shortest_edge": 144 * 784, "longest_edge": 196 * 784}},
    },
}
"""Narrow models with grids of real sizes: 27 x 27 patches and 196 tokens a frame; 24 x 24 patches and 144 tokens; 20 x
30 patches and 150 tokens in two frames."""
COLUMNS = ("method", "host", "patches into LLM", "allocated", "of the full model", "resident", "of the full model")


def allocated_peak(call: Callable[[], Any]) -> int:
    """Largest number of bytes that the tensor allocator of the CPU had handed out at once during a call.

    Parameters
    ----------
    call
        What is measured; what it frees of earlier allocations counts as negative.

    Returns
    -------
    int
        Bytes above those at the beginning.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        call()
    live = peak = 0
    for event in record.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    return peak


def host_of(name: str) -> str | None:
    """The first host that can give all signals of a method; None where neither can."""
    for family in HOSTS:
        model, _ = tiny.build_in_memory(family)
        host, base = host_for(model), model.base_model
        requests = (text.partition("@")[0] for text in method_class(name)().signals(host.facts(base)))
        if all(SIGNALS[text].pair or host.availability(text, base) != "absent" for text in requests):
            pairs = [SIGNALS[text.partition("@")[0]].pair for text in method_class(name)().signals(host.facts(base))]
            if all(host.tower_pair(base) in kinds for kinds in pairs if kinds):
                return family
    return None


def _options(name: str, model: Any, processor: Any, folder: Path) -> dict[str, Any]:
    """What a method needs besides its retention: the text tower, the tokenizer, trained weights."""
    cls = method_class(name)
    found: dict[str, Any] = {}
    if issubclass(cls, PairedMethod):
        found["text_tower"] = load_pair(*tiny.pair_of(model))
    if issubclass(cls, ReadingMethod):
        found["tokenizer"] = processor
    if cls.needs_file:
        RelevanceMapper(MapperConfig()).save(folder / "mapper")
        found[cls.needs_file] = str(folder / "mapper")
    return found


def one_process(name: str, family: str, folder: Path, retention: float) -> dict[str, Any]:
    """Both peaks of one method (or the full model) in this process."""
    torch.set_num_threads(1)
    model, processor = tiny.build_in_memory(family, **HOSTS[family])
    inputs = load_file(folder / f"{family}.safetensors")

    def answer() -> None:
        with torch.no_grad():
            model.generate(**inputs, max_new_tokens=2, min_new_tokens=2, do_sample=False)

    memory = PeakMemory(torch.device("cpu"))

    def measured() -> dict[str, Any]:
        memory.start()
        loaded = memory.read()
        answer()
        resident = memory.read() - loaded
        return {"resident": resident, "allocated": allocated_peak(answer)}

    if name == FULL:
        return measured()
    options = {} if name == "none" else {"retention": retention}
    options |= _options(name, model, processor, folder)
    with tokensieve.compress(model, name, **options) as run:
        found = measured()
    while len(run.history) > 1:
        run.history.popleft()
    patches = run.report.patches
    return {**found, "entered": patches.entered, "last": patches.last, "uncompressed": patches.uncompressed}


def prepare(folder: Path, frames: int) -> None:
    """Inputs of one prompt for every host, as files."""
    for family, sizes in HOSTS.items():
        _, processor = tiny.build_in_memory(family, **sizes)
        save_file(dict(tiny.example_inputs(family, processor, frames=frames)), folder / f"{family}.safetensors")


def in_fresh_process(name: str, family: str, folder: Path, retention: float) -> dict[str, Any]:
    """`one_process` in a process of its own; a failure is reported by its last line."""
    command = [sys.executable, "-m", "benchmarks.peak_memory", "--one", name, family, str(folder)]
    command += ["--retention", str(retention)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1], check=False)
    if done.returncode:
        return {"error": (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]}
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def rows(found: dict[str, dict[str, Any]]) -> list[list[str]]:
    """Table rows; peaks in percent of those of the full model on the same host."""
    full = {record["host"]: record for name, record in found.items() if name.startswith(FULL)}
    table = []
    for name, record in found.items():
        if "error" in record:
            table.append([name, record["host"], "-", "failed, see below", "-", "-", "-"])
            continue
        reference = full[record["host"]]
        cells = [name, record["host"], str(record.get("entered", record["tokens"]))]
        for what in ("allocated", "resident"):
            record[f"{what}_of_full"] = record[what] / reference[what]
            cells += [in_bytes(record[what]), in_percent(record[f"{what}_of_full"])]
        table.append(cells)
    return table


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peak_memory", description=__doc__.splitlines()[0])
    parser.add_argument("--methods", nargs="+", help="methods (default: all)")
    parser.add_argument("--retention", type=float, default=0.25)
    parser.add_argument("--frames", type=int, default=128)
    parser.add_argument("--resume", action="store_true", help="keep the peaks that --output already holds")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--one", nargs=3, metavar=("METHOD", "HOST", "FOLDER"), help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.one:
        name, family, folder = arguments.one
        print(json.dumps(one_process(name, family, Path(folder), arguments.retention)))
        return 0
    settings = {"retention": arguments.retention, "frames": arguments.frames, "hosts": HOSTS}
    known = _known(arguments.output, settings) if arguments.resume else {}
    found: dict[str, dict[str, Any]] = {}
    hosts = {name: host_of(name) for name in arguments.methods or tokensieve.list_methods()}
    left_out = [name for name, family in hosts.items() if family is None]
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        prepare(folder, arguments.frames)
        for family in [family for family in HOSTS if family in hosts.values()]:
            tokens = _tokens(family, folder)
            for name in [FULL, *(name for name, host in hosts.items() if host == family)]:
                key = f"{FULL} ({family})" if name == FULL else name
                record = known.get(key) or in_fresh_process(name, family, folder, arguments.retention)
                found[key] = {"host": family, "tokens": tokens, **record}
                print(f"{key}: {record}", file=sys.stderr, flush=True)
                _finish(found, arguments, settings, left_out)
    show(*_finish(found, arguments, settings, left_out))
    return 0


def _known(folder: Path, settings: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Peaks that were measured before with the same settings."""
    target = folder / "peak_memory.json"
    if not target.exists():
        return {}
    written = json.loads(target.read_text(encoding="utf-8"))
    return {
        name: record
        for name, record in written["peaks"].items()
        if all(written["settings"][key] == settings[key] for key in ("retention", "frames"))
        and written["settings"]["hosts"].get(record["host"]) == settings["hosts"][record["host"]]
        and "error" not in record
    }


def _finish(
    found: dict[str, dict[str, Any]], arguments: argparse.Namespace, settings: dict[str, Any], left_out: Sequence[str]
) -> tuple[str, Sequence[str], list[list[str]]]:
    """Write what is known so far; returns the table."""
    table = rows(found)
    title = (
        f"Peak memory of one answer: {arguments.frames} frames, narrow models with random weights, retention "
        f"{arguments.retention:g}, float32, one thread"
    )
    notes = [
        "Bytes above those of the loaded model and its inputs, while a prompt is answered with two tokens.",
        "allocated: most bytes handed out by the tensor allocator at once, from the profiler's record of every "
        "allocation; the same in every run.",
        "resident: high-water mark of the resident set of a fresh process; it varies between runs, and contains pages "
        "that the allocator of the C library holds back.",
        f"llava_onevision, llava_next_video: language model {_sizes(TEXT)}; tower {_sizes(TOWER)}. The grids are real; "
        "widths are narrow, which is hard on methods: what they hold per token or per pair of tokens weighs more than "
        "in a wide model.",
        "Methods that leave all tokens to the language model (none; tome, where the host pools behind the tower) hold "
        "the book-keeping of a run above the full model: about 0.1 KB a token, whatever the width.",
        *(f"{name} is left out: no host here gives its signals." for name in left_out),
        *(f"{name} failed: {record['error']}" for name, record in found.items() if "error" in record),
    ]
    payload = {
        "machine": {**machine(), "threads": 1, "dtype": "float32"},
        "settings": settings,
        "peaks": found,
    }
    write(arguments.output, "peak_memory", payload, title, [("", COLUMNS, table)], notes)
    return title, COLUMNS, table


def _tokens(family: str, folder: Path) -> int:
    """Visual placeholders of the prompt."""
    _, processor = tiny.build_in_memory(family)
    ids = load_file(folder / f"{family}.safetensors")["input_ids"]
    marker = "<|video_pad|>" if family == "qwen2_vl" else "<video>"
    return int((ids == processor.tokenizer.convert_tokens_to_ids(marker)).sum())


def _sizes(fields: dict[str, Any]) -> str:
    names = ("num_hidden_layers", "hidden_size", "intermediate_size")
    return "{} layers, width {}, feed-forward {}".format(*(fields[name] for name in names))


if __name__ == "__main__":
    sys.exit(main())
