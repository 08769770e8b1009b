"""Forward passes that compute only what scoring needs, on any decoder-only model.

* :class:`LogitReader`: logits at chosen positions. The output head is the largest matrix of a small model. A hook picks
  the wanted hidden states *before* it, so whatever the model does after the head (Gemma 2's soft cap, Cohere's scale)
  still happens. The first use checks the result against the full logits; where the two differ, full logits are used.
* :func:`capture_block_input` and :func:`resume_at`: the blocks below an edit compute the same for every edited model.
  They run once and are skipped afterwards.
* :func:`decode_tokens`: batched decoding with a KV cache, which can begin behind a known continuation.

Only :func:`decode_tokens` knows about edits: it takes the context manager in which the prompt is read.
"""

from __future__ import annotations

import contextlib
import logging
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..models.structure import compute_device, find_blocks
from ..models.tokenization import pad_rows
from ..runtime.block_stubs import StopForward, leading, skipped_blocks, watched_blocks

logger = logging.getLogger(__name__)

_TOLERANCE = 1e-4  # relative to the largest logit; the two results differ by the shapes of the products only
TOP_K = 5  # as ROME's generate_fast


# the result of the check at a model's first use, so that it runs once a model and not once an edit
_CHECKED: weakref.WeakKeyDictionary[nn.Module, bool] = weakref.WeakKeyDictionary()


class LogitReader:
    """Reads logits at ``(row, column)`` positions of a batch, and the hidden states that the head takes there.

    Args:
        model: a causal language model of transformers.

    Attributes:
        selective: ``True`` where only the chosen positions go through the head, ``False`` where full logits are
            used, ``None`` before the first use.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    @property
    def selective(self) -> bool | None:
        return _CHECKED.get(self.model)

    @selective.setter
    def selective(self, value: bool) -> None:
        _CHECKED[self.model] = value

    def __call__(
        self,
        ids: torch.Tensor,
        mask: torch.Tensor,
        rows: torch.Tensor,
        columns: torch.Tensor,
        *,
        extra: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None, Any]:
        """One forward pass.

        Args:
            ids, mask: ``(B, T)``.
            rows, columns: ``(N,)``, the wanted positions.
            extra: further hidden states ``(M, d)`` for the head (kept from the unedited model).
            kwargs: further arguments of the model (``use_cache``, ``past_key_values``, ``position_ids``).

        Returns:
            logits ``(N + M, V)``; the hidden states before the head ``(N, d)``, ``None`` after a fallback;
            the model's own output.
        """
        kwargs.setdefault("use_cache", False)
        if self.selective is None:
            self.selective = self._agrees(ids, mask, rows, columns, kwargs)
        if not self.selective:
            if extra is not None:
                raise RuntimeError("this model's head cannot be read alone; keep log-probabilities, not hidden states")
            output = self.model(input_ids=ids, attention_mask=mask, **kwargs)
            return output.logits[rows, columns], None, output
        return self._read(ids, mask, rows, columns, extra, kwargs)

    def _read(self, ids, mask, rows, columns, extra, kwargs):
        head = self.model.get_output_embeddings()  # pyright: ignore[reportCallIssue]
        picked: list[torch.Tensor] = []

        def pick(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            device = args[0].device  # the head's, where the model is spread over several
            picked.append(args[0][rows.to(device), columns.to(device)])  # (N, d)
            wanted = picked[0] if extra is None else torch.cat([picked[0], extra.to(picked[0])])
            return (wanted.unsqueeze(0), *args[1:])

        handle = head.register_forward_pre_hook(pick)
        try:
            output = self.model(input_ids=ids, attention_mask=mask, **kwargs)
        finally:
            handle.remove()
        return output.logits[0], picked[0], output

    def _agrees(self, ids, mask, rows, columns, kwargs) -> bool:
        """Whether both give the same logits on the first batch (without its cache)."""
        plain = {k: v for k, v in kwargs.items() if k not in ("past_key_values", "use_cache")}
        n = min(len(rows), 8)
        with torch.no_grad():
            try:
                few, *_ = self._read(ids, mask, rows[:n], columns[:n], None, {**plain, "use_cache": False})
            except (AttributeError, TypeError, IndexError, RuntimeError) as error:
                logger.warning("logits at chosen positions do not work here (%s); full logits are used", error)
                return False
            full = self.model(input_ids=ids, attention_mask=mask, **plain, use_cache=False).logits[
                rows[:n], columns[:n]
            ]
        if few.shape == full.shape and bool((few - full).abs().max() <= _TOLERANCE * full.abs().max().clamp_min(1.0)):
            return True
        logger.warning("logits at chosen positions differ from the full ones; full logits are used")
        return False


# --- skipping blocks ------------------------------------------------------------------------------------------------


@dataclass
class BlockInput:
    """The input ``hidden (B, T, d)`` of block ``layer`` for a padded batch; ``as_tuple``: the blocks return tuples."""

    layer: int
    hidden: torch.Tensor
    as_tuple: bool


@torch.no_grad()
def capture_block_input(model: nn.Module, layer: int, ids: torch.Tensor, mask: torch.Tensor) -> BlockInput | None:
    """The input of block ``layer`` for a batch, computed without the blocks from it on; ``None`` for ``layer`` 0."""
    if layer <= 0:
        return None
    with recorded_block_inputs(model, [layer], stop=True) as found:
        model(input_ids=ids, attention_mask=mask, use_cache=False)
    return found[0]


@contextlib.contextmanager
def recorded_block_inputs(model: nn.Module, layers: Sequence[int], *, stop: bool = False) -> Iterator[list[BlockInput]]:
    """Inside, each forward pass adds the :class:`BlockInput` of each layer to the list; with ``stop`` it ends at the last."""
    blocks, found = find_blocks(model), []

    def keep(layer: int) -> Callable[[Any], None]:
        def hook(output: Any) -> None:
            found.append(BlockInput(layer, leading(output).detach(), isinstance(output, tuple)))
            if stop and layer == max(layers):
                raise StopForward

        return hook

    with watched_blocks(blocks, {layer - 1: keep(layer) for layer in layers}):
        yield found


@contextlib.contextmanager
def resume_at(model: nn.Module, start: BlockInput | None) -> Iterator[None]:
    """Inside, the model does not run the blocks below ``start.layer``: that block receives ``start.hidden`` at once.

    The batch must be the one that ``start`` was taken from, without a KV cache. Hooks on the block *just* below still
    run, on its true output: where a hook edits the output of block ``L``, the pass may resume at ``L + 1``.
    """
    if start is None or start.layer <= 0:
        yield
        return
    extras = 0 if start.as_tuple else None
    with skipped_blocks(find_blocks(model), start.layer - 1, start.hidden, extras, run_hooks=True):
        yield


# --- generation -------------------------------------------------------------------------------------------------------


def end_token_ids(model: Any, tokenizer: Any) -> set[int]:
    """The ids that end a text: the tokenizer's and those of the model's generation config."""
    found = {tokenizer.eos_token_id}
    more = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    found.update(more if isinstance(more, (list, tuple)) else [more])
    return {int(i) for i in found if i is not None}


@torch.no_grad()
def decode_tokens(
    reader: LogitReader,
    prompts: Sequence[Sequence[int]],
    limits: Sequence[int],
    *,
    end_ids: set[int],
    pad_id: int,
    known: Sequence[Sequence[int]] | None = None,
    samplers: Sequence[torch.Generator | None] | None = None,
    at_prompt: Callable[[list[int]], contextlib.AbstractContextManager[Any]] | None = None,
) -> list[list[int]]:
    """Continuations of all prompts in one batch, without the end token; greedy unless a row has a sampler.

    The prompts are padded on the *right* and the padding stays masked, so that the last prompt token is where it is
    in scoring; position ids are given explicitly. The prompt is read once, in the context ``at_prompt(lengths)``; later
    steps run outside it.

    Args:
        reader: of the model to be run.
        prompts: ids of each prompt.
        limits: most tokens of each continuation, ``known`` ones included.
        end_ids: ids that end a continuation.
        pad_id: any id; padding is masked.
        known: the first tokens of each greedy continuation, where teacher forcing along an answer has given them; each
            saves a step.
        samplers: a row with a generator samples from its :data:`TOP_K` most likely tokens (ROME's way).
        at_prompt: context manager made from the prompts' lengths.
    """
    device = compute_device(reader.model)
    samplers = samplers or [None] * len(prompts)
    texts = [list(k)[:limit] for k, limit in zip(known or [[]] * len(prompts), limits, strict=True)]
    done = [any(t in end_ids for t in text) or len(text) >= limit for text, limit in zip(texts, limits, strict=True)]
    if all(done):
        return [_until_end(text, end_ids) for text in texts]
    rows = [list(p) + text for p, text in zip(prompts, texts, strict=True)]
    ids, mask = (x.to(device) for x in pad_rows(rows, pad_id))
    lengths = torch.tensor([len(r) for r in rows], device=device)
    every = torch.arange(len(rows), device=device)
    context = [len(p) for p in prompts]
    with at_prompt(context) if at_prompt else contextlib.nullcontext():
        logits, _, output = reader(ids, mask, every, lengths - 1, use_cache=True)
    cache = output.past_key_values
    # transformers 4.45 gives Gemma 2 a cache of the prompt's own length: there each step reads the whole text again
    fixed = getattr(cache, "max_cache_len", None) == ids.shape[1]
    zeros = torch.zeros_like(every)
    positions = torch.arange(ids.shape[1], device=device).expand_as(ids)
    for step in range(max(limits)):
        chosen = _choose(logits, samplers)
        for i, token in enumerate(chosen.tolist()):
            if not done[i]:
                texts[i].append(token)
                done[i] = token in end_ids or len(texts[i]) >= limits[i]
        if all(done):
            break
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
        places = (lengths + step).unsqueeze(1)
        if fixed:
            ids, positions = torch.cat([ids, chosen.unsqueeze(1)], 1), torch.cat([positions, places], 1)
            with at_prompt(context) if at_prompt else contextlib.nullcontext():
                logits, _, _ = reader(ids, mask, every, zeros + ids.shape[1] - 1, position_ids=positions)
            continue
        logits, _, output = reader(
            chosen.unsqueeze(1), mask, every, zeros, use_cache=True, past_key_values=cache, position_ids=places
        )
        cache = output.past_key_values
    return [_until_end(text, end_ids) for text in texts]


def _choose(logits: torch.Tensor, samplers: Sequence[torch.Generator | None]) -> torch.Tensor:
    chosen = logits.argmax(-1)
    for i, sampler in enumerate(samplers):
        if sampler is not None:
            top = logits[i].float().topk(min(TOP_K, logits.shape[-1]))
            draw = torch.multinomial(top.values.softmax(-1).cpu(), 1, generator=sampler)
            chosen[i] = top.indices[int(draw)]
    return chosen


def _until_end(tokens: list[int], end_ids: set[int]) -> list[int]:
    stop = next((i for i, t in enumerate(tokens) if t in end_ids), len(tokens))
    return tokens[:stop]
