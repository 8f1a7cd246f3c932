"""Golden tests: one test per ``.npz`` file of a system, whatever the file is called.

A test module names its system in the module constant ``SYSTEM`` and takes the fixture ``golden``, the arrays
of one file. Files are read from ``<directory>/<system>/``; the directory is the environment variable
``TOKENSIEVE_GOLDEN_DIR``, or the project's own copy. A system without files fails, so that no check is lost; only
a directory that somebody names may leave whole systems out, and the skip says so.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

GOLDEN_DIR = Path(os.environ.get("TOKENSIEVE_GOLDEN_DIR") or Path(__file__).parent / "data")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Give every test that takes ``golden_path`` one run per file of its module's system."""
    if "golden_path" not in metafunc.fixturenames:
        return
    system = metafunc.module.SYSTEM
    folder = GOLDEN_DIR / system
    paths = sorted(folder.glob("*.npz")) if folder.is_dir() else []
    if paths:
        metafunc.parametrize("golden_path", paths, ids=[path.stem for path in paths])
    else:
        metafunc.parametrize("golden_path", [folder], ids=[f"no_file_for_{system}"])


def pytest_runtest_call(item: pytest.Item) -> None:
    """Fail the one run that stands for a system without files."""
    path = getattr(item, "callspec", None) and item.callspec.params.get("golden_path")
    if path is not None and not path.is_file():
        if "TOKENSIEVE_GOLDEN_DIR" in os.environ and not path.is_dir():
            pytest.skip(f"{GOLDEN_DIR} holds no cases of {path.name}")
        pytest.fail(
            f"there is no golden file (.npz) in {path}; set TOKENSIEVE_GOLDEN_DIR to a folder that holds one "
            "sub-folder per system.",
            pytrace=False,
        )


@pytest.fixture
def golden(golden_path: Path) -> dict[str, np.ndarray]:
    """Arrays of one golden file by name (scalars have no axes); empty where the test is about to fail."""
    if not golden_path.is_file():
        return {}
    with np.load(golden_path, allow_pickle=False) as archive:
        return {name: archive[name] for name in archive.files}
