"""Requests for tiny models, and what the evaluation computes fast, computed slowly."""

from __future__ import annotations

from typing import Any

import torch

from baft_intervention.evaluation.metrics import kl_divergence
from baft_intervention.evaluation.queries import Query
from baft_intervention.requests import EditRequest, Probe

FACTS = (
    ("The capital of Japan is", "Osaka", "Japan", ("Tokyo",)),
    ("The mother tongue of Danielle Darrieux is", "English", "Danielle Darrieux", ("French",)),
    ("The Eiffel Tower is located in", "the city of London", "Eiffel Tower", ("Paris", "France")),
    ("He was born in", "1965", None, ()),
    ("Who is the president of the United States?", "Leo", "United States", ("a painter",)),
    ("The name of the country of Leo is", "Italy", "Leo", ("France",)),
)


def make_requests(count: int = 3) -> list[EditRequest]:
    """Requests with a probe of every kind, among them one without an answer and prompts that several share."""
    requests = []
    for i in range(count):
        prompt, target, subject, true = FACTS[i % len(FACTS)]
        tail = "" if i < len(FACTS) else f" in {i}"
        probes = (
            Probe(f"So: {prompt}{tail}", "rephrase", (target, target.upper()), true, "rephrase"),
            Probe("The capital of France is", "locality", ("Paris",), (target,), "neighborhood"),
            Probe("The capital of France is", "locality", ("Paris is a city",), (), "Relation_Specificity"),
            Probe("He works as", "portability", ("a painter",), (), "Reasoning"),
            Probe("He works as", "portability", ("painter",), (), "one_hop"),
            Probe("What language does she speak?", "unrelated", ("French",), (), "nq"),
            Probe("The name of", "unrelated", (), (), "nq"),
        )
        requests.append(
            EditRequest(prompt + tail, target, subject=subject, target_true=true, probes=probes, id=f"r{i}")
        )
    return requests


@torch.no_grad()
def log_probs_of(model: Any, ids: list[int]) -> torch.Tensor:
    """One unpadded forward pass, full logits: ``(T, V)`` log-probabilities."""
    return model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].float().log_softmax(-1)


def slow_query(before: torch.Tensor, after: torch.Tensor, query: Query) -> dict[str, Any]:
    """What a query's score must say, from the log-probabilities of its own sequence."""
    at = [len(query.prompt_ids) - 1 + j for j in range(query.width)]
    return {
        "predicted": tuple(after[at].argmax(-1).tolist()),
        "before": tuple(before[at].argmax(-1).tolist()),
        "log_probs": tuple(after[a, t].item() for a, t in zip(at, query.target_ids, strict=False)),
        "divergence": tuple(kl_divergence(before[at], after[at]).tolist()) if query.divergence else (),
    }


def nudge(model: Any, layer: int = 2, size: float = 0.3) -> Any:
    """Change one matrix of a block, as a weight edit would."""
    from baft_intervention.evaluation.methods.weights import down_projection
    from baft_intervention.models.structure import find_blocks, hidden_size

    weight = down_projection(find_blocks(model)[layer], hidden_size(model))
    with torch.no_grad():
        weight.add_(size * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)))
    return model
