"""The bank: representations of text that no edit is about.

A gate can only learn what to leave alone from examples of it. The package ships 256 short unrelated texts; a user may give
others. The shipped ones (``unrelated_texts.txt``) were sampled once from SmolLM2-135M-Instruct, as continuations of a few
dozen common openings, and are the same for every model: questions, statements and, mostly, sentences that break off. No
benchmark's record is among them. The bank keeps the representation of each text's last token and of up to three tokens inside
it: the inside of a statement is what an unfinished prompt looks like. Ours; the paper only says that unrelated knowledge
enters a locality term.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..environment import cache_folder
from ..errors import ConfigError
from ..models.fingerprint import model_fingerprint
from ..progress import progress_bar
from ..runtime.distributed import from_main, is_main
from ..runtime.representations import read_blocks
from .tensor_cache import digest, load_tensors, store_tensors

TEXTS = Path(__file__).with_name("unrelated_texts.txt")
POSITIONS_PER_TEXT = 4  # the last token, and three inside
_FORMAT = 7  # raise it when the content of a bank changes: cached banks are then computed again
_FRAMEWORKS = ("torch", "transformers", "accelerate")
_MAX_TOKENS = 64  # of a text; the rest is not read


def shipped_texts() -> tuple[str, ...]:
    """The package's 256 unrelated texts."""
    return tuple(TEXTS.read_text(encoding="utf-8").splitlines())


def encode_texts(tokenizer: Any, texts: Sequence[str] | None = None) -> list[list[int]]:
    """Token ids of unrelated texts, at most 64 a text.

    Args:
        texts: a user's own; None for the shipped ones. Texts without a token are left out.

    Raises:
        ConfigError: no text has a token.
    """
    texts = shipped_texts() if texts is None else texts
    rows = [row for text in texts if (row := list(tokenizer(text)["input_ids"])[:_MAX_TOKENS])]
    if not rows:
        raise ConfigError("bank_texts has no text with a token; give some, or leave it out to use the shipped texts")
    return rows


@dataclass(frozen=True)
class Bank:
    """What a model's gates learn from; every tensor is fp32 on the CPU.

    Args:
        unrelated: ``layer -> (N, d)`` representations of unrelated text, N about ``POSITIONS_PER_TEXT`` a text.
    """

    unrelated: Mapping[int, Tensor] = field(default_factory=dict)


def get_bank(
    model: nn.Module,
    tokenizer: Any,
    layers: Sequence[int],
    *,
    texts: Sequence[str] | None = None,
    cache: bool = True,
) -> Bank:
    """The bank of a base model, computed once and cached under the model's fingerprint.

    The model is read in eval mode and without hooks, so edits that act on it (of any editor) do not enter the bank.

    Args:
        layers: 0-based blocks whose outputs on unrelated text are wanted.
        texts: unrelated texts of your own; None for the shipped ones.
        cache: read and write ``banks`` in :func:`~baft_intervention.environment.cache_folder`. A folder that cannot
            be written is logged, and the bank is computed again next time.

    Raises:
        ConfigError: no text has a token.
    """
    what = {
        "format": _FORMAT,
        "model": model_fingerprint(model),
        "vocabulary": len(tokenizer),
        "texts": digest(list(shipped_texts() if texts is None else texts)),
        "layers": sorted(layers),
    }
    path = cache_folder() / "banks" / f"{digest(what)[:24]}.safetensors"
    # all processes compute the bank or none does: a sharded model needs every one of them
    names = {f"unrelated.{layer}": layer for layer in layers}
    saved = from_main(lambda: load_tensors(path, names)) if cache else None
    if saved is not None:
        return Bank({layer: saved[name] for name, layer in names.items()})
    with without_hooks(model):
        own = _read(model, tokenizer, encode_texts(tokenizer, texts), layers)
    bank = from_main(lambda: own)  # the same bits for all
    if cache and is_main():
        store_tensors(path, {name: bank.unrelated[layer] for name, layer in names.items()})
    return bank


def _read(model: nn.Module, tokenizer: Any, texts: Sequence[Sequence[int]], layers: Sequence[int]) -> Bank:
    generator = torch.Generator().manual_seed(0)
    columns = []
    for row in texts:
        inner = torch.randperm(max(len(row) - 2, 0), generator=generator)[: POSITIONS_PER_TEXT - 1] + 1
        columns.append(sorted({len(row) - 1, *inner.tolist()}))
    with progress_bar(len(texts), "reading unrelated texts", "text") as bar:
        found = read_blocks(model, tokenizer, texts, columns, layers, done=bar.update)
    return Bank({layer: torch.cat(states) for layer, states in found.items()})


@contextlib.contextmanager
def without_hooks(model: nn.Module) -> Iterator[None]:
    """Inside, no forward hook acts, whoever registered it, but those of the frameworks, which shard a model, stay."""
    kept = []
    for module in model.modules():
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            kept.append((hooks, dict(hooks)))
            for key, hook in kept[-1][1].items():
                owner = getattr(hook.func if isinstance(hook, functools.partial) else hook, "__module__", None) or ""
                if owner.partition(".")[0] not in _FRAMEWORKS:
                    del hooks[key]
    try:
        yield
    finally:
        for hooks, before in kept:
            hooks.clear()
            hooks.update(before)
