"""The journal of a benchmark: what is finished, line by line, so that a killed run goes on where it stopped."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from tokensieve.errors import BenchError

__all__ = ["Journal", "Unit"]

Unit = dict[str, Any]
"""One setting on one clip: ``setting``, ``clip`` and what was found."""

_FORMAT = 1
_LARGEST = 1 << 30


class Journal:
    """A JSONL file: the configuration first, then one line per finished unit, each written out at once.

    Parameters
    ----------
    path : Path
        The file; made when missing, continued otherwise.
    configuration : mapping
        Everything that the results depend on, as plain data. A journal of another configuration is refused.

    Attributes
    ----------
    units
        (setting, clip) -> unit, of earlier runs and this one.
    refused
        Setting -> why the model cannot run it.

    Raises
    ------
    BenchError
        When the file is no journal, belongs to another configuration, or cannot be read or written.
    """

    def __init__(self, path: str | Path, configuration: Mapping[str, Any]) -> None:
        self.path = Path(path)
        self.units: dict[tuple[str, str], Unit] = {}
        self.refused: dict[str, str] = {}
        header = {"format": _FORMAT, "configuration": json.loads(json.dumps(configuration))}
        self._file: BinaryIO | None = None
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            whole = self._read(header) if self.path.exists() else 0
            self._file = self.path.open("ab")
            self._file.truncate(whole)
            if whole == 0:
                self._write(header)
        except OSError as error:
            raise BenchError(
                f"The journal {self.path} cannot be used ({error.strerror}); choose another folder."
            ) from (error)

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def __contains__(self, key: tuple[str, str]) -> bool:
        return key in self.units

    def add(self, unit: Unit) -> None:
        """Keep a finished unit; once this returns, a kill of the process does not lose it."""
        self._write({"unit": unit})
        self.units[unit["setting"], unit["clip"]] = unit

    def refuse(self, setting: str, reason: str) -> None:
        """Keep why a setting cannot run."""
        if self.refused.get(setting) != reason:
            self._write({"refused": {"setting": setting, "reason": reason}})
            self.refused[setting] = reason

    def _write(self, line: Mapping[str, Any]) -> None:
        assert self._file is not None
        try:
            self._file.write(json.dumps(line, separators=(",", ":")).encode() + b"\n")
            self._file.flush()
        except OSError as error:
            raise BenchError(f"The journal {self.path} cannot be written ({error.strerror}); make room there.") from (
                error
            )

    def _read(self, header: Mapping[str, Any]) -> int:
        """Take over the units of an earlier run; how many bytes of the file are whole lines."""
        if self.path.stat().st_size > _LARGEST:
            raise BenchError(f"{self.path} is larger than any journal; choose another folder.")
        whole = 0
        with self.path.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                if not line.endswith(b"\n"):
                    # The run was killed in the middle of this line; its unit is measured again.
                    break
                try:
                    row = json.loads(line)
                except ValueError as error:
                    raise BenchError(f"{self.path}, line {number} is no JSON; delete the journal to start anew.") from (
                        error
                    )
                if number == 1:
                    self._check(row, header)
                elif "refused" in row:
                    self.refused[row["refused"]["setting"]] = row["refused"]["reason"]
                else:
                    unit = row["unit"]
                    self.units[unit["setting"], unit["clip"]] = unit
                whole += len(line)
        return whole

    def _check(self, row: Any, header: Mapping[str, Any]) -> None:
        if not isinstance(row, dict) or row.get("format") != _FORMAT or "configuration" not in row:
            raise BenchError(f"{self.path} is no journal of this version of the benchmark; choose another folder.")
        theirs, ours = row["configuration"], header["configuration"]
        for name in dict.fromkeys((*ours, *theirs)):
            if theirs.get(name) != ours.get(name):
                raise BenchError(
                    f"{self.path} belongs to a benchmark with another {name} ({_brief(theirs.get(name))} instead of "
                    f"{_brief(ours.get(name))}); use the same arguments or another folder."
                )


def _brief(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
