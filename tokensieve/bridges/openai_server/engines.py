"""Which engine runs the model of a server."""

from __future__ import annotations

from typing import Any, Literal

from tokensieve.bridges.openai_server.settings import ServerSettings
from tokensieve.bridges.vllm.arguments import KNOWN_VERSIONS, engine_version, is_known
from tokensieve.bridges.vllm.choice import PREFIX, read_choice, retention_of
from tokensieve.bridges.vllm.families import checked, family_of
from tokensieve.errors import TokensieveError

__all__ = ["ENGINES", "Engine", "why_not_vllm"]

Engine = Literal["vllm", "transformers"]
ENGINES = ("auto", "vllm", "transformers")


def why_not_vllm(settings: ServerSettings, config: Any, device: str, attn: str | None) -> str | None:
    """Why a server cannot run on vLLM, as a sentence; None when it can.

    Parameters
    ----------
    settings : ServerSettings
        What the server offers. vLLM prunes by one method at one retention.
    config : PreTrainedConfig
        Of the model.
    device, attn
        What the user asked for; the engine chooses both itself.
    """
    number = engine_version()
    if number is None:
        return "vLLM is not installed."
    if not is_known(number):
        return f"tokensieve knows vLLM {', '.join(KNOWN_VERSIONS)}, and version {number} is installed."
    if device != "auto" or attn is not None:
        return "vLLM chooses the device and the attention kernel itself."
    if len(settings.methods) > 1 or settings.highest_retention != settings.retention:
        return "vLLM prunes by one method at one retention, and requests may choose others here."
    if settings.method == "none" or settings.retention == 1.0:
        return None
    try:
        choice = read_choice(PREFIX + settings.method, retention_of(settings.retention))
        checked(choice.method, family_of((config.architectures or ["a model without a name"])[0]))
    except TokensieveError as error:
        return str(error)
    return None
