"""From requests to jobs: encode them, seed their maps, and initialise their gates from data."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..config import BaftConfig
from ..gates import FactWeighting, RelationEncoder, WeightingNetwork
from ..gates.relation_encoder import read_layers
from ..models.structure import find_blocks, hidden_size
from ..runtime.representations import read_blocks
from .bank import Bank
from .encoding import encode_request, other_forms
from .maps import edit_seed, make_maps
from .relation_texts import OPENINGS
from .relation_training import encode_rows
from .types import EncodedRequest, Job


def make_jobs(
    model: nn.Module,
    tokenizer: Any,
    config: BaftConfig,
    layers: Sequence[int],
    groups: Sequence[Sequence[EncodedRequest]],
    *,
    shared: Mapping[int, Mapping[str, Tensor]],
    bank: Bank,
) -> list[Job]:
    """A job for each group of requests, ready to be trained.

    Args:
        model, tokenizer, config, layers: the base model and the edits' settings.
        groups: of encoded requests; each becomes a job.
        shared: ``layer -> {name: tensor}``, what the edits of a layer have in common.
        bank: unrelated representations.
    """
    jobs = []
    for group in groups:
        requests, rows = (tuple(items) for items in zip(*((e.request, e.row) for e in group), strict=True))
        maps = make_maps(config, hidden_size(model), layers, shared, edit_seed(config.seed, requests))
        if config.reads_tokens:
            forms = (form for request in requests for form in other_forms(tokenizer, request))
            rows = (*rows, *(encode_request(tokenizer, form, config) for form in forms))
        jobs.append(Job(requests, rows, maps))
    if not jobs:
        return jobs
    if config.reads_tokens:
        initialise_keys(model, tokenizer, layers, jobs, shared)
    else:
        initialise_gates(model, tokenizer, layers, jobs, bank)
    return [augmented(tokenizer, config, job) for job in jobs] if config.augmentations else jobs


def augmented(tokenizer: Any, config: BaftConfig, job: Job) -> Job:
    """The job with ``config.augmentations`` more rows a request: its prompt after one of ``OPENINGS``.

    These are hard positives: the question is the same, and the edited token has another past. The job's seed picks the openings.
    """
    generator = torch.Generator().manual_seed(edit_seed(config.seed, job.requests))
    rows = list(job.rows)
    for request in job.requests:
        order = torch.randperm(len(OPENINGS), generator=generator).tolist()
        for number in order[: config.augmentations] if not request.messages else ():
            prompt = f"{OPENINGS[number]} {request.prompt}"
            rows.append(encode_request(tokenizer, dataclasses.replace(request, prompt=prompt), config))
    return dataclasses.replace(job, rows=tuple(rows))


def initialise_keys(
    model: nn.Module,
    tokenizer: Any,
    layers: Sequence[int],
    jobs: Sequence[Job],
    shared: Mapping[int, Mapping[str, Tensor]],
) -> None:
    """Set each edit's key to the mean direction of its rows where their answers begin."""
    encoder = RelationEncoder()
    prefix = "encoder."
    encoder.load_state_dict({n.removeprefix(prefix): t for n, t in shared[layers[0]].items() if n.startswith(prefix)})
    prompts = [row.ids[: row.prompt_length] for job in jobs for row in job.rows]
    z = encode_rows(model, tokenizer, encoder, read_layers(layers, len(find_blocks(model))), prompts)  # (N, k)
    for job, own in zip(jobs, z.split([len(job.rows) for job in jobs]), strict=True):
        for module in job.maps.values():
            network = module.weighting
            assert isinstance(network, FactWeighting)
            network.key.copy_(F.normalize(own.mean(0), dim=0))
            network.threshold.fill_(encoder.threshold(network.false_openings))


def initialise_gates(model: nn.Module, tokenizer: Any, layers: Sequence[int], jobs: Sequence[Job], bank: Bank) -> None:
    """Initialise the jobs' weighting networks from their requests, if the networks use data."""
    network = jobs[0].maps[layers[0]].weighting
    if type(network).initialise is WeightingNetwork.initialise:
        return
    own_rows = [row for job in jobs for row in job.rows]
    own = read_blocks(model, tokenizer, [row.ids for row in own_rows], [row.positions for row in own_rows], layers)
    begin = 0
    for job in jobs:
        end = begin + len(job.rows)
        for layer, module in job.maps.items():
            module.weighting.initialise(torch.cat(own[layer][begin:end]), bank.unrelated.get(layer))
        begin = end
