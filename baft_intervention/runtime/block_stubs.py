"""Stand-ins for blocks: calling a model without running (all of) its blocks."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from ..errors import BaftError


class Unsafe(BaftError):
    """A shortcut does not hold for this model; the message says which and why."""


class Stop(Exception):
    """Ends a call of the model whose rest is not needed."""


class _BlockStub(nn.Module):
    """Takes a block's place in the model's list; attributes that the model reads of a block are the block's own."""

    def __init__(self, block: nn.Module, answer: Callable[[tuple, dict], Any]):
        super().__init__()
        self.__dict__["_block"], self.__dict__["_answer"] = block, answer

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_block"], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.__dict__["_answer"](args, kwargs)


@contextlib.contextmanager
def stubbed_blocks(blocks: nn.ModuleList, answers: Mapping[int, Callable[[tuple, dict], Any]]) -> Iterator[None]:
    """Inside, ``blocks[n]`` is not run, hooks included: ``answers[n](args, kwargs)`` is what it gives."""
    originals = {n: blocks[n] for n in answers}
    try:
        for n, answer in answers.items():
            blocks._modules[str(n)] = _BlockStub(originals[n], answer)
        yield
    finally:
        for n, block in originals.items():
            blocks._modules[str(n)] = block


def as_output(hidden: Tensor, extras: int | None) -> Any:
    """A block's output as the model expects it: bare (None), or led by ``hidden`` in a tuple with so many more."""
    return hidden if extras is None else (hidden, *[None] * extras)


def leading(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def foreign_hooks(model: nn.Module, blocks: nn.ModuleList, lowest: int) -> str | None:
    """Name of a module above block ``lowest`` that carries someone's hook; hooks of ours and of transformers do not count.

    What hooks at or below ``lowest`` do is in the cached output.
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
