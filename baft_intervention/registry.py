"""Registration by name, for weighting networks, position rules, metrics, formats and methods."""

from __future__ import annotations

from collections.abc import Callable, MutableMapping
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
