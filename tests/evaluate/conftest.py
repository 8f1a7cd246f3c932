"""Where the annotation samples are, and a way to the tiny models."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
DATA = Path(os.environ.get("TOKENSIEVE_DATA_DIR") or REPOSITORY.parent / "shared" / "data")
sys.path.insert(0, str(REPOSITORY / "tests" / "models"))


@pytest.fixture(scope="session")
def samples() -> Path:
    """Folder of the annotation samples."""
    folder = DATA / "annotations"
    if not folder.is_dir():
        pytest.skip(f"the annotation samples are not at {folder}; set TOKENSIEVE_DATA_DIR")
    return folder
