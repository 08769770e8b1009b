"""The facts that come with the library."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from baft_intervention.data import load_facts
from baft_intervention.models.tokenization import encode_pair


def test_facts_are_complete() -> None:
    facts = load_facts()
    assert 8 <= len(facts) <= 12
    assert len({fact.id for fact in facts}) == len(facts)
    for fact in facts:
        assert fact.subject is not None
        assert fact.subject in fact.prompt
        assert fact.target_true
        assert fact.target_new not in fact.target_true
        assert len(fact.probes_of("rephrase")) == 2
        assert len(fact.probes_of("locality")) == 3
        assert len(fact.probes_of("portability")) == 1
        assert all(p.answers[0] == fact.target_new for p in fact.probes_of("rephrase"))
        assert fact.origin.startswith("facts.json, record ")


@pytest.mark.slow
def test_the_small_model_knows_the_old_answers(smollm2: tuple[Any, Any]) -> None:
    model, tokenizer = smollm2
    for fact in load_facts():
        best = []
        for answer in (*fact.target_true, fact.target_new):
            prompt_ids, ids = encode_pair(tokenizer, fact.prompt, answer)
            with torch.no_grad():
                logits = model(torch.tensor([prompt_ids + ids])).logits[0, len(prompt_ids) - 1 : -1]
            best.append(logits.log_softmax(-1).gather(-1, torch.tensor(ids)[:, None]).mean().item())
        assert max(best[:-1]) > best[-1], fact.prompt
