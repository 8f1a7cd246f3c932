"""The record of a run that can be killed at any time: one line per clip, written by one process."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from tokensieve.bridges.ray_batch.items import Item
from tokensieve.errors import TokensieveError

try:
    import fcntl
except ImportError:  # pragma: no cover - Windows has no advisory locks of this kind
    fcntl = None  # type: ignore[assignment]

__all__ = ["Journal"]

_VERSION = 1
_SYNC_SECONDS = 1.0


class Journal:
    """Results of a run so far, appended line by line; a line that a crash cut off is dropped on opening.

    Parameters
    ----------
    path : Path
        The file; made when missing.
    settings : mapping
        What decides the answers. A journal of other settings is refused.

    Attributes
    ----------
    records : dict
        The last record of every id.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        self.path = path
        self.records: dict[str, dict[str, Any]] = {}
        self._synced = time.monotonic()
        try:
            self._file: BinaryIO = path.open("a+b")
        except OSError as error:
            raise TokensieveError(f"{path} cannot be written ({error.strerror}); choose another -o.") from error
        try:
            self._lock()
            self._load(json.loads(json.dumps(dict(settings))))
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Write everything to the disk and give up the lock."""
        if not self._file.closed:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()

    def append(self, record: Mapping[str, Any]) -> bool:
        """Add the record of a clip; one that is already there successfully is kept, and False returned."""
        identity = record["id"]
        if self.records.get(identity, {}).get("status") == "ok":
            return False
        self.records[identity] = dict(record)
        self._write(record)
        return True

    def open_items(self, items: Iterable[Item], retry_failed: bool = False) -> list[Item]:
        """Items without a record that belongs to them."""
        return [item for item in items if not self._is_done(item, retry_failed)]

    def results(self, items: Iterable[Item]) -> Iterator[dict[str, Any]]:
        """Records of items, in the order of the items."""
        for item in items:
            record = self.records.get(item.id)
            if record is not None and _matches(record, item):
                yield record

    def _is_done(self, item: Item, retry_failed: bool) -> bool:
        record = self.records.get(item.id)
        if record is None:
            return False
        if not _matches(record, item):
            # Another clip or question now goes by this id.
            del self.records[item.id]
            return False
        return record["status"] == "ok" or not retry_failed

    def _lock(self) -> None:
        if fcntl is None:
            return
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise TokensieveError(
                f"Another run is writing {self.path}; wait for its end or choose another -o."
            ) from error

    def _load(self, settings: dict[str, Any]) -> None:
        self._file.seek(0)
        data = self._file.read()
        whole = data[: data.rfind(b"\n") + 1]
        if len(whole) != len(data):
            self._file.truncate(len(whole))
        lines = whole.splitlines()
        if not lines:
            self._write({"tokensieve_batch": _VERSION, "settings": settings})
            return
        try:
            header, *records = [json.loads(line) for line in lines]
            version, before = header["tokensieve_batch"], header["settings"]
            self.records = {record["id"]: record for record in records if record["status"] in ("ok", "failed")}
        except (ValueError, KeyError, TypeError) as error:
            raise TokensieveError(
                f"{self.path} is no journal of a batch run; choose another -o or remove it."
            ) from error
        if version != _VERSION:
            raise TokensieveError(f"{self.path} was written by another version; begin anew with --restart.")
        changed = sorted(key for key in settings.keys() | before.keys() if settings.get(key) != before.get(key))
        if changed:
            raise TokensieveError(
                f"{self.path} belongs to a run with another {', '.join(changed)}; choose another -o, or begin anew "
                "with --restart."
            )

    def _write(self, record: Mapping[str, Any]) -> None:
        self._file.write(
            json.dumps(record, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace") + b"\n"
        )
        self._file.flush()
        if time.monotonic() - self._synced > _SYNC_SECONDS:
            os.fsync(self._file.fileno())
            self._synced = time.monotonic()


def _matches(record: Mapping[str, Any], item: Item) -> bool:
    """Whether a record answers an item."""
    wanted = item.to_dict()
    return all(record.get(key) == value for key, value in wanted.items())
