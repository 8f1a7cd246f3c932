"""Names of methods: registration, lookup, and the one-line notation of the command line.

Notation: ``name``, ``name:option=value,option=value`` and ``first+second`` for a composition over stages.
"""

from __future__ import annotations

import dataclasses
import difflib
import fnmatch
import importlib
import json
import pkgutil
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from importlib.metadata import entry_points
from typing import Any, TypeVar

from tokensieve.core.method import Method
from tokensieve.errors import MethodError

ENTRY_POINT_GROUP = "tokensieve.methods"
MethodLike = str | Method | type[Method] | Sequence["str | Method"]

_METHODS: dict[str, type[Method]] = {}
M = TypeVar("M", bound=type[Method])


def register(cls: M) -> M:
    """Class decorator: makes a method known by its ``name`` (lower case, unique)."""
    if not re.fullmatch(r"[a-z0-9][a-z0-9-]*", cls.name):
        raise MethodError(f"The method name {cls.name!r} must be lower case letters, digits and dashes.")
    known = _METHODS.get(cls.name)
    if known is not None and known.__qualname__ != cls.__qualname__:
        raise MethodError(f"The method name {cls.name!r} is already taken by {known.__module__}.{known.__name__}.")
    _METHODS[cls.name] = cls
    return cls


@cache
def _load() -> None:
    """Import the built-in methods and those that other packages offer through the entry-point group."""
    package = importlib.import_module("tokensieve.methods")
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"tokensieve.methods.{module.name}")
    for entry in entry_points(group=ENTRY_POINT_GROUP):
        try:
            entry.load()
        except Exception as error:  # other people's code may fail in any way; the methods of this package still work
            owner = entry.dist.name if entry.dist is not None else entry.value
            warnings.warn(
                f"The methods of {owner} (entry point {entry.name} = {entry.value}) are left out, as they cannot be "
                f"imported: {type(error).__name__}: {error}",
                RuntimeWarning,
                stacklevel=2,
            )


def list_methods(pattern: str = "*") -> list[str]:
    """Names of all known methods that match a wildcard pattern, sorted."""
    _load()
    return sorted(fnmatch.filter(_METHODS, pattern))


def method_class(name: str) -> type[Method]:
    """The class of a method, or a MethodError with the nearest names."""
    _load()
    if name in _METHODS:
        return _METHODS[name]
    near = difflib.get_close_matches(name, _METHODS, n=3, cutoff=0.4)
    hint = f"did you mean {', '.join(near)}?" if near else f"known are {', '.join(sorted(_METHODS))}."
    raise MethodError(f"There is no method {name!r}; {hint}")


def build(name: str, options: Mapping[str, Any] | None = None) -> Method:
    """A method from its name and options; unknown options are a MethodError that lists the known ones."""
    cls = method_class(name)
    options = dict(options or {})
    known = option_names(cls)
    for option in options:
        if option not in known:
            raise MethodError(f"{name} has no option {option!r}; its options are {', '.join(sorted(known))}.")
    return cls(**options)


def parse(text: str, defaults: Mapping[str, Any] | None = None) -> list[Method]:
    """Methods from the one-line notation.

    Parameters
    ----------
    text
        ``name``, ``name:option=value,...`` or ``a+b``.
    defaults
        Options for every part that has them and does not set them itself; one that no part has is an error.
    """
    parts = [part.strip().partition(":")[::2] for part in text.split("+")]
    fields = [option_names(method_class(name.strip())) for name, _ in parts]
    for option in defaults or ():
        if not any(option in known for known in fields):
            listed = ", ".join(sorted(set().union(*fields)))
            raise MethodError(f"{text} has no option {option!r}; its options are {listed}.")
    methods = []
    for (name, tail), known in zip(parts, fields, strict=True):
        options = {key: value for key, value in (defaults or {}).items() if key in known}
        options |= dict(_option(pair) for pair in tail.split(",") if pair.strip())
        methods.append(build(name.strip(), options))
    return methods


def option_names(cls: type[Method]) -> set[str]:
    """Names of the options of a method."""
    return {field.name for field in dataclasses.fields(cls)}


def resolve(method: MethodLike, **options: Any) -> list[Method]:
    """A list of method objects from a name, an object, a class, or a sequence of these.

    Options (``retention`` among them) go to every part that is given by name and has them; objects keep their own.
    """
    if isinstance(method, str):
        return parse(method, options)
    if isinstance(method, Method):
        if options:
            method = dataclasses.replace(method, **_known_options(method, options))
        return [method]
    if isinstance(method, type) and issubclass(method, Method):
        return [method(**options)]
    if isinstance(method, Iterable):
        parts: list[Method] = []
        for part in method:
            parts.extend(resolve(part, **options) if isinstance(part, str) else [part])
        if parts:
            return parts
    raise MethodError(f"A method is a name, a Method object or a list of these, not {method!r}.")


def _known_options(method: Method, options: Mapping[str, Any]) -> dict[str, Any]:
    known = option_names(type(method))
    for option in options:
        if option not in known:
            raise MethodError(f"{method.name} has no option {option!r}; its options are {', '.join(sorted(known))}.")
    return dict(options)


def _option(pair: str) -> tuple[str, Any]:
    """``key=value`` with the value read as JSON where that is possible, as a plain word otherwise."""
    key, equals, value = pair.partition("=")
    if not equals:
        raise MethodError(f"Options are written name=value; {pair.strip()!r} has no '='.")
    word = value.strip()
    for read in (json.loads, float):
        try:
            return key.strip(), read(word)
        except ValueError:
            continue
    return key.strip(), {"True": True, "False": False, "None": None}.get(word, word)


def fitting_methods(host: Any, base: Any) -> list[str]:
    """Names of the methods whose signals a host can give, with default options; without those that need weights."""
    _load()
    facts = host.facts(base)
    fitting = []
    for name, cls in sorted(_METHODS.items()):
        if cls.needs_file:
            continue
        requests = cls().signals(facts)
        if all(host.availability(text.partition("@")[0], base) != "absent" for text in requests):
            fitting.append(name)
    return fitting
