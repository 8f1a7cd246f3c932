"""The results of a run as files: a table of answers, and a list of clips that failed."""

from __future__ import annotations

import importlib
import json
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tokensieve.errors import TokensieveError

__all__ = ["COLUMNS", "FORMATS", "failed_path", "journal_path", "write_failed", "write_table"]

FORMATS = (".parquet", ".jsonl")
"""Endings of output files."""

COLUMNS: Mapping[str, str] = {
    "id": "string",
    "video": "string",
    "question": "string",
    "start": "float64",
    "end": "float64",
    "answer": "string",
    "new_tokens": "int64",
    "frames": "int64",
    "duration": "float64",
    "tokens_visual_before": "int64",
    "tokens_visual": "int64",
    "tokens_visual_last": "int64",
    "tokens_prompt_before": "int64",
    "tokens_prompt": "int64",
    "seconds_read": "float64",
    "seconds_prepare": "float64",
    "seconds_encode": "float64",
    "seconds_compress": "float64",
    "seconds_prefill": "float64",
    "seconds_decode": "float64",
}
"""Columns of the table and their types; seconds of a batch are divided among its clips."""


def journal_path(output: Path) -> Path:
    """Where the journal of an output is."""
    return output.with_name(f"{output.name}.journal")


def failed_path(output: Path) -> Path:
    """Where the failed clips of an output are listed."""
    return output.with_name(f"{output.stem}.failed.jsonl")


def check_format(output: Path) -> None:
    """Raise TokensieveError for an ending that cannot be written."""
    if output.suffix.lower() not in FORMATS:
        raise TokensieveError(f"The output {output} must end in {' or '.join(FORMATS)}; choose one.")
    if not output.parent.is_dir():
        raise TokensieveError(f"The folder {output.parent} does not exist; make it or choose another -o.")


def write_table(output: Path, records: Iterable[Mapping[str, Any]], settings: Mapping[str, Any]) -> int:
    """Write all answers to a Parquet or JSON-lines file, which replaces an older one in one step.

    Parameters
    ----------
    output : Path
        Ends in one of `FORMATS`.
    records : iterable of mapping
        Finished records; failed ones are left out.
    settings : mapping
        Goes into the metadata of a Parquet file, under ``tokensieve``.

    Returns
    -------
    int
        Number of rows.

    Raises
    ------
    TokensieveError
        If the file cannot be written.
    """
    rows = [{name: record.get(name) for name in COLUMNS} for record in records if record["status"] == "ok"]
    with _replaced(output) as draft:
        if output.suffix.lower() == ".jsonl":
            draft.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        else:
            arrow = importlib.import_module("pyarrow")
            parquet = importlib.import_module("pyarrow.parquet")
            fields = [arrow.field(name, getattr(arrow, kind)()) for name, kind in COLUMNS.items()]
            schema = arrow.schema(fields, metadata={"tokensieve": json.dumps(dict(settings))})
            parquet.write_table(arrow.Table.from_pylist(rows, schema=schema), draft)
    return len(rows)


def write_failed(output: Path, records: Iterable[Mapping[str, Any]]) -> int:
    """List the failed clips beside an output, or remove the list when there are none; their number."""
    rows = [
        {name: record.get(name) for name in ("id", "video", "question", "reason")}
        for record in records
        if record["status"] == "failed"
    ]
    path = failed_path(output)
    if not rows:
        path.unlink(missing_ok=True)
        return 0
    with _replaced(path) as draft:
        draft.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return len(rows)


@contextmanager
def _replaced(path: Path) -> Iterator[Path]:
    """A draft beside a file that takes its place when the block ends well."""
    try:
        handle, name = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
        os.close(handle)
        draft = Path(name)
        try:
            yield draft
            # mkstemp makes files for the owner only; others get what the user's mask allows.
            mask = os.umask(0)
            os.umask(mask)
            draft.chmod(0o666 & ~mask)
            draft.replace(path)
        finally:
            draft.unlink(missing_ok=True)
    except OSError as error:
        raise TokensieveError(f"{path} cannot be written ({error.strerror}); choose another -o.") from error
