"""Results as files: JSON, CSV, and one self-contained page."""

from __future__ import annotations

import csv
import io
import json
import math
from pathlib import Path
from typing import Any

from tokensieve.bench.page import render_page
from tokensieve.bench.results import Results, Row
from tokensieve.errors import BenchError
from tokensieve.view.files import atomic

__all__ = ["csv_text", "json_text", "write_results"]

COLUMNS = (
    "setting",
    "method",
    "retention",
    "family",
    "questions",
    "accuracy",
    "low",
    "high",
    "kept",
    "kept_low",
    "kept_high",
    "difference_to_full",
    "p_full",
    "p_full_holm",
    "difference_to_random",
    "p_random",
    "p_random_holm",
    "tokens_entered",
    "tokens_per_layer",
    "tokens_last",
    "achieved",
    "compress_ms",
    "prefill_ms",
    "llm_ms",
    "prefill_flops",
    "prefill_flops_share",
    "pareto",
)


def write_results(results: Results, folder: str | Path) -> list[Path]:
    """Write ``results.json``, ``results.csv`` and ``results.html`` into a folder.

    Raises
    ------
    BenchError
        When the folder cannot be made.
    TokensieveError
        When a file cannot be written.
    """
    target = Path(folder)
    try:
        target.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BenchError(f"The folder {target} cannot be made ({error.strerror}); choose another place.") from error
    written = []
    for name, text in (
        ("results.json", json_text(results)),
        ("results.csv", csv_text(results)),
        ("results.html", render_page(results)),
    ):
        with atomic(target / name) as temporary:
            temporary.write_text(text, encoding="utf-8")
        written.append(target / name)
    return written


def json_text(results: Results) -> str:
    """Everything, as JSON; numbers that JSON lacks become null."""
    return json.dumps(_finite(results.to_dict()), indent=1) + "\n"


def csv_text(results: Results) -> str:
    """One line per setting and family; the line of family ``all`` carries what is not counted by family."""
    stream = io.StringIO()
    writer = csv.DictWriter(stream, COLUMNS, lineterminator="\n")
    writer.writeheader()
    for row in results.rows:
        writer.writerow(_whole(row))
        for family, found in row.families.items():
            writer.writerow(
                {
                    "setting": row.setting,
                    "method": row.method,
                    "retention": row.retention,
                    "family": family,
                    "questions": int(results.families[family]["questions"]),
                    "accuracy": _number(found.value),
                    "low": _number(found.low),
                    "high": _number(found.high),
                }
            )
    return stream.getvalue()


def _whole(row: Row) -> dict[str, Any]:
    found: dict[str, Any] = {
        "setting": row.setting,
        "method": row.method,
        "retention": row.retention,
        "family": "all",
        "questions": row.questions,
        "accuracy": _number(row.accuracy.value),
        "low": _number(row.accuracy.low),
        "high": _number(row.accuracy.high),
        "tokens_entered": _number(row.tokens["entered"]),
        "tokens_per_layer": _number(row.tokens["average"]),
        "tokens_last": _number(row.tokens["last"]),
        "achieved": _number(row.achieved),
        "compress_ms": _number(row.milliseconds["compress"]),
        "prefill_ms": _number(row.milliseconds["prefill"]),
        "llm_ms": _number(row.milliseconds["llm"]),
        "prefill_flops": _number(row.flops["prefill"]),
        "prefill_flops_share": _number(row.flops["prefill_share"]),
        "pareto": int(row.on_front),
    }
    if row.kept is not None:
        kept = row.kept
        found |= {"kept": _number(kept.value), "kept_low": _number(kept.low), "kept_high": _number(kept.high)}
    for name, compared in (("full", row.against_full), ("random", row.against_random)):
        if compared is not None:
            found |= {
                f"difference_to_{name}": _number(compared.difference),
                f"p_{name}": _number(compared.p),
                f"p_{name}_holm": _number(compared.p_holm),
            }
    return found


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.6g}"


def _finite(data: Any) -> Any:
    if isinstance(data, dict):
        return {str(key): _finite(value) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [_finite(value) for value in data]
    if isinstance(data, float) and not math.isfinite(data):
        return None
    return data
