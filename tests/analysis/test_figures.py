"""The figures' numbers are those of the edits themselves; the inequality of every linear update holds, and is sharp."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from baft_intervention.analysis.figures import (
    batched_editing,
    least_leak,
    read_texts,
    redundant_dimensions,
    tension,
    weights_by_position,
    write_json,
)
from baft_intervention.analysis.tension import edit_update
from baft_intervention.core.functional import baft_update, update_bound
from baft_intervention.core.orthonormal import orthonormal_rows
from baft_intervention.errors import ConfigError, EditError
from baft_intervention.requests import EditRequest, Probe
from edits import BANK, FACTS, FRANCE, LEO, TOWER, logits, tiny_editor, unchanged

PARAPHRASES = ["The capital city of France is", "He was born in the capital. The capital of France is"]


# ------------------------------------------------------------------------------------------ the inequality


class Affine:
    """A random LoReFT in float64: ``u(h) = R^T ((A - R) h + b)``, and inputs for it."""

    def __init__(self, seed: int, rank: int, dim: int):
        self.generator = torch.Generator().manual_seed(seed)
        self.dim = dim
        self.basis = orthonormal_rows(self.normal(rank, dim))
        # from nearly constant (A = R) to steep
        slope = 10.0 ** float(torch.empty(1).uniform_(-2, 1, generator=self.generator))
        self.source = self.basis + slope * self.normal(rank, dim)
        self.bias = self.normal(rank)
        self.edited = 3 * self.normal(dim)

    def normal(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self.generator, dtype=torch.float64)

    def __call__(self, h: torch.Tensor) -> torch.Tensor:
        return baft_update(h, self.basis, self.source, self.bias, torch.ones(*h.shape[:-1], len(self.basis)))

    def size(self, h: torch.Tensor) -> torch.Tensor:
        return torch.linalg.vector_norm(self(h), dim=-1)

    def unrelated(self, n: int) -> torch.Tensor:
        """``(n, d)``, anisotropic and off the origin, as hidden states are."""
        return self.normal(n, self.dim) @ self.normal(self.dim, self.dim) + 2 * self.normal(self.dim)


maps = st.builds(Affine, st.integers(0, 2**31), st.integers(1, 4), st.integers(4, 12))


def _mean_square(x: torch.Tensor) -> float:
    return float(x.square().sum(-1).mean())


@given(u=maps, radius=st.floats(0.01, 10.0))
@settings(max_examples=60, deadline=None)
def test_what_is_steady_on_a_ball_reaches_far(u, radius):
    slope, _ = update_bound(u.basis, u.source, u.bias)
    steepest = torch.linalg.svd(u.source - u.basis).Vh[0]
    change = torch.linalg.vector_norm(u((u.edited + radius * steepest)[None])[0] - u(u.edited[None])[0])
    assert float(change) == pytest.approx(float(slope) * radius, rel=1e-9)  # the most that it changes on the ball
    inside = torch.nn.functional.normalize(u.normal(64, u.dim), dim=-1) * radius
    assert (torch.linalg.vector_norm(u(u.edited + inside) - u(u.edited[None]), dim=-1) <= change * (1 + 1e-9)).all()
    far = u.edited + 30 * u.normal(64, u.dim)
    distance = torch.linalg.vector_norm(far - u.edited, dim=-1)
    assert (u.size(far) >= u.size(u.edited[None]) - change * distance / radius - 1e-6).all()


@given(u=maps, n=st.integers(2, 20))
@settings(max_examples=60, deadline=None)
def test_what_surrounds_the_edit_is_moved_with_it(u, n):
    x, weights = u.unrelated(n), u.normal(n)
    shares = weights.abs() / weights.abs().sum()
    assert u.size(x).max() >= u.size(shares @ x) * (1 - 1e-9) - 1e-9  # the convex hull
    affine = weights + (1 - weights.sum()) / n
    off = u.edited - affine @ x
    slope, _ = update_bound(u.basis, u.source, u.bias)
    reach = affine.abs().sum() * u.size(x).max()
    assert reach >= u.size(u.edited[None])[0] - slope * torch.linalg.vector_norm(off) - 1e-6


@given(u=maps, n=st.integers(1, 6), k=st.floats(0, 1e3), spread=st.floats(0.01, 3.0))
@settings(max_examples=60, deadline=None)
def test_steadiness_and_leak_cannot_both_be_small(u, n, k, spread):
    x, p = u.unrelated(4 * u.dim), u.edited + spread * u.normal(n, u.dim)
    leak, drift = _mean_square(u(x)), _mean_square(u(p) - u(u.edited[None]))
    covariance, context = (x - x.mean(0)).mT @ (x - x.mean(0)) / len(x), (p - u.edited).mT @ (p - u.edited) / n
    a = u.edited - x.mean(0)
    solved = torch.linalg.solve(covariance + k * context, a)
    size = _mean_square(u(u.edited[None]))
    assert leak + k * drift >= size / float(1 + a @ solved) * (1 - 1e-9)

    def sharpest(h):  # of one direction, scaled to 1 at the edit
        return ((1 + (h - x.mean(0)) @ solved) / (1 + a @ solved))[:, None]

    assert float(sharpest(u.edited[None])) == pytest.approx(1)
    equal = _mean_square(sharpest(x)) + k * _mean_square(sharpest(p) - 1)
    assert equal == pytest.approx(1 / float(1 + a @ solved), rel=1e-6)


@given(u=maps, n=st.integers(0, 6), spread=st.floats(0.01, 3.0))
@settings(max_examples=60, deadline=None)
def test_least_leak_is_below_every_linear_update_and_a_weight_undercuts_it(u, n, spread):
    x, p = u.unrelated(4 * u.dim), u.edited + spread * u.normal(n, u.dim)
    size = _mean_square(u(u.edited[None]))
    drift = (_mean_square(u(p) - u(u.edited[None])) / size) ** 0.5 if n else 0.0
    bound = least_leak(u.edited, x, p, drift)
    assert bound <= (_mean_square(u(x)) / size) ** 0.5 * (1 + 1e-9)
    assert bound >= least_leak(u.edited, x, p, drift + 0.1)  # the steadier, the more it leaks
    best = 1 / float(1 + (u.edited - x.mean(0)) @ torch.linalg.solve(x.T.cov(correction=0), u.edited - x.mean(0)))
    assert least_leak(u.edited, x, p[:0], 0.0) == pytest.approx(best**0.5)

    def gated(h):  # 1 at the edit and its paraphrases, 0 elsewhere
        return u(h) * ((h[:, None] - torch.cat([u.edited[None], p])).norm(dim=-1).min(1).values < 1e-9)[:, None]

    assert torch.equal(gated(p), u(p))
    assert _mean_square(gated(x)) == 0.0 < bound or drift > 0


def test_least_leak_is_the_inequality_at_its_best_k():
    u = Affine(seed=1, rank=2, dim=6)
    x, p, drift = u.unrelated(40), u.edited + 2 * u.normal(3, 6), 0.05
    covariance, context = x.T.cov(correction=0), (p - u.edited).mT @ (p - u.edited) / 3
    a, direct = u.edited - x.mean(0), []
    for k in torch.logspace(-4, 4, 801).double():
        direct.append(1 / float(1 + a @ torch.linalg.solve(covariance + k * context, a)) - float(k) * drift**2)
    best = max(range(len(direct)), key=direct.__getitem__)
    assert 0 < best < len(direct) - 1  # neither no paraphrase at all nor perfect steadiness
    assert least_leak(u.edited, x, p, drift) == pytest.approx(direct[best] ** 0.5, rel=1e-3)


def test_too_few_unrelated_inputs_say_nothing():
    x = torch.randn(8, 8, generator=torch.Generator().manual_seed(0))
    with pytest.raises(ConfigError, match="8 unrelated inputs do not span the 8 dimensions; give more texts"):
        least_leak(x[0], x, x[:1], 0.0)


# ------------------------------------------------------------------------------------------ Figure 1


@pytest.mark.parametrize("weighting", ["constant", "fact"])
def test_with_all_bases_the_edit_is_whole_and_with_none_the_model_is_unedited(tiny_llama, tokenizer, weighting):
    editor = tiny_editor(tiny_llama, tokenizer, weighting=weighting)
    editor.edit(FRANCE)
    target = tokenizer(" Japan")["input_ids"]
    assert len(target) == 1
    edited = float(logits(tiny_llama, tokenizer, FRANCE.prompt).softmax(-1)[target[0]])
    with editor.enabled(False):
        unedited = float(logits(tiny_llama, tokenizer, FRANCE.prompt).softmax(-1)[target[0]])
    with unchanged(editor):
        found = redundant_dimensions(editor)
    assert found.ids == ("france",)
    assert found.probability[0][0] == pytest.approx(unedited, rel=1e-3)
    assert found.probability[0][-1] == pytest.approx(edited, rel=1e-3)
    assert len(found.probability[0]) == editor.config.rank + 1
    assert list(found.magnitude[0]) == sorted(found.magnitude[0], reverse=True)
    assert found.reached[0][-1]
    assert found.reached[0][found.needed[0]]
    # orthonormal bases: the squares of the parts add up to the square of the whole
    update = edit_update(editor, editor.edits[0], read_texts(editor, [FRANCE.prompt]))
    assert sum(m * m for m in found.magnitude[0]) == pytest.approx(float(update.square().sum()), rel=1e-4)
    assert found.redundant(1.0) == editor.config.rank
    assert found.redundant(1e9) == 0


# ------------------------------------------------------------------------------------------ Figure 2


def test_weights_are_counted_from_the_end_and_over_prompts_that_are_long_enough(tiny_llama, tokenizer):
    editor = tiny_editor(tiny_llama, tokenizer)
    editor.edit(list(FACTS))
    own = [(fact.id, fact.prompt) for fact in FACTS]
    with unchanged(editor):
        found = weights_by_position(editor, {"edited": own, "other": [("france", "He was")]}, width=40)
    lengths = [len(tokenizer(fact.prompt)["input_ids"]) for fact in FACTS]
    assert found.count["edited"] == tuple(sum(n >= 40 - i for n in lengths) for i in range(40))
    assert min(found.weight["edited"][-1]) > 0.2
    assert max(found.weight["other"][-1]) == 0.0
    short = weights_by_position(editor, {"edited": own}, width=2)
    assert short.weight["edited"] == found.weight["edited"][-2:]
    with pytest.raises(EditError, match="no edit is called 'rome'; there are 'france', 'leo', 'tower'"):
        weights_by_position(editor, {"edited": [("rome", "He was")]})


# ------------------------------------------------------------------------------------------ Figure 3


@pytest.mark.parametrize("changes", [{}, {"weighting": "constant", "allocation": "joint"}])
def test_batches_are_edited_asked_and_taken_back(tiny_llama, tokenizer, changes):
    editor = tiny_editor(tiny_llama, tokenizer, **changes)
    probe = Probe("France has the capital", "rephrase", ("Japan",))
    facts = [EditRequest(FRANCE.prompt, "Japan", subject="France", id="france", probes=(probe,)), LEO, TOWER]
    editor.edit(LEO)  # what all edits share is fitted at the first
    editor.undo("leo")
    with unchanged(editor):
        found = batched_editing(editor, facts, 3)
        one_by_one = batched_editing(editor, facts, 1)
    assert [score.id for score in found.scores] == ["france", "leo", "tower"]
    assert [score.edit for score in one_by_one.scores] == [1.0, 1.0, 1.0]
    assert [len(score.paraphrases) for score in found.scores] == [1, 0, 0]
    assert found.scores[0].prompt_tokens == len(tokenizer(FRANCE.prompt)["input_ids"])
    assert found.scores[0].target_tokens == 1
    with pytest.raises(ConfigError, match="3 requests make no whole batches of 2; give a multiple"):
        batched_editing(editor, facts, 2)
    editor.edit(LEO)
    with pytest.raises(ConfigError, match="the editor has 1 edits"):
        batched_editing(editor, facts, 3)


# ------------------------------------------------------------------------------------------ the trade-off


@pytest.mark.parametrize("weighting", ["constant", "cosine", "fact"])
def test_the_update_is_the_one_that_the_model_gets(tiny_llama, tokenizer, weighting):
    # at the last block: only the last norm follows
    editor = tiny_editor(tiny_llama, tokenizer, weighting=weighting, layers=(3,))
    editor.edit(FRANCE)
    prompts = [FRANCE.prompt, *PARAPHRASES, *BANK]
    update = edit_update(editor, editor.edits[0], read_texts(editor, prompts))
    seen = {}
    for acting in (True, False):
        with editor.enabled(acting), torch.no_grad():
            rows = [tiny_llama(**tokenizer(p, return_tensors="pt"), output_hidden_states=True) for p in prompts]
            seen[acting] = torch.stack([row.hidden_states[-1][0, -1] for row in rows])  # behind the last norm
    with torch.no_grad():
        before = read_texts(editor, prompts).x
        assert torch.allclose(tiny_llama.model.norm(before), seen[False], atol=1e-4)
        assert torch.allclose(tiny_llama.model.norm(before + update), seen[True], atol=1e-4)


def test_every_beginning_of_a_text_is_an_input_of_its_own(tiny_llama, tokenizer):
    editor = tiny_editor(tiny_llama, tokenizer)
    editor.edit(FRANCE)
    text = "The capital of France is a city"
    found = read_texts(editor, [text], prefixes=True)
    ids = tokenizer(text)["input_ids"]
    assert len(found.x) == len(ids) - 1
    each = edit_update(editor, editor.edits[0], found)
    for n in range(2, len(ids) + 1):
        start = tokenizer.decode(ids[:n])
        assert tokenizer(start)["input_ids"] == ids[:n]
        alone = read_texts(editor, [start])
        assert torch.allclose(alone.x[0], found.x[n - 2], atol=1e-4)
        assert torch.allclose(edit_update(editor, editor.edits[0], alone)[0], each[n - 2], atol=1e-3)


def test_loreft_leaks_at_least_what_the_bound_says_and_the_default_gate_does_not(tiny_llama, tokenizer):
    leaks = {}
    for weighting in ("constant", "fact"):
        editor = tiny_editor(tiny_llama, tokenizer, weighting=weighting)
        editor.edit(FRANCE)
        unrelated = read_texts(editor, BANK, prefixes=True)
        with unchanged(editor):
            found = tension(editor, "france", PARAPHRASES, unrelated)
        leaks[weighting] = found
        editor.detach()
    loreft, gated = leaks["constant"], leaks["fact"]
    assert loreft.leak >= loreft.least_leak > 0
    assert gated.leak < gated.least_leak
    assert gated.size > 0  # the gate is open at the edit
    assert len(loreft.paraphrases) == 2
    for distance, size in (*loreft.paraphrases, *loreft.unrelated):
        assert size >= 1 - loreft.slope * distance - 1e-4  # docs/theory/linear.md, 1


def test_what_cannot_be_measured_is_said(tiny_llama, tokenizer):
    editor = tiny_editor(tiny_llama, tokenizer)
    with pytest.raises(EditError, match="there is no edit to look at"):
        redundant_dimensions(editor)
    editor.edit(FRANCE)
    unrelated = read_texts(editor, BANK, prefixes=True)
    with pytest.raises(EditError, match="no edit is called 'rome'; there are 'france'"):
        tension(editor, "rome", PARAPHRASES, unrelated)
    with pytest.raises(ConfigError, match="none of the 1 texts has 2 tokens; give more, or longer ones"):
        read_texts(editor, ["a"], prefixes=True)
    with pytest.raises(ConfigError, match="edit 'france' comes without a paraphrase"):
        tension(editor, "france", [], unrelated)
    editor.detach()
    two = tiny_editor(tiny_llama, tokenizer, layers=(2, 3))
    two.edit(FRANCE)
    with pytest.raises(ConfigError, match=r"the edits sit on layers \[2, 3\]"):
        redundant_dimensions(two)
    two.detach()
    everywhere = tiny_editor(tiny_llama, tokenizer, weighting="linear", positions="prompt")
    everywhere.edit(FRANCE)
    with pytest.raises(ConfigError, match="positions is 'prompt'"):
        tension(everywhere, "france", PARAPHRASES, unrelated)


def test_results_are_json(tiny_llama, tokenizer, tmp_path):
    editor = tiny_editor(tiny_llama, tokenizer)
    editor.edit(FRANCE)
    found = redundant_dimensions(editor)
    write_json({"figure": 1, "found": [found]}, tmp_path / "found.json")
    read = json.loads((tmp_path / "found.json").read_text())
    assert read["found"][0]["ids"] == ["france"]
    assert read["found"][0]["magnitude"][0] == pytest.approx(list(found.magnitude[0]), rel=1e-4)
    assert read["found"][0]["reached"] == [list(found.reached[0])]


# ------------------------------------------------------------------------------------------ the real model


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_on_the_real_model_loreft_leaks_and_the_default_does_less_than_any_linear_map(smollm2):
    from baft_intervention import BaftConfig, BaftEditor
    from baft_intervention.training.bank import shipped_texts

    model, tokenizer = smollm2
    texts, others = shipped_texts()[::5], [t for i, t in enumerate(shipped_texts()) if i % 5]  # the bank has the others
    fact = EditRequest("The capital of Japan is", "Osaka", subject="Japan", id="japan")
    paraphrases = ["The capital city of Japan is", "Here is a fact. The capital of Japan is"]
    found = {}
    for name, config in (("loreft", BaftConfig(weighting="constant")), ("baft", BaftConfig())):
        editor = BaftEditor(model, tokenizer, config, model_name="smollm2-135m", bank_texts=others)
        editor.edit(fact)
        unrelated = read_texts(editor, texts, prefixes=True)
        found[name] = tension(editor, "japan", paraphrases, unrelated), redundant_dimensions(editor)
        editor.detach()
    (loreft, parts), (baft, _) = found["loreft"], found["baft"]
    assert loreft.leak > 2 * loreft.least_leak > 0
    assert baft.leak < baft.least_leak
    assert min(size for _, size in baft.paraphrases) > 0.4
    assert parts.needed[0] <= 6  # half of the bases, or fewer, carry the edit
