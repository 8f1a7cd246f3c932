"""Methods of other packages, found through their entry points, as docs/adding-a-method.md tells users to write them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "adding-a-method.md").read_text(encoding="utf-8")
USE = """
import tokensieve, torch
from tokensieve.hosts import tiny

assert tokensieve.list_methods("bright*") == ["brightest"], tokensieve.list_methods("bright*")
model, processor = tiny.build_in_memory("llava_onevision")
inputs = tiny.example_inputs("llava_onevision", processor)
for spec, entered, last in (
    ("brightest", 25, 25),
    ("brightest:power=1", 25, 25),
    ("brightest+fastv:retention=0.4", 25, 10),
):
    with torch.no_grad(), tokensieve.compress(model, spec, retention=0.25) as run:
        model.generate(**inputs, max_new_tokens=2)
    counts = run.report.patches
    assert (counts.uncompressed, counts.entered, counts.last) == (100, entered, last), counts
with tokensieve.compress(model, "brightest", retention=0.25, budget="vidcom2") as run:
    model.generate(**inputs, max_new_tokens=2)
assert any(item.notation == "brightest+fastv" and item.allowed for item in tokensieve.list_compositions())
print("used")
"""


def example(name: str) -> str:
    """A file that the page shows."""
    found = re.search(rf"<!-- example: {re.escape(name)} -->\n```\w+\n(.*?)```", PAGE, re.S)
    assert found is not None, name
    return found.group(1)


def install(folder: Path, module: str, text: str) -> None:
    """What pip leaves of the package in a folder of the path."""
    (folder / f"{module}.py").write_text(text, encoding="utf-8")
    group = re.search(r"\[project\.entry-points\.\"([\w.]+)\"\]\n(\w+) = \"(\w+)\"", example("pyproject.toml"))
    assert group is not None
    facts = folder / f"{module}-0.1.dist-info"
    facts.mkdir()
    name = module.replace("_", "-")
    (facts / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 0.1\n", encoding="utf-8")
    (facts / "entry_points.txt").write_text(f"[{group[1]}]\n{group[2]} = {module}\n", encoding="utf-8")


def python(folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    """A fresh process with the folder on its path."""
    path = os.pathsep.join([str(folder), str(ROOT)])
    return subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": path}
    )


def test_the_example_of_the_page_is_found_and_used(tmp_path: Path) -> None:
    """By name, with options, composed, and under a frame budget."""
    install(tmp_path, "brightest_tokens", example("brightest_tokens.py"))
    used = python(tmp_path, "-c", USE)
    assert used.returncode == 0, used.stderr
    assert used.stdout.split() == ["used"]
    listed = python(tmp_path, "-m", "tokensieve.cli", "list", "methods", "bright*")
    assert listed.returncode == 0, listed.stderr
    assert "brightest" in listed.stdout and "inferred" in listed.stdout


def test_a_package_that_cannot_be_imported_is_named_and_left_out(tmp_path: Path) -> None:
    """The methods of this package still work."""
    install(tmp_path, "broken_tokens", "import no_such_module_at_all\n")
    listed = python(tmp_path, "-c", "import tokensieve; print(len(tokensieve.list_methods()))")
    assert listed.returncode == 0, listed.stderr
    assert int(listed.stdout) > 30
    assert "broken-tokens" in listed.stderr and "no_such_module_at_all" in listed.stderr
