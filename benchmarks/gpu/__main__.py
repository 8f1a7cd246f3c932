"""Command line of the GPU benchmark; every (model, method) runs in a process of its own."""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.geometry import GEOMETRIES, Geometry, smoke
from benchmarks.gpu.cell import Settings, measure
from benchmarks.gpu.tables import NOTES, failures, sections
from benchmarks.results import RESULTS, machine, show, write
from tokensieve.core.registry import list_methods

__all__ = ["main"]

MODELS = ("llava-onevision-7b", "llava-video-7b", "qwen2.5-vl-7b")
CELL_SECONDS = 1800
"""Limit of one (model, method)."""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--methods", nargs="+", help="methods (default: all); those that do not fit say so")
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 4])
    parser.add_argument("--retention", type=float, default=0.25)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--long-tokens", type=int, default=64)
    parser.add_argument("--quick", action="store_true", help="first model, batch 1, two rounds")
    parser.add_argument("--smoke", action="store_true", help="miniature models on any device: checks the script only")
    parser.add_argument("--output", type=Path, help="folder of the results (default: benchmarks/results)")
    parser.add_argument("--cell", nargs=2, metavar=("MODEL", "METHOD"), help=argparse.SUPPRESS)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    arguments = _parser().parse_args(argv)
    if not torch.cuda.is_available() and not arguments.smoke:
        print("No CUDA GPU is visible; use --smoke to check the script on a CPU.", file=sys.stderr)
        return 2
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if arguments.quick:
        arguments.models, arguments.batch, arguments.repeats = arguments.models[:1], [1], 2
    settings = Settings(arguments.retention, tuple(arguments.batch), arguments.repeats, 2, arguments.long_tokens)
    if arguments.cell:
        print(json.dumps(_measure(arguments.cell[0], arguments.cell[1], device, arguments.smoke, settings)))
        return 0
    records: list[dict[str, Any]] = []
    methods = arguments.methods or list_methods()
    name = _file_name(device, arguments.smoke)
    for model in arguments.models:
        for method in methods:
            print(f"{model}: {method}", file=sys.stderr, flush=True)
            if arguments.smoke:
                records += _measure(model, method, device, True, settings)
            else:
                records += _in_process(model, method, arguments)
            if not arguments.smoke or arguments.output:
                # After every cell, so that an interrupted run keeps what it has.
                _write(arguments.output or RESULTS, name, device, arguments, records)
    for heading, columns, rows in sections(records):
        show(heading, columns, rows)
    for failure in failures(records):
        print(failure, file=sys.stderr)
    return 0 if any("samples" in record for record in records) else 1


def _geometry(name: str, small: bool) -> Geometry:
    return smoke(GEOMETRIES[name]) if small else GEOMETRIES[name]


def _measure(model: str, method: str, device: torch.device, small: bool, settings: Settings) -> list[dict[str, Any]]:
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    return measure(_geometry(model, small), method, device, dtype, settings)


def _in_process(model: str, method: str, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """One cell in a fresh process, so that whatever happens to it the others go on."""
    command = [sys.executable, "-m", "benchmarks.gpu", "--cell", model, method]
    command += ["--batch", *map(str, arguments.batch), "--retention", str(arguments.retention)]
    command += ["--repeats", str(arguments.repeats), "--long-tokens", str(arguments.long_tokens)]
    failed = [{"model": model, "method": method, "batch": batch} for batch in arguments.batch]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, cwd=Path(__file__).parents[2], timeout=CELL_SECONDS
        )
        found: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
        return found
    except subprocess.TimeoutExpired:
        return [{**record, "error": f"no result within {CELL_SECONDS} s"} for record in failed]
    except (IndexError, json.JSONDecodeError):
        last = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        return [{**record, "error": last} for record in failed]


def _file_name(device: torch.device, small: bool) -> str:
    if small or device.type != "cuda":
        return "gpu-smoke"
    return "gpu-" + re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name(device).lower()).strip("-")


def _write(
    directory: Path, name: str, device: torch.device, arguments: argparse.Namespace, records: list[dict[str, Any]]
) -> None:
    title = f"Efficiency at retention {arguments.retention:g}, bfloat16, sdpa"
    settings = {key: value for key, value in vars(arguments).items() if key not in ("output", "cell")}
    payload = {"machine": machine(device), "settings": settings, "records": records}
    write(directory, name, payload, title, sections(records), (*NOTES, *failures(records)))


if __name__ == "__main__":
    sys.exit(main())
