"""Make the environment of the lmms-eval tests: ``python tests/bridges/lmms_environment.py [FOLDER]``.

lmms-eval pins versions that the project does not share, so it gets an environment of its own (``.venv-lmms``
unless named). What the running interpreter has is visible there and only what is missing or pinned otherwise is
installed, which saves a second copy of torch.
"""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
FOLDER = REPOSITORY / ".venv-lmms"
# lmms-eval 0.7.3 reaches into a module of filelock that its fourth version no longer has.
REQUIREMENTS = ("lmms-eval>=0.7.3,<0.8", "filelock<4")


def main() -> None:
    """Make the environment, or bring it up to date."""
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER
    venv.create(folder, with_pip=False, clear=False)
    python = folder / ("Scripts" if sys.platform == "win32" else "bin") / "python"
    query = "import sysconfig; print(sysconfig.get_path('purelib'))"
    packages = Path(subprocess.run([python, "-c", query], check=True, capture_output=True, text=True).stdout.strip())
    # Read after the environment's own packages, which therefore win.
    (packages / "zz_shared.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    install = [python, "-m", "pip", "install", "--quiet"]
    subprocess.run([*install, *REQUIREMENTS], check=True)
    # lmms-eval asks for PyAV below 16, whose stream flags the reader cannot take; the project's own serves both.
    subprocess.run([python, "-m", "pip", "uninstall", "--quiet", "--yes", "av"], check=True)
    # The entry point is found through the project's own metadata.
    subprocess.run([*install, "--no-deps", "--no-build-isolation", "--editable", REPOSITORY], check=True)


if __name__ == "__main__":
    main()
