"""From requests to jobs: encoding them, seeding their maps, and starting their weighting networks from data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..config import BaftConfig
from ..hooks import hook_block
from ..models import find_blocks, hidden_size
from ..requests import EditRequest
from ..tokenization import pad_rows, pad_token_id
from ..weighting import WeightingNetwork
from .bank import collector
from .engine import Job, Row, edit_seed, encode_request, frozen, make_maps


def make_jobs(
    model: nn.Module,
    tokenizer: Any,
    config: BaftConfig,
    layers: Sequence[int],
    groups: Sequence[Sequence[EditRequest]],
    *,
    shared: Mapping[int, Mapping[str, Tensor]],
    bank: Mapping[int, Tensor],
) -> list[Job]:
    """A job for each group of requests, ready to be trained.

    Raises:
        RequestError, PositionError: a request that cannot be encoded.
    """
    jobs = []
    for group in groups:
        rows = tuple(encode_request(tokenizer, request, config) for request in group)
        maps = make_maps(config, hidden_size(model), layers, shared, edit_seed(config.seed, group))
        jobs.append(Job(tuple(group), rows, maps))
    if jobs and type(next(iter(jobs[0].maps.values())).weighting).start_from is not WeightingNetwork.start_from:
        own = own_representations(model, tokenizer, layers, [row for job in jobs for row in job.rows])
        begin = 0
        for job in jobs:
            end = begin + len(job.rows)
            for layer, module in job.maps.items():
                module.weighting.start_from(torch.cat(own[layer][begin:end]), bank.get(layer))
            begin = end
    return jobs


@torch.no_grad()
def own_representations(
    model: nn.Module, tokenizer: Any, layers: Sequence[int], rows: Sequence[Row], *, batch_size: int = 32
) -> dict[int, list[Tensor]]:
    """Block outputs of the rows at their edited columns, unedited: ``layer -> [(n_i, d)]`` fp32 on the CPU."""
    blocks, device = find_blocks(model), next(model.parameters()).device
    found: dict[int, list[Tensor]] = {layer: [torch.empty(0)] * len(rows) for layer in layers}
    order = sorted(range(len(rows)), key=lambda i: len(rows[i].ids))
    with frozen(model):
        for begin in range(0, len(order), batch_size):
            batch = order[begin : begin + batch_size]
            # nothing behind the last edited column can reach it
            ids, mask = pad_rows([rows[i].ids[: max(rows[i].positions) + 1] for i in batch], pad_token_id(tokenizer))
            seen: dict[int, Tensor] = {}
            handles = [hook_block(blocks[layer], collector(seen, layer)) for layer in layers]
            try:
                model(input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False)
            finally:
                for handle in handles:
                    handle.remove()
            for k, i in enumerate(batch):
                for layer in layers:
                    found[layer][i] = seen[layer][k, rows[i].positions].float().cpu()
    return found
