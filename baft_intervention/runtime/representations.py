"""Reading representations out of a model: block outputs at chosen tokens, and no more of the model than that takes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..models.structure import compute_device, find_blocks
from ..models.tokenization import pad_rows, pad_token_id
from .call_state import hook_block


class _Enough(Exception):
    """Ends a forward pass when the highest wanted block has been read."""


def read_blocks(
    model: nn.Module,
    tokenizer: Any,
    rows: Sequence[Sequence[int]],
    columns: Sequence[Sequence[int]],
    layers: Sequence[int],
    *,
    batch_size: int = 32,
    done: Callable[[int], object] = lambda rows: None,
) -> dict[int, list[Tensor]]:
    """Outputs of blocks at chosen columns of ragged id rows, unedited model, in batches of similar length.

    Args:
        rows: token ids, one list a row; what stands behind a row's last chosen column is not even read.
        columns: for each row the columns wanted, at least one.
        layers: 0-based block numbers; blocks above the highest do not run.
        batch_size: rows a call of the model.
        done: called after each batch with its number of rows.

    Returns:
        ``layer -> [(n_i, d)]``, fp32 on the CPU, in the order of ``rows``.
    """
    blocks, device = find_blocks(model), compute_device(model)
    found: dict[int, list[Tensor]] = {layer: [torch.empty(0)] * len(rows) for layer in layers}
    order = sorted(range(len(rows)), key=lambda i: max(columns[i]))
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        for begin in range(0, len(order), batch_size):
            batch = order[begin : begin + batch_size]
            ids, mask = pad_rows([rows[i][: max(columns[i]) + 1] for i in batch], pad_token_id(tokenizer))
            seen = _run(model, blocks, ids.to(device), mask.to(device), layers)
            for k, i in enumerate(batch):
                for layer in layers:
                    found[layer][i] = seen[layer][k, list(columns[i])].float().cpu()
            done(len(batch))
    finally:
        for module, mode in modes:
            module.training = mode
    return found


@torch.no_grad()
def _run(
    model: nn.Module, blocks: nn.ModuleList, ids: Tensor, mask: Tensor, layers: Sequence[int]
) -> dict[int, Tensor]:
    seen: dict[int, Tensor] = {}
    highest = max(layers)

    def keep(layer: int) -> Callable[[Tensor], None]:
        def change(hidden: Tensor) -> None:
            seen[layer] = hidden
            if layer == highest:
                raise _Enough

        return change

    handles = [hook_block(blocks[layer], keep(layer)) for layer in layers]
    try:
        model(input_ids=ids, attention_mask=mask, use_cache=False)
    except _Enough:
        pass
    finally:
        for handle in handles:
            handle.remove()
    return seen
