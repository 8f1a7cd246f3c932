"""The machine, and results as JSON, Markdown and tables on the terminal."""

from __future__ import annotations

import json
import os
import platform
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.table import Table

import tokensieve

__all__ = ["RESULTS", "machine", "median", "ratio", "show", "write"]

RESULTS = Path(__file__).parent / "results"
SHARED = (
    "The machine is shared with other work, so absolute times vary; the ratios compare medians of interleaved runs."
)


def machine(device: torch.device | None = None) -> dict[str, Any]:
    """What the numbers were measured on."""
    found: dict[str, Any] = {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "tokensieve": tokensieve.__version__,
    }
    if device is not None and device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {
            "gpu": properties.name,
            "gpu_memory_gb": round(properties.total_memory / 1e9, 1),
            "cuda": torch.version.cuda,
        }
    return found


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def median(values: Iterable[float]) -> float:
    """Median of some seconds."""
    return statistics.median(values)


def ratio(values: Sequence[float], reference: Sequence[float]) -> float:
    """Median over median."""
    return median(values) / median(reference)


def show(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table on the terminal; cells are folded where it is too narrow, never cut."""
    table = Table(title=title, title_justify="left")
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right", overflow="fold")
    for row in rows:
        table.add_row(*row)
    Console(width=None if os.isatty(1) else 240).print(table)


def write(
    directory: Path,
    name: str,
    payload: dict[str, Any],
    title: str,
    sections: Sequence[tuple[str, Sequence[str], Sequence[Sequence[str]]]],
    notes: Sequence[str],
) -> Path:
    """``<name>.json`` and ``<name>.md`` in a directory.

    Parameters
    ----------
    directory : Path
        Made when missing.
    name : str
        Stem of both files.
    payload : dict
        Everything measured.
    title : str
        Heading.
    sections : sequence of (heading, columns, rows)
        Tables; an empty heading is left out.
    notes : sequence of str
        Sentences under the tables.

    Returns
    -------
    Path
        The Markdown file.
    """
    directory.mkdir(parents=True, exist_ok=True)
    (directory / f"{name}.json").write_text(json.dumps(payload, indent=1) + "\n", encoding="utf-8")
    described = ", ".join(f"{key} {value}" for key, value in payload["machine"].items())
    lines = [f"# {title}", "", f"Machine: {described}.", ""]
    for heading, columns, rows in sections:
        if heading:
            lines += [f"## {heading}", ""]
        lines.append("| " + " | ".join(columns) + " |")
        lines.append("|" + "---|" * len(columns))
        lines += ["| " + " | ".join(row) + " |" for row in rows]
        lines.append("")
    lines += [f"- {note}" for note in notes]
    path = directory / f"{name}.md"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path
