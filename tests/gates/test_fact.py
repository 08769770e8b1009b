"""The default gate by itself: its weights, its match, and the relation encoder that it reads."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from baft_intervention.errors import ConfigError
from baft_intervention.gates import FactWeighting, RelationEncoder, make_weighting
from baft_intervention.gates.fact import STAGES
from baft_intervention.gates.relation_encoder import read_layers

D, R = 24, 3


def encode(encoder: RelationEncoder, *args: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """``z`` and ``log q``."""
    z, *_, places = encoder(*args)
    return z, places


def states(tokens: int, seed: int = 0) -> torch.Tensor:
    """``(blocks, T, d)`` standardised outputs of the blocks that the encoder reads."""
    torch.manual_seed(seed)
    return F.normalize(torch.randn(5, tokens, D), dim=-1) * D**0.5


def parts(encoder: RelationEncoder, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """``(glance (T, ...), memory (T, ...))``."""
    memory = torch.stack([encoder.memory(n, x[n]) for n in range(encoder.pooled)]).sum(0)
    glance = torch.stack([encoder.glance(n, x[n]) for n in range(encoder.pooled, len(x))]).sum(0)
    return glance, memory


# ------------------------------------------------------------------------------------------ the network


def test_the_weights_are_those_of_the_formula():
    network = FactWeighting(D, R)
    h, stage = 3 + 5 * torch.randn(4, D), torch.tensor([0, 2, STAGES - 1, 100])
    with torch.no_grad():
        network.bias.normal_()
        normal = (h - h.mean(-1, keepdim=True)) / h.std(-1, unbiased=False, keepdim=True)
        bias = network.bias[[0, 2, STAGES - 1, STAGES - 1]]
        assert torch.allclose(network(h, stage), torch.sigmoid(normal @ network.weight.mT + bias), atol=1e-4)
        assert torch.allclose(network(h), network(h, torch.zeros(4, dtype=torch.long)))
        assert network(h[0], stage[1]).shape == (R,)


def test_the_weights_start_near_the_initial_one():
    network = make_weighting("fact", 576, R, initial_weight=0.8)
    weights = network(torch.randn(50, 576))
    assert float(weights.mean()) == pytest.approx(0.8, abs=0.02)


def test_a_gate_that_is_not_initialised_is_closed_and_its_own_direction_opens_it():
    network = FactWeighting(D, R)
    z = F.normalize(torch.randn(20, network.key.shape[0]), dim=-1)
    assert (network.match(z) < 0).all()
    network.key.copy_(z[7])
    network.threshold.fill_(0.9)
    assert (network.match(z) > 0).nonzero().flatten().tolist() == [7]
    assert float(network.match(z[7])) == pytest.approx(0.1, abs=1e-5)


@pytest.mark.parametrize("options", [{"initial_weight": 0.0}, {"initial_weight": 1.0}, {"nonsense": 1}])
def test_wrong_options_are_named(options):
    with pytest.raises(ConfigError, match=next(iter(options))):
        make_weighting("fact", D, R, **options)


# ------------------------------------------------------------------------------------------ the encoder


@pytest.mark.parametrize(("edited", "blocks"), [((27,), 30), ((3,), 4), ((0,), 1), ((2, 5), 12)])
def test_no_block_above_the_lowest_edited_one_is_read(edited, blocks):
    found = read_layers(edited, blocks)
    assert len(found) == 5
    assert max(found) <= min(edited)
    assert list(found) == sorted(found)


def test_the_encoder_is_one_attention_over_the_tokens_so_far():
    encoder, tokens = RelationEncoder().build(D, heads=2, width=8, size=6, pointer=4), 5
    encoder.salience.normal_()
    x = states(tokens)
    glance, memory = parts(encoder, x)
    age = torch.arange(tokens)
    z, places = encode(encoder, glance[-1], memory.flip(0), age.float(), age < tokens - 1)  # without the first token
    # by hand, head by head
    decay, pooled = encoder.decay.exp(), []
    for head in range(2):
        logits = torch.stack(
            [
                sum(encoder.salience[n, head] @ x[n, s] for n in range(3)) - decay[head] * (tokens - 1 - s)
                for s in (1, 2, 3, 4)
            ]
        )
        weights = logits.softmax(0)
        value = encoder.value[:, 4 * head : 4 * head + 4]  # (blocks, 4, d)
        each = torch.stack([sum(value[n] @ x[n, s] for n in range(3)) for s in (1, 2, 3, 4)])
        pooled.append((weights.unsqueeze(1) * each).sum(0))
    look = sum(encoder.look[n] @ x[3 + n, -1] for n in range(2))
    expected = F.normalize((look + encoder.mix @ torch.cat(pooled) + encoder.bias)[:6], dim=0)
    assert torch.allclose(z, expected, atol=1e-5)
    query = sum(encoder.query[n] @ x[3 + n, -1] for n in range(2))
    asked = torch.stack(
        [
            sum(encoder.place[n] @ x[n, s] for n in range(3)) @ query / math.sqrt(4)
            - encoder.recency.exp()[0] * (tokens - 1 - s)
            for s in (4, 3, 2, 1)
        ]
    ).log_softmax(0)
    assert torch.allclose(places[:4], asked, atol=1e-5)
    assert float(places[4]) < -1e8  # the first token is not looked at


def test_tokens_that_are_not_seen_do_not_matter():
    encoder = RelationEncoder().build(D)
    encoder.salience.normal_()
    glance, memory = parts(encoder, states(6))
    age, seen = torch.arange(6).float(), torch.tensor([True, True, False, True, False, False])
    z, places = encode(encoder, glance[-1], memory, age, seen)
    other = torch.where(seen.unsqueeze(1), memory, 100.0)
    again, there = encode(encoder, glance[-1], other, age, seen)
    assert torch.equal(z, again)
    assert torch.equal(places[seen], there[seen])
    assert float(places[seen].exp().sum()) == pytest.approx(1.0, abs=1e-5)
    alone, _ = encode(encoder, glance[-1], memory, age, torch.zeros(6, dtype=torch.bool))
    assert torch.isfinite(alone).all()  # a text of one token


def test_parts_of_many_tokens_are_those_of_each():
    encoder = RelationEncoder().build(D)
    x = states(7)
    glance, memory = parts(encoder, x)
    one, own = parts(encoder, x[:, 3:4])
    assert torch.allclose(glance[3], one[0], atol=1e-5)
    assert torch.allclose(memory[3], own[0], atol=1e-5)
    h = torch.randn(4, D) * 30 + 7
    encoder.mean[1], encoder.scale[1] = 7.0, 30.0
    standardised = encoder.standardised(1, h)
    assert torch.allclose(standardised.norm(dim=-1), torch.full((4,), D**0.5), atol=1e-4)
    assert torch.allclose(F.normalize(standardised, dim=-1), F.normalize(h - 7, dim=-1), atol=1e-4)


def test_an_encoder_takes_its_shape_from_what_it_loads():
    encoder = RelationEncoder().build(D, size=16, seed=3)
    encoder.relations = torch.randn(4, 16)
    loaded = RelationEncoder()
    loaded.load_state_dict(encoder.state_dict())
    loaded.check(D, 16)
    assert all(torch.equal(t, loaded.state_dict()[n]) for n, t in encoder.state_dict().items())


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("mean", (5, D + 1), "the encoder's mean has shape"),
        ("look", (2, 9, D), "the encoder's look has shape"),
        ("relations", (3, 15), "relations"),
        ("decay", (3,), "the encoder's salience has shape|heads"),
    ],
)
def test_tensors_that_do_not_fit_together_are_named(name, shape, message):
    encoder = RelationEncoder().build(D, size=16)
    setattr(encoder, name, torch.zeros(shape))
    with pytest.raises(ValueError, match=message):
        encoder.check(D, 16)


def test_an_empty_encoder_is_refused():
    with pytest.raises(ValueError, match=r"the encoder's mean has shape \(0, 0\)"):
        RelationEncoder().check(D, 256)
