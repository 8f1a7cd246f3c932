"""Writing a file in one step: it is complete, or it is not there."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tokensieve.errors import TokensieveError

__all__ = ["atomic"]


@contextmanager
def atomic(path: str | Path) -> Iterator[Path]:
    """A temporary sibling to write to, which takes the place of ``path`` when the block ends well.

    Whatever ends the block otherwise, an interrupt included, removes the temporary file and leaves ``path``
    as it was.

    Parameters
    ----------
    path : str or Path
        The file to be.

    Yields
    ------
    Path
        An empty file beside it, with the same suffix.

    Raises
    ------
    TokensieveError
        If the file cannot be written: no such folder, no permission, no room, or ``path`` is a folder.
    """
    target = Path(path)
    if target.is_dir():
        raise TokensieveError(f"{target} is a folder; give the name of a file in it.")
    temporary = target.parent / f".tokensieve-{secrets.token_hex(6)}{target.suffix}"
    try:
        temporary.open("xb").close()
        yield temporary
        temporary.replace(target)
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise TokensieveError(f"{target} cannot be written ({reason}); choose another place.") from error
    finally:
        temporary.unlink(missing_ok=True)
