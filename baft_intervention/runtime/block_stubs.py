"""Calling a model without running all of its blocks: stubs in their place, and hooks that end a call early."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from ..errors import BaftError


class CannotSkip(BaftError):
    """A shortcut does not hold for this model; the message says which one and why."""


class StopForward(Exception):
    """Ends a call of the model inside :func:`stubbed_blocks` or :func:`watched_blocks`."""


@contextlib.contextmanager
def stubbed_blocks(
    blocks: nn.ModuleList, replies: Mapping[int, Callable[..., Any]], *, run_hooks: bool = False
) -> Iterator[None]:
    """Inside, ``blocks[n]`` is not run: calling it returns ``replies[n](*args, **kwargs)``.

    Args:
        blocks: the model's decoder blocks.
        replies: ``block number -> function``; one that raises :class:`StopForward` ends the model's call quietly.
        run_hooks: whether the stubbed blocks' own hooks see these outputs.
    """
    # a module calls _compiled_call_impl in place of its hooks and its forward where this is set
    attribute = "forward" if run_hooks else "_compiled_call_impl"
    saved = {n: blocks[n].__dict__.get(attribute) for n in replies}  # compiled and offloaded blocks have their own
    try:
        for n, reply in replies.items():
            blocks[n].__dict__[attribute] = reply
        with contextlib.suppress(StopForward):
            yield
    finally:
        for n, own in saved.items():
            del blocks[n].__dict__[attribute]
            if own is not None:
                blocks[n].__dict__[attribute] = own


@contextlib.contextmanager
def skipped_blocks(
    blocks: nn.ModuleList, last: int, hidden: Tensor, extras: int | None, *, run_hooks: bool = False
) -> Iterator[None]:
    """Inside, the model computes as if block ``last`` gave ``hidden (B, T, d)``; no block up to it is run.

    Args:
        blocks, run_hooks: see :func:`stubbed_blocks`.
        last: the last block that is skipped.
        hidden: its output.
        extras: see :func:`as_output`.
    """
    output = as_output(hidden, extras)
    with stubbed_blocks(blocks, dict.fromkeys(range(last + 1), lambda *_, **__: output), run_hooks=run_hooks):
        yield


@contextlib.contextmanager
def watched_blocks(blocks: nn.ModuleList, hooks: Mapping[int, Callable[[Any], Any]]) -> Iterator[None]:
    """Inside, ``hooks[n](output)`` sees the output of block n, a tensor or a tuple, and may return another one.

    A hook that raises :class:`StopForward` ends the model's call quietly.
    """

    def on_output(hook: Callable[[Any], Any]) -> Callable[..., Any]:
        return lambda _module, _args, output: hook(output)

    handles = [blocks[n].register_forward_hook(on_output(hook)) for n, hook in hooks.items()]
    try:
        with contextlib.suppress(StopForward):
            yield
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def hooked_blocks(blocks: nn.ModuleList, changes: Mapping[int, Callable[[Tensor], Tensor | None]]) -> Iterator[None]:
    """As :func:`watched_blocks`, for functions of the hidden states ``(B, T, d)`` in the blocks' outputs."""

    def on_hidden(change: Callable[[Tensor], Tensor | None]) -> Callable[[Any], Any]:
        def hook(output: Any) -> Any:
            changed = change(leading(output))
            return (changed, *output[1:]) if changed is not None and isinstance(output, tuple) else changed

        return hook

    with watched_blocks(blocks, {n: on_hidden(change) for n, change in changes.items()}):
        yield


def as_output(hidden: Tensor, extras: int | None) -> Any:
    """``hidden`` in the form of a block's output: bare where ``extras`` is None, else a tuple with so many more entries."""
    return hidden if extras is None else (hidden, *[None] * extras)


def leading(output: Any) -> Tensor:
    """The hidden states in a block's output."""
    return output[0] if isinstance(output, tuple) else output


def foreign_hook(model: nn.Module, blocks: nn.ModuleList, lowest: int) -> str | None:
    """The name of a module above block ``lowest`` with a hook that is neither this library's nor transformers'.

    Hooks at or below ``lowest`` do not matter: their effect is in the cached output.
    """
    below = {id(m) for n in range(lowest + 1) for m in blocks[n].modules()}
    for name, module in model.named_modules():
        if id(module) in below:
            continue
        for kind in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"):
            for hook in getattr(module, kind, {}).values():
                owner = (getattr(hook, "__module__", None) or "").split(".")[0]
                if owner not in ("baft_intervention", "transformers"):
                    return name or type(model).__name__
    return None
