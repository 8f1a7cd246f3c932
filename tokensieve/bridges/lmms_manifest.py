"""What lmms-eval is told through its entry-point group ``lmms_eval.models``."""

from __future__ import annotations

import importlib
from typing import Any

__all__ = ["manifest"]


def manifest() -> Any:
    """The entry ``--model tokensieve``; apart from the model, which lmms-eval imports only when it is asked for."""
    registry = importlib.import_module("lmms_eval.models.registry_v2")
    return registry.ModelManifest(model_id="tokensieve", chat_class_path="tokensieve.bridges.lmms_eval.TokensieveModel")
