"""One way to make a name known: weighting networks, position rules and metrics are registered with it."""

from __future__ import annotations

from collections.abc import Callable, MutableMapping
from typing import Any, TypeVar

from .errors import ConfigError

_Item = TypeVar("_Item", bound=Callable[..., Any])


def registrar(registry: MutableMapping[str, Any], name: str, what: str) -> Callable[[_Item], _Item]:
    """A decorator that puts a class or function into ``registry`` under ``name``; the same one may come again.

    Args:
        registry: name -> class or function.
        name: the name it is known by.
        what: what is registered, for the message.

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
