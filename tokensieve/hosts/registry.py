"""Names of hosts and the choice of the host for a model."""

from __future__ import annotations

import fnmatch
import importlib
import pkgutil
from functools import cache
from typing import Any, TypeVar

from torch import nn

from tokensieve.errors import HostError
from tokensieve.hosts.base import Host

_HOSTS: dict[str, type[Host]] = {}
H = TypeVar("H", bound=type[Host])
_NOT_HOSTS = {"base", "registry", "towers", "tiny"}


def register(cls: H) -> H:
    """Class decorator: makes a host known by its slug."""
    _HOSTS[cls.slug] = cls
    return cls


@cache
def _load() -> None:
    package = importlib.import_module("tokensieve.hosts")
    for module in pkgutil.iter_modules(package.__path__):
        if module.name not in _NOT_HOSTS:
            importlib.import_module(f"tokensieve.hosts.{module.name}")


def list_hosts(pattern: str = "*") -> list[str]:
    """Slugs of all model families that match a wildcard pattern, sorted."""
    _load()
    return sorted(fnmatch.filter(_HOSTS, pattern))


def host_class(slug: str) -> type[Host]:
    """The class of a host, or a HostError with the known slugs."""
    _load()
    if slug not in _HOSTS:
        raise HostError(f"There is no host {slug!r}; known are {', '.join(sorted(_HOSTS))}.")
    return _HOSTS[slug]


def host_for(model: Any) -> Host:
    """The host of a model, chosen by ``config.model_type``.

    Raises
    ------
    HostError
        When the object is no model or its family is not supported.
    """
    _load()
    if not isinstance(model, nn.Module) or not hasattr(model, "config"):
        raise HostError(f"Expected a Hugging Face model, got {type(model).__name__}.")
    return host_for_type(getattr(model.config, "model_type", "unknown"))


def host_for_type(model_type: str) -> Host:
    """The host of a ``model_type``, or a HostError with the supported ones."""
    _load()
    for cls in _HOSTS.values():
        if model_type in cls.model_types:
            return cls()
    known = sorted(kind for cls in _HOSTS.values() for kind in cls.model_types)
    raise HostError(
        f"A model of type {model_type!r} is not a supported video or image LLM; supported are {', '.join(known)}."
    )
