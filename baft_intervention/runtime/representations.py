"""Representations: outputs of blocks at chosen tokens, computed without the blocks and the tokens behind them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..models.structure import compute_device, find_blocks
from ..models.tokenization import pad_rows, pad_token_id
from .block_stubs import StopForward, hooked_blocks


@torch.no_grad()
def block_outputs(
    model: nn.Module, blocks: nn.ModuleList, layers: Sequence[int], ids: Tensor, mask: Tensor
) -> dict[int, Tensor]:
    """``layer -> output (B, T, d)`` for one batch ``ids, mask (B, T)``; blocks above the highest layer do not run."""
    seen: dict[int, Tensor] = {}
    highest = max(layers)

    def keep(layer: int) -> Callable[[Tensor], None]:
        def change(hidden: Tensor) -> None:
            seen[layer] = hidden
            if layer == highest:
                raise StopForward

        return change

    with hooked_blocks(blocks, {layer: keep(layer) for layer in layers}):
        model(input_ids=ids, attention_mask=mask, use_cache=False)
    return seen


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
    """Outputs of blocks at chosen columns of ragged rows, read in batches of similar length.

    The model is called as it is, in eval mode: hooks on it act.

    Args:
        rows: token ids, one list a row; columns behind a row's last chosen one are left out.
        columns: for each row the chosen columns, at least one.
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
            seen = block_outputs(model, blocks, layers, ids.to(device), mask.to(device))
            for k, i in enumerate(batch):
                for layer in layers:
                    found[layer][i] = seen[layer][k, list(columns[i])].float().cpu()
            done(len(batch))
    finally:
        for module, mode in modes:
            module.training = mode
    return found
