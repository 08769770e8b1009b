"""From requests to jobs: encode them, seed their maps, and initialise their gates from data."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..config import BaftConfig
from ..core.positions import PositionRule, prompt_positions
from ..errors import PositionError
from ..gates import EditContext, SharedContext, WeightingNetwork
from ..models.chat import around_question
from ..models.structure import find_blocks, hidden_size
from ..models.tokenization import encode_prompt
from ..runtime.representations import read_blocks
from .bank import Bank
from .encoding import encode_request
from .maps import edit_seed, make_maps
from .relation_dictionary import (
    CENTRE_RELATIONS,
    COMPETING_FORMS,
    OPENINGS,
    QUESTION_FORM,
    RELATIONS,
    ask,
    ask_in_chat,
    dictionary,
    in_its_template,
)
from .types import EncodedRequest, Job


def shared_context(network: WeightingNetwork, bank: Bank, layer: int, read_layer: int | None) -> SharedContext | None:
    """Data for ``network.fit_shared`` beside the bank of its layer; None for a network that reads no subject."""
    if not network.reads_subject or read_layer is None:
        return None
    design = torch.tensor([asked[1:] for asked in dictionary()])  # (N, 3)
    nouns = [noun for noun, _, _ in RELATIONS]
    centre = torch.tensor([nouns.index(noun) for noun in CENTRE_RELATIONS])
    unrelated, starts = bank.unrelated[read_layer], bank.starts[read_layer]
    return SharedContext(unrelated, starts, bank.relations[layer], design, centre, COMPETING_FORMS)


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
        jobs.append(Job(requests, rows, maps))
    if not jobs:
        return jobs
    initialise_gates(model, tokenizer, layers, jobs, bank)
    return [augmented(tokenizer, config, job) for job in jobs] if config.augmentations else jobs


def augmented(tokenizer: Any, config: BaftConfig, job: Job) -> Job:
    """The job with ``config.augmentations`` more rows a request: its prompt after one of the dictionary's ``OPENINGS``.

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


def initialise_gates(model: nn.Module, tokenizer: Any, layers: Sequence[int], jobs: Sequence[Job], bank: Bank) -> None:
    """Initialise the jobs' weighting networks from their requests, if the networks use data."""
    network = jobs[0].maps[layers[0]].weighting
    if type(network).initialise is WeightingNetwork.initialise:
        return
    contexts: list[dict[int, EditContext] | None] = [None] * len(jobs)
    if network.reads_subject:
        read_layer = network.read_layer(layers, len(find_blocks(model)))
        contexts = edit_contexts(model, tokenizer, jobs, layers, read_layer, bank)
    own_rows = [row for job in jobs for row in job.rows]
    own = read_blocks(model, tokenizer, [row.ids for row in own_rows], [row.positions for row in own_rows], layers)
    begin = 0
    for job, context in zip(jobs, contexts, strict=True):
        end = begin + len(job.rows)
        for layer, module in job.maps.items():
            h_edit = torch.cat(own[layer][begin:end])
            strangers = (
                bank.unrelated.get(layer) if context or not network.reads_subject else _strangers(bank, layer, job)
            )
            module.weighting.initialise(h_edit, strangers, context[layer] if context else None)
        begin = end


def edit_contexts(
    model: nn.Module, tokenizer: Any, jobs: Sequence[Job], layers: Sequence[int], read_layer: int, bank: Bank
) -> list[dict[int, EditContext] | None]:
    """For each job ``layer -> EditContext``, or None if a request's subject does not occur exactly once in its prompt."""
    rows: list[list[int]] = []
    columns: list[list[int]] = []
    asked: list[list[int]] = []
    templates: list[tuple[int, list[int]]] = []  # of each job: its first row, and the relations' numbers

    def read_last(prompt: str) -> None:
        ids = encode_prompt(tokenizer, prompt)
        rows.append(ids)
        columns.append([len(ids) - 1])

    for job in jobs:
        asked.append([])
        for request, row in zip(job.requests, job.rows, strict=True):
            prompt_ids = row.ids[: row.prompt_length]
            try:
                span = prompt_positions(_SUBJECT_ALL, tokenizer, request.prompt, prompt_ids, request.subject)
            except PositionError:
                asked[-1] = []
                break
            asked[-1].append(len(rows))
            # the subject's tokens, and the answer's end
            last = len(row.ids) - 1 - row.ending
            rows.append(row.ids)
            columns.append([*span, last])
            opening = f"{request.subject} is"
            ids = encode_prompt(tokenizer, opening)
            rows.append(ids)
            columns.append(prompt_positions(_SUBJECT_ALL, tokenizer, opening, ids, request.subject))
            before, behind = around_question(request)
            asking = ask_in_chat if request.messages else ask  # in a conversation the last token is the template's
            for relation in CENTRE_RELATIONS:
                prompt = before + asking(relation, _inside(request.subject or "")) + behind
                read_last(prompt)
                if relation == CENTRE_RELATIONS[0] and span[0] == 0:
                    # the first token of a text looks like any other first token: the subject is read where it stands inside one
                    columns[-1] = _subject_and_last(tokenizer, prompt, rows[-1], _inside(request.subject or ""))
        templates.append((len(rows), []))
        if len(asked[-1]) == 1 and not job.requests[0].messages:
            for relation, prompt in in_its_template(job.requests[0].prompt, job.requests[0].subject or ""):
                read_last(prompt)
                templates[-1][1].append(relation)
    if not rows:
        return [None] * len(jobs)
    wanted = sorted({read_layer, *layers})
    found = read_blocks(model, tokenizer, rows, columns, wanted)
    contexts: list[dict[int, EditContext] | None] = []
    for job, first, (begin, relations) in zip(jobs, asked, templates, strict=True):
        if not first:
            contexts.append(None)
            continue
        question = _is_question(job)
        tokens = [found[read_layer][i + 2 if len(columns[i + 2]) > 1 else i][:-1] for i in first]  # each (m, d)
        subject = torch.stack([each[-1] for each in tokens])  # (n, d)
        name = tokens[0][:-1] if len(first) == 1 else None  # (m, d)
        answer = torch.cat([found[read_layer][i][-1:] for i in first])  # (n, d)
        spelt = [len(columns[i + 1]) if columns[i + 1][0] == 0 else 0 for i in first]
        start = torch.stack([found[read_layer][i + 1][-1] for i in first])  # (n, d)
        start_tokens = spelt[0] if len(first) == 1 or set(spelt) == {1} else 0
        per_layer = {}
        for layer in layers:
            asked_too = [[found[layer][i + 2 + k][-1] for k in range(len(CENTRE_RELATIONS))] for i in first]
            about = torch.stack([torch.stack(each) for each in asked_too])  # (n, k, d)
            template = torch.cat(found[layer][begin : begin + len(relations)]) if relations else None  # (k, d)
            per_layer[layer] = EditContext(
                subject,
                start,
                start_tokens,
                about,
                bank.unrelated[read_layer],
                question=question,
                answer=answer,
                name=name,
                template=template,
                template_relations=torch.tensor(relations, dtype=torch.long) if relations else None,
            )
        contexts.append(per_layer)
    return contexts


def _subject_and_last(tokenizer: Any, prompt: str, ids: Sequence[int], subject: str | None) -> list[int]:
    """Columns of the subject's tokens and of the last one; only the last if the subject is not found in the prompt."""
    try:
        return [*prompt_positions(_SUBJECT_ALL, tokenizer, prompt, ids, subject), len(ids) - 1]
    except PositionError:
        return [len(ids) - 1]


def _inside(subject: str) -> str:
    """A subject as written inside a sentence: "The telephone" becomes "the telephone"."""
    article, space, rest = subject.partition(" ")
    return article.lower() + space + rest if space and article in ("The", "A", "An") else subject


def _strangers(bank: Bank, layer: int, job: Job) -> Tensor | None:
    """Unrelated prompts ``(N, d)`` of a job's own kind, to calibrate one without a subject: questions resemble each other."""
    if layer not in bank.relations:
        return bank.unrelated.get(layer)
    question = _is_question(job)
    same_kind = torch.tensor([(asked.form == QUESTION_FORM) == question for asked in dictionary()])
    found = bank.relations[layer][same_kind]
    return found if question else torch.cat([bank.unrelated[layer], found])


def _is_question(job: Job) -> bool:
    # whatever is said to a chat model, its last token is the template's: near it, as the rewordings of a question are
    return all(bool(r.messages) or r.prompt.rstrip().endswith("?") for r in job.requests)


_SUBJECT_ALL = PositionRule("subject_all")
