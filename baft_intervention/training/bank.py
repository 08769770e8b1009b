"""The bank: representations of text that no edit is about.

A gate can only learn what to leave alone from examples of it. Where a user gives no texts, the model writes some for
itself from a few dozen common openings (seeded), so the bank needs no data set and looks at no benchmark. Of each
text the representation of its last token and of some tokens inside it are kept: the inside of a statement is what an
unfinished prompt looks like. Ours; the paper only says that unrelated knowledge enters a locality term.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..environment import cache_folder
from ..errors import ConfigError
from ..models.fingerprint import model_fingerprint
from ..models.structure import compute_device
from ..models.tokenization import pad_rows, pad_token_id
from ..runtime.distributed import from_main, is_main
from ..runtime.representations import read_blocks
from .relation_dictionary import RELATIONS, dictionary

logger = logging.getLogger(__name__)

_FORMAT = 4  # raise it where what is in a bank changes: cached ones are then made anew
OPENINGS = (
    "What is the", "Who was the", "Where is the", "When did the", "Which of the", "How many", "Why do", "How does a",
    "In what year was", "What is the name of", "Who wrote the", "Where was the", "What are the", "Is it true that",
    "The name of the", "The first", "In the year", "The city of", "The president of", "The author of", "The language",
    "The place of birth of", "The company", "A", "It is", "He was born in", "She is a", "They", "The most popular",
    "The river", "The occupation of", "According to", "One of the", "Many people", "I think that", "Once upon a time",
    "The sport", "The country", "My favourite", "The meaning of", "There is a", "The scientific name of", "Music",
    "During the war,", "The price of", "To make a", "Please", "The capital",
)  # fmt: skip
POSITIONS_PER_TEXT = 4  # the last token, and three inside


def write_texts(model: Any, tokenizer: Any, count: int, *, seed: int = 0, max_new_tokens: int = 16) -> list[str]:
    """``count`` short texts that ``model`` writes itself: sampled continuations of :data:`OPENINGS`. Same seed, same texts."""
    openings = [OPENINGS[i % len(OPENINGS)] for i in range(count)]
    device = compute_device(model)
    texts: list[str] = []
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        for begin in range(0, count, 64):
            rows = [list(tokenizer(text)["input_ids"]) for text in openings[begin : begin + 64]]
            ids, mask = pad_rows(rows, pad_token_id(tokenizer), side="left")
            with torch.no_grad():
                out = model.generate(
                    input_ids=ids.to(device), attention_mask=mask.to(device), do_sample=True, temperature=1.0, top_k=50,
                    top_p=1.0, max_new_tokens=max_new_tokens, pad_token_id=pad_token_id(tokenizer),
                )  # fmt: skip
            for text in tokenizer.batch_decode(out, skip_special_tokens=True):
                # keep the first line: a model often starts a new, unrelated one
                texts.append(next((line for line in text.splitlines() if line.strip()), text).strip() or OPENINGS[0])
    return texts


def unrelated_texts(
    model: Any, tokenizer: Any, texts: Sequence[str] | None, *, count: int = 16, seed: int = 0
) -> list[list[int]]:
    """At most ``count`` of a user's unrelated texts, or as many as the model writes, as ids of at most 64 tokens.

    Raises:
        ConfigError: none of the texts has a token.
    """
    texts = write_texts(model, tokenizer, count, seed=seed) if texts is None else texts
    rows = _encoded(tokenizer, texts[:count])
    if not rows:
        raise ConfigError(
            "the output loss needs unrelated texts, and bank_texts has none; leave them out to let the model write"
        )
    return rows


def representations(
    model: nn.Module, tokenizer: Any, texts: Sequence[str], layers: Sequence[int], *, seed: int = 0
) -> dict[int, Tensor]:
    """Block outputs of ``texts`` at their last and some inner tokens: ``layer -> (N, d)`` fp32 on the CPU.

    Args:
        texts: what to read; at least one.
        layers: 0-based block numbers.
        seed: of the choice of inner tokens.
    """
    rows = _encoded(tokenizer, texts)
    if not rows:
        raise ConfigError("a bank needs at least one text; leave the texts out to let the model write some")
    generator = torch.Generator().manual_seed(seed)
    columns = []
    for row in rows:
        inner = torch.randperm(max(len(row) - 2, 0), generator=generator)[: POSITIONS_PER_TEXT - 1] + 1
        columns.append(sorted({len(row) - 1, *inner.tolist()}))
    return {layer: torch.cat(parts) for layer, parts in read_blocks(model, tokenizer, rows, columns, layers).items()}


def relation_representations(model: nn.Module, tokenizer: Any, layers: Sequence[int]) -> dict[int, Tensor]:
    """Last-token block outputs of the relation dictionary's prompts, in its order: ``layer -> (N, d)`` fp32."""
    rows = [list(tokenizer(asked.text)["input_ids"]) for asked in dictionary()]
    found = read_blocks(model, tokenizer, rows, [[len(row) - 1] for row in rows], layers)
    return {layer: torch.cat(parts) for layer, parts in found.items()}


def start_representations(model: nn.Module, tokenizer: Any, layers: Sequence[int]) -> dict[int, Tensor]:
    """Block outputs at the first token of texts that begin with a common word: ``layer -> (K, d)`` fp32."""
    rows = [list(tokenizer(f"{noun.capitalize()} is")["input_ids"]) for noun, _, _ in RELATIONS]
    found = read_blocks(model, tokenizer, rows, [[0]] * len(rows), layers)
    return {layer: torch.cat(parts) for layer, parts in found.items()}


@dataclass(frozen=True)
class Bank:
    """What a model's gates learn from.

    Args:
        unrelated: ``layer -> (N, d)`` representations of unrelated text, N about ``POSITIONS_PER_TEXT`` a text.
        relations: ``layer -> (N, d)`` representations of the relation dictionary's prompts, where asked for.
        starts: ``layer -> (K, d)`` representations of common first words, at the same blocks as ``unrelated``.
    """

    unrelated: Mapping[int, Tensor] = field(default_factory=dict)
    relations: Mapping[int, Tensor] = field(default_factory=dict)
    starts: Mapping[int, Tensor] = field(default_factory=dict)


def get_bank(
    model: nn.Module,
    tokenizer: Any,
    layers: Sequence[int],
    *,
    size: int,
    relation_layers: Sequence[int] = (),
    texts: Sequence[str] | None = None,
    seed: int = 0,
    cache: bool = True,
) -> Bank:
    """The bank of a model, made once and kept in the cache folder under the model's fingerprint.

    Args:
        layers: blocks whose outputs on unrelated text are wanted.
        size: how many texts the model writes where ``texts`` is None.
        relation_layers: blocks whose outputs on common relations are wanted.
        texts: a user's own unrelated texts.
        cache: read and write the cache (``$BAFT_CACHE``, else the user's); a folder that cannot be written is no error.
    """
    what = {
        "format": _FORMAT,
        "model": model_fingerprint(model),
        "vocabulary": len(tokenizer),
        "texts": None if texts is None else _digest(list(texts)),
        "size": size if texts is None else len(texts),
        "seed": seed,
        "layers": sorted(layers),
        "relations": [sorted(relation_layers), _digest(dictionary())],
    }
    path = cache_folder() / "banks" / f"{_digest(what)[:24]}.safetensors"
    names = [f"{kind}.{layer}" for kind in ("unrelated", "starts") for layer in layers]
    names += [f"relations.{layer}" for layer in relation_layers]
    # of several processes all compute a bank, or none: where the model is sharded it takes all of them
    saved = from_main(lambda: _cached(path, names)) if cache else None
    if saved is not None:
        return Bank(
            {layer: saved[f"unrelated.{layer}"] for layer in layers},
            {layer: saved[f"relations.{layer}"] for layer in relation_layers},
            {layer: saved[f"starts.{layer}"] for layer in layers},
        )
    if texts is None:
        logger.info("the model writes %d unrelated texts for its bank (once a model)", size)
        texts = write_texts(model, tokenizer, size, seed=seed)
    bank = Bank(
        representations(model, tokenizer, texts, layers, seed=seed),
        relation_representations(model, tokenizer, relation_layers) if relation_layers else {},
        start_representations(model, tokenizer, layers),
    )
    bank = from_main(lambda: bank)  # the same bits for all
    if cache and is_main():
        tensors = {f"unrelated.{layer}": tensor for layer, tensor in bank.unrelated.items()}
        tensors.update({f"relations.{layer}": tensor for layer, tensor in bank.relations.items()})
        tensors.update({f"starts.{layer}": tensor for layer, tensor in bank.starts.items()})
        _store(path, {name: tensor.contiguous() for name, tensor in tensors.items()})
    return bank


def _encoded(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """The first 64 ids of each text that has any."""
    return [row for text in texts if (row := list(tokenizer(text)["input_ids"])[:64])]


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode("utf-8", "surrogatepass")).hexdigest()


def _cached(path: Path, names: Sequence[str]) -> dict[str, Tensor] | None:
    if not path.is_file():
        return None
    try:
        saved = load_file(path)
        return {name: saved[name] for name in names}
    except (OSError, SafetensorError, KeyError) as error:
        logger.warning("cached bank %s cannot be read (%s); it is made anew", path, error)
        return None


def _store(path: Path, tensors: dict[str, Tensor]) -> None:
    partial = path.with_suffix(f".{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, partial)
        os.replace(partial, path)
    except OSError as error:
        logger.warning("the bank cannot be kept in %s (%s); it will be made anew next time", path.parent, error)
        partial.unlink(missing_ok=True)
