"""What training starts from: rows of other forms, keys of the default gate, rows behind other sentences (augmentation)."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from baft_intervention.config import MOST_AUGMENTATIONS, BaftConfig
from baft_intervention.errors import ConfigError
from baft_intervention.gates import RelationEncoder
from baft_intervention.gates.relation_encoder import read_layers
from baft_intervention.requests import EditRequest
from baft_intervention.training.bank import Bank
from baft_intervention.training.encoding import encode_requests
from baft_intervention.training.gate_initialisation import make_jobs
from baft_intervention.training.relation_texts import OPENINGS
from baft_intervention.training.relation_training import encode_rows
from edits import FACTS, FRANCE, LEO, next_word, tiny_editor

PLAIN = BaftConfig(rank=2, layers=(1,), weighting="constant")


def jobs(model, tokenizer, config, groups):
    encoded = [encode_requests(tokenizer, group, config) for group in groups]
    return make_jobs(model, tokenizer, config, config.layers, encoded, shared={1: {}}, bank=Bank())


def test_augmented_rows_ask_the_same_behind_another_sentence(tiny_llama, tokenizer):
    config = dataclasses.replace(PLAIN, augmentations=3)
    (plain,), (job,) = (jobs(tiny_llama, tokenizer, c, [[FRANCE]]) for c in (PLAIN, config))
    assert job.requests == plain.requests
    assert job.rows[0].ids == plain.rows[0].ids
    asked = [row.ids[: row.prompt_length] for row in job.rows[1:]]
    wanted = [list(tokenizer(f"{opening} {FRANCE.prompt}")["input_ids"]) for opening in OPENINGS]
    assert all(ids in wanted for ids in asked)
    assert len(set(map(tuple, asked))) == len(asked) == 3
    for row in job.rows:
        assert row.positions == [row.prompt_length - 1]
        assert [label for label in row.labels if label >= 0] == [label for label in plain.rows[0].labels if label >= 0]


def test_the_sentences_are_a_matter_of_seed_and_request_not_of_the_batch(tiny_llama, tokenizer):
    config = dataclasses.replace(PLAIN, augmentations=2)
    (alone,) = jobs(tiny_llama, tokenizer, config, [[LEO]])
    _, among = jobs(tiny_llama, tokenizer, config, [[FRANCE], [LEO]])
    (other,) = jobs(tiny_llama, tokenizer, dataclasses.replace(config, seed=3), [[LEO]])
    assert [row.ids for row in alone.rows] == [row.ids for row in among.rows]
    assert [row.ids for row in alone.rows] != [row.ids for row in other.rows]


def test_an_edit_trained_with_augmentations_holds_behind_other_sentences(tiny_llama, tokenizer):
    def hits(count: int) -> int:
        editor = tiny_editor(tiny_llama, tokenizer, weighting="constant", augmentations=count, steps=60)
        editor.edit(FACTS[0])
        found = sum(next_word(tiny_llama, tokenizer, f"{o} {FRANCE.prompt}") == FRANCE.target_new for o in OPENINGS)
        editor.detach()
        return found

    assert hits(MOST_AUGMENTATIONS) == len(OPENINGS) == MOST_AUGMENTATIONS > hits(0)


def test_the_gate_starts_from_the_request_alone(tiny_llama, tokenizer):
    keys = []
    for count in (0, 2):
        editor = tiny_editor(tiny_llama, tokenizer, weighting="cosine", augmentations=count)
        editor.edit(FRANCE)
        (edit,) = editor.edits
        keys.append(next(iter(edit.tensors.values()))["weighting.key"])
        editor.detach()
    assert torch.equal(*keys)


def test_the_default_gate_trains_the_requests_forms_and_its_key_is_their_mean(tiny_llama, tokenizer):
    config = BaftConfig(rank=2, layers=(3,))
    encoder = RelationEncoder().build(32)
    shared = {3: {f"encoder.{name}": tensor for name, tensor in encoder.state_dict().items()}}
    question = EditRequest("What is the capital of France?", "Japan", subject="France")
    encoded = [encode_requests(tokenizer, [r], config) for r in (question, FRANCE)]
    job, plain = make_jobs(tiny_llama, tokenizer, config, (3,), encoded, shared=shared, bank=Bank())
    assert [tokenizer.decode(row.ids[: row.prompt_length]) for row in job.rows] == [
        question.prompt, "The capital of France is",
    ]  # fmt: skip
    assert len(plain.rows) == 2  # with this tokenizer no chat
    prompts = [row.ids[: row.prompt_length] for row in job.rows]
    z = encode_rows(tiny_llama, tokenizer, encoder, read_layers((3,), 4), prompts)
    network: Any = job.maps[3].weighting
    assert torch.allclose(network.key, torch.nn.functional.normalize(z.mean(0), dim=0), atol=1e-5)
    assert torch.allclose(network.key.norm(), torch.tensor(1.0))


@pytest.mark.parametrize("wrong", [-1, MOST_AUGMENTATIONS + 1, 1.5, True])
def test_a_wrong_number_of_augmentations_is_named(wrong):
    with pytest.raises(ConfigError, match="augmentations"):
        BaftConfig(augmentations=wrong)
