"""Where the models that ship with the package lie."""

from __future__ import annotations

from pathlib import Path

from tokensieve.errors import HostError

WEIGHTS = Path(__file__).parent / "weights"

NAMES: tuple[str, ...] = ("clip-pair", "video-llm")


def bundled(name: str = "video-llm") -> Path:
    """Folder of a bundled model, for ``from_pretrained``.

    Parameters
    ----------
    name
        ``"clip-pair"`` (a ``CLIPModel``) or ``"video-llm"`` (a ``LlavaOnevisionForConditionalGeneration`` on its image
        tower).

    Raises
    ------
    HostError
        If there is no such model, or this copy of the package was made without weights.
    """
    if name not in NAMES:
        raise HostError(f"There is no bundled model {name!r}; there are {', '.join(NAMES)}.")
    folder = WEIGHTS / name
    if not (folder / "model.safetensors").exists():
        raise HostError(f"The weights of {name} are missing in {folder}; install the package again or train them.")
    return folder
