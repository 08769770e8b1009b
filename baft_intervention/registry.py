"""Registration by name, for weighting networks, position rules, metrics, formats and methods."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, MutableMapping
from typing import Any, TypeVar

from .errors import ConfigError

_Item = TypeVar("_Item", bound=Callable[..., Any])


def registrar(registry: MutableMapping[str, Any], name: str, what: str) -> Callable[[_Item], _Item]:
    """A decorator that puts a class or function into ``registry`` under ``name``; registering the same one again is allowed.

    Args:
        registry: name -> class or function.
        name: of the entry.
        what: kind of entry, for the message.

    Raises:
        ConfigError: (the decorator) the name is taken by another.
    """

    def register(item: _Item) -> _Item:
        taken = registry.get(name)
        if taken is not None and taken.__qualname__ != item.__qualname__:
            raise ConfigError(f"the {what} {name!r} is taken by {taken.__qualname__}; choose another name")
        registry[name] = item
        return item

    return register


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The end of an error message that suggests the nearest known name; empty if none is near."""
    near = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {near[0]!r}?" if near else ""
