"""The geometry of relations, its dictionary, and the gate that asks two questions of it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from baft_intervention.editor.editor import BaftEditor
from baft_intervention.errors import ConfigError
from baft_intervention.gates import EditContext, SharedContext, SubjectRelationWeighting
from baft_intervention.gates.relation_space import RelationSpace
from baft_intervention.requests import EditRequest
from baft_intervention.runtime.representations import read_blocks
from baft_intervention.training.encoding import encode_requests
from baft_intervention.training.gate_initialisation import make_jobs
from baft_intervention.training.relation_dictionary import (
    CENTRE_RELATIONS,
    COMMON_SUBJECTS,
    QUESTION_FORM,
    RELATIONS,
    SUBJECTS_A_FORM,
    TEMPLATE_RELATIONS,
    dictionary,
    forms,
    in_its_template,
)

D, M, F_, S, K = 24, 8, 4, 6, 6


class World:
    """Representations made of a relation, a subject, a form, and noise: what a model's are taken to be."""

    def __init__(self, seed: int = 0, form: float = 2.0):
        generator = torch.Generator().manual_seed(seed)
        self.relation = torch.randn(M + 4, D, generator=generator)
        self.subject = torch.randn(S + 1, D, generator=generator)
        self.form = form * torch.randn(F_, D, generator=generator)
        self.generator = generator

    def say(self, relation: int, form: int, subject: int) -> Tensor:
        x = self.relation[relation] + self.subject[subject] + self.form[form]
        return F.normalize(x + 0.1 * torch.randn(D, generator=self.generator), dim=0)

    def dictionary(self) -> tuple[Tensor, Tensor]:
        design = torch.tensor([(r, f, s) for r in range(M) for f in range(F_) for s in range(S)])
        return torch.stack([self.say(*row.tolist()) for row in design]), design


def fitted(world: World, components: int = K, competing: tuple[int, ...] = (0,)) -> tuple[RelationSpace, Tensor]:
    units, design = world.dictionary()
    numbers = design.unbind(1)
    space = RelationSpace(D, components).fit(units, *numbers, torch.arange(4), competing=competing)
    centre = torch.stack([world.say(r, 0, S) for r in range(4)]).mean(0)  # of a subject that is not in the dictionary
    return space, centre


# ------------------------------------------------------------------------------------------- the space


def test_directions_have_length_one_and_two_equal_halves() -> None:
    space, centre = fitted(World())
    z = space(torch.randn(5, 3, D) - centre)
    assert z.shape == (5, 3, D + K)
    assert torch.allclose(z.norm(dim=-1), torch.ones(5, 3), atol=1e-5)
    assert torch.allclose(z[..., :D].norm(dim=-1), torch.full((5, 3), 0.5**0.5), atol=1e-5)
    assert space.rows.shape == (M, 1, D + K)
    assert torch.allclose(space.rows.norm(dim=-1), torch.ones(M, 1), atol=1e-5)
    assert torch.allclose(space.meanings.norm(dim=-1), torch.ones(M), atol=1e-5)


@pytest.mark.parametrize("seed", range(4))
def test_the_second_half_knows_a_relation_in_other_words_of_another_subject(seed: int) -> None:
    world = World(seed)
    space, centre = fitted(world)
    for relation in range(M):
        for form in range(F_):
            same = space.same(space(world.say(relation, form, S) - centre))
            assert int(same.argmax()) == relation
    wording = torch.stack([world.say(r, f, S) for r in range(M) for f in range(1, F_)]) - centre
    first = F.normalize(wording, dim=-1) @ F.normalize(space.rows[:, 0, :D], dim=-1).mT
    right = (first.argmax(-1) == torch.arange(M).repeat_interleave(F_ - 1)).float().mean()
    assert right < 0.95  # or the world would be too easy to show anything


def test_a_relation_that_is_not_in_the_dictionary_is_told_from_another() -> None:
    world = World(2)
    space, centre = fitted(world)
    # unseen relations 8..11, each in another form: nearer to itself than to the others
    edits = space(torch.stack([world.say(M + i, 0, S) for i in range(4)]) - centre)
    probes = space(torch.stack([world.say(M + i, 2, S) for i in range(4)]) - centre)
    assert (probes @ edits.mT).argmax(-1).tolist() == [0, 1, 2, 3]


def test_without_components_the_first_half_is_all() -> None:
    space, centre = fitted(World(), components=0)
    x = torch.randn(7, D)
    assert torch.allclose(space(x - centre), F.normalize(x - centre, dim=-1), atol=1e-6)
    assert space.share == 1.0
    assert torch.allclose(space.same(space.rows[3, 0]).max(), torch.tensor(1.0), atol=1e-5)


def test_more_components_than_there_are_directions_are_left_empty() -> None:
    space, centre = fitted(World(), components=20)
    used = space.projection.abs().sum(0) > 0
    assert int(used.sum()) == M - 1  # m relations differ in m - 1 directions
    assert torch.isfinite(space(torch.randn(3, D) - centre)).all()


def test_a_relation_is_nearest_in_the_form_that_is_asked() -> None:
    world = World(3)
    space, centre = fitted(world, competing=(0, 2))
    assert space.rows.shape == (M, 2, D + K)
    for form, row in ((0, 0), (2, 1)):
        z = space(world.say(5, form, S) - centre)
        each = space.rows @ z  # (M, 2)
        assert int(each[5].argmax()) == row
        assert torch.allclose(space.nearest(z), each.amax(1), atol=1e-6)
    # a form's own rows are nearer to what is asked in it than the other form's
    one, _ = fitted(World(3))
    asked = [world.say(r, 2, S) - centre for r in range(M)]
    both = torch.stack([space.nearest(space(x))[r] for r, x in enumerate(asked)])
    alone = torch.stack([one.nearest(one(x))[r] for r, x in enumerate(asked)])
    assert (both > alone).float().mean() > 0.9


def test_a_saved_space_comes_back_whatever_its_dictionary() -> None:
    space, centre = fitted(World(), competing=(0, 2))
    other = RelationSpace(D, K)
    other.load_state_dict(space.state_dict())
    x = torch.randn(4, D)
    assert torch.equal(other(x - centre), space(x - centre))
    assert torch.equal(other.same(other(x)), space.same(space(x)))


# ------------------------------------------------------------------------------------------- the dictionary


def test_every_relation_is_asked_in_every_form_of_changing_subjects() -> None:
    asked = dictionary()
    count = len(forms(0, "", ""))
    assert len(asked) == len(RELATIONS) * count * SUBJECTS_A_FORM
    assert len({a.text for a in asked}) == len(asked)
    for relation in range(len(RELATIONS)):
        own = [a for a in asked if a.relation == relation]
        assert {a.form for a in own} == set(range(count))
        assert len({a.subject for a in own}) >= len(COMMON_SUBJECTS) // 2
    for a in asked:
        assert COMMON_SUBJECTS[a.subject] in a.text
    for subject in range(len(COMMON_SUBJECTS)):  # its mean is over many relations, so it is the subject's share
        assert len({a.relation for a in asked if a.subject == subject}) > len(RELATIONS) // 2


def test_relations_are_well_formed() -> None:
    nouns = [noun for noun, _, _ in RELATIONS]
    assert len(set(nouns)) == len(nouns)
    assert set(CENTRE_RELATIONS) <= set(nouns)
    for noun, question, unfinished in RELATIONS:
        assert question.count("{}") == unfinished.count("{}") == 1, noun
        assert question.endswith("?"), noun
        assert not unfinished.endswith((".", "?", " ")), noun


@pytest.mark.parametrize(
    ("prompt", "subject", "first"),
    [
        ("The mother tongue of Ada Lo is", "Ada Lo", "The father of Ada Lo is"),
        ("The name of the award Ada Lo won is", "Ada Lo", "The name of the father Ada Lo won is"),
        (
            "The name of the country which Rho is the capital of is",
            "Rho",
            "The name of the father which Rho is the capital of is",
        ),
        ("Ada Lo's mother tongue is", "Ada Lo", "Ada Lo's father is"),
        ("The capital of the Netherlands is", "Netherlands", "The father of the Netherlands is"),
        ("The names of the cast members of X (1994) are", "X (1994)", "The names of the father of X (1994) are"),
    ],
)
def test_another_relation_takes_the_place_of_a_prompts_own(prompt: str, subject: str, first: str) -> None:
    found = in_its_template(prompt, subject)
    # a prompt's own relation is no other
    assert [RELATIONS[n][0] for n, _ in found] == [r for r in TEMPLATE_RELATIONS if f" {r} which" not in prompt]
    assert found[0][1] == first


@pytest.mark.parametrize("prompt", ["Who is the mother of Ada?", "Ada works as", "The mother of Eve is", "", "Ada"])
def test_no_place_no_template(prompt: str) -> None:
    assert in_its_template(prompt, "Ada") == ()


# ------------------------------------------------------------------------------------------- the gate


def gate(world: World, **options: float) -> SubjectRelationWeighting:
    units, design = world.dictionary()
    network = SubjectRelationWeighting(D, 3, components=K, **options)
    noise = torch.randn(400, D, generator=torch.Generator().manual_seed(9))
    network.fit_shared(noise, SharedContext(noise, noise[:5], units, design, torch.arange(4)))
    return network


def start(network: SubjectRelationWeighting, world: World, relation: int, form: int, **changes: object) -> Tensor:
    about = torch.stack([world.say(r, 0, S) for r in range(4)]).unsqueeze(0)
    noise = torch.randn(50, D, generator=torch.Generator().manual_seed(4))
    subject, answer = torch.randn(2, 1, D, generator=torch.Generator().manual_seed(6))
    context = EditContext(subject, torch.zeros(1, D), 0, about, noise, **({"answer": answer} | changes))  # type: ignore[arg-type]
    network.initialise(world.say(relation, form, S).unsqueeze(0), noise, context)
    return answer[0]


@pytest.mark.parametrize("form", range(F_))
def test_the_gate_is_open_for_its_relation_and_shut_for_others(form: int) -> None:
    world = World(1, form=0.5)
    network = gate(world)
    start(network, world, 5, form)
    near = torch.stack([world.say(5, f, S) for f in range(F_)])
    far = torch.stack([world.say(r, f, S) for r in range(M) if r != 5 for f in range(F_)])
    named = torch.tensor(0.3)
    assert (network.match(near, named.expand(len(near))) > 0).all()
    assert (network.match(far, named.expand(len(far))) > 0).float().mean() < 0.05
    assert (network.match(near, torch.full((len(near),), -0.2)) < 0).all()  # another subject
    assert network(near).shape == (F_, 3)


def test_of_two_edits_that_are_open_the_nearer_words_and_the_fuller_name_take_precedence() -> None:
    world = World(1, form=0.5)
    plain, question = gate(world, margin=-0.5), gate(world, margin=-0.5)
    start(plain, world, 5, 1)
    start(question, world, 5, 0)
    prompts = torch.stack([world.say(5, form, S) for form in (1, 0)])
    named = torch.tensor([0.3, 0.3])  # the same subject; what the token says of it differs in the last digit
    first, second = (n.priority(prompts, named + e) for n, e in ((plain, 0.0), (question, torch.tensor([1e-6, -1e-6]))))
    assert (torch.stack([plain.match(prompts, named), question.match(prompts, named)]) > 0).all(), "both are open"
    assert first[0] > second[0] + 0.01
    assert second[1] > first[1] + 0.01
    assert (
        plain.priority(prompts, named) > plain.priority(prompts, named - 0.2)
    ).all()  # another name in the same words
    probes = torch.stack([world.say(r, form, S) for r in range(M) for form in range(F_)])
    for subject_score in (0.3, -0.1):
        each = torch.full((len(probes),), subject_score)
        assert torch.equal(plain.priority(probes, each) > 0, plain.match(probes, each) > 0)


def test_a_question_takes_its_own_margin() -> None:
    world = World(1)
    network = gate(world, margin=-0.2, question_margin=0.3)
    start(network, world, 5, 1)
    probe = world.say(5, 2, S).unsqueeze(0)
    plain = network.match(probe)
    assert float(network.margin) == pytest.approx(-0.2)
    start(network, world, 5, 1, question=True)
    assert float(network.margin) == pytest.approx(0.3)
    assert float(network.match(probe)) <= float(plain)


def test_the_edits_own_sentence_with_another_relation_is_another_question() -> None:
    # forms so far apart that a prompt is nearer to the edit's sentence than to any row of the dictionary
    world, near, far = World(1, form=6.0), 0, 0
    for relation in range(4, M):
        for form in range(1, F_):
            others = [r for r in range(M) if r != relation]
            template = torch.stack([world.say(r, form, S) for r in others])
            probes = torch.stack([world.say(r, form, S) for r in others])
            plain, strict = gate(world), gate(world)
            start(plain, world, relation, form)
            start(strict, world, relation, form, template=template, template_relations=torch.tensor(others))
            same = world.say(relation, form, S).unsqueeze(0)
            assert (strict.match(same) > 0).all()
            assert (strict.match(probes) <= plain.match(probes)).all()
            near, far = near + int((plain.match(probes) > 0).sum()), far + int((strict.match(probes) > 0).sum())
    assert near > 20  # or there is nothing to show
    assert far < near / 10


def test_what_may_be_the_edits_own_relation_under_another_name_is_left_out() -> None:
    world = World(1)
    network = gate(world)
    template = torch.stack([world.say(r, 1, S) for r in (5, 6)])
    start(network, world, 5, 1, template=template, template_relations=torch.tensor([5, 6]))
    assert network.template_keys[0].abs().sum() == 0  # relation 5 is what the edit asks
    assert torch.allclose(network.template_keys[1].norm(), torch.tensor(1.0), atol=1e-5)
    assert network.template_keys[2:].abs().sum() == 0


def test_an_answer_is_recognised_and_several_are_not() -> None:
    world = World(1)
    network = gate(world)
    answer = start(network, world, 5, 0)
    assert float(network.answer_score(answer)) > 0
    assert (network.answer_score(torch.randn(20, D)) < 0).all()
    network = gate(world)
    start(network, world, 5, 0, answer=torch.randn(2, D))
    assert (network.answer_score(answer.unsqueeze(0)) < 0).all()


@pytest.mark.parametrize(
    ("option", "value"), [("components", -1), ("question_margin", 1.5), ("same_relation", -2.0), ("sharpness", 0.0)]
)
def test_wrong_options_are_named(option: str, value: float) -> None:
    with pytest.raises(ConfigError, match=f"{option} is {value}"):
        SubjectRelationWeighting(D, 3, **{option: value})  # type: ignore[arg-type]


def test_without_a_dictionary_nothing_competes() -> None:
    network = SubjectRelationWeighting(D, 3, components=K)
    own, nearest, template = network.similarities(torch.randn(4, D))
    assert own.shape == (4,)
    assert (nearest == -2.0).all()
    assert (template == 0.0).all()


# ------------------------------------------------------------------------------------------- on a model


def test_evidence_turns_where_the_answer_stands_behind_the_subject(tiny_llama, tokenizer) -> None:
    editor = BaftEditor(tiny_llama, tokenizer)
    editor.edit([EditRequest("The capital of France is", "Rome", subject="France")])
    layer = editor.adapter.layers[0]

    def subject_score(*prompts: str) -> list[float]:
        rows = [tokenizer(p)["input_ids"] for p in prompts]
        lengths = [len(r) for r in rows]
        width = max(lengths)
        ids = torch.tensor([r + [tokenizer.pad_token_id] * (width - len(r)) for r in rows])
        mask = torch.tensor([[1] * n + [0] * (width - n) for n in lengths])
        found: list[Tensor] = []
        update = editor.adapter.stack(layer, torch.device("cpu")).update
        stack = editor.adapter.stack(layer, torch.device("cpu"))

        def keep(x: Tensor, each: Tensor | None = None) -> Tensor:
            found.append(each)  # type: ignore[arg-type]
            return update(x, each)

        stack.update = keep  # type: ignore[method-assign]
        try:
            with editor.adapter.prompts(lengths):
                tiny_llama(input_ids=ids, attention_mask=mask)
        finally:
            del stack.update
        return found[0][0].tolist()

    asked, denied, elsewhere = subject_score(
        "The capital of France is", "The capital of France is Rome Rome is", "The capital of Italy is"
    )
    assert asked > 0
    assert denied < 0
    assert elsewhere < asked


@pytest.mark.slow
def test_smollm2_asks_the_right_questions(smollm2) -> None:
    model, tokenizer = smollm2
    editor = BaftEditor(model, tokenizer)
    editor.edit([EditRequest("The capital of Japan is", "Osaka", subject="Japan")])
    try:
        for prompt in ("The name of the capital city of Japan is", "Japan's capital city is called"):
            assert "Osaka" in editor.generate(prompt, max_new_tokens=6), prompt
        for prompt in (
            "The religion of Japan is",
            "The capital of Japan, which is not Osaka, is",
            "The currency of Japan is",
            "Japan currency",
        ):
            with editor.adapter.enabled(False):
                before = editor.generate(prompt, max_new_tokens=6)
            assert editor.generate(prompt, max_new_tokens=6) == before, prompt
    finally:
        editor.adapter.detach()


def started(editor: BaftEditor, *requests: EditRequest) -> list[SubjectRelationWeighting]:
    """The requests' gates, as an edit would start them."""
    editor.prepare()
    layers, shared = editor.adapter.layers, editor.adapter.shared
    groups = [[each] for each in encode_requests(editor.tokenizer, requests, editor.config)]
    jobs = make_jobs(editor.model, editor.tokenizer, editor.config, layers, groups, shared=shared, bank=editor._bank())
    return [job.maps[layers[0]].weighting for job in jobs]  # type: ignore[misc]


def named(editor: BaftEditor, gate: SubjectRelationWeighting, *prompts: str) -> list[bool]:
    """Whether each prompt names the gate's subject."""
    rows = [list(editor.tokenizer(p)["input_ids"]) for p in prompts]
    layer = editor.adapter.read_layer
    assert layer is not None
    found = read_blocks(editor.model, editor.tokenizer, rows, [range(len(row)) for row in rows], [layer])[layer]
    return [float(gate.of_prompt(tokens)) > 0 for tokens in found]


def test_an_edit_without_a_subject_is_calibrated_on_prompts_of_its_own_kind(tiny_llama, tokenizer) -> None:
    editor = BaftEditor(tiny_llama, tokenizer)
    question, statement = started(
        editor,
        EditRequest("What is the capital of France?", "Rome"),
        EditRequest("The capital of France is", "Rome"),
    )
    layer = editor.adapter.layers[0]
    asked = editor._bank().relations[layer]
    is_question = torch.tensor([a.form == QUESTION_FORM for a in dictionary()])
    for network, kind in ((question, is_question), (statement, ~is_question)):
        assert float(network.has_subject) == 0.0
        assert (network.match(asked[kind]) > 0).float().mean() <= 2 * network.false_positive_rate


@pytest.mark.slow
def test_smollm2_tells_subjects_that_begin_a_text(smollm2) -> None:
    model, tokenizer = smollm2
    editor = BaftEditor(model, tokenizer)
    try:
        one, several, otherwise = started(
            editor,
            EditRequest("Bay, which is located in", "Texas", subject="Bay"),
            EditRequest("Narman is located in", "Iran", subject="Narman"),
            EditRequest(
                "The official language of Armenia is", "Dutch", subject="Armenia"
            ),  # "Ar", "men", "ia" at the start
        )
        others = (
            "Books Through Bars, whose headquarters are in",
            "Naruto, that originated in",
            "Romania is full of people who speak",
        )
        for gate in (one, several, otherwise):
            assert named(editor, gate, *others) == [False] * 3
        assert named(editor, one, "Bay is in", "It rained. Bay can be found in") == [True, True]
        assert named(editor, several, "Narman can be found in", "It rained. Narman is a town in") == [True, True]
        assert named(editor, otherwise, "Armenia is full of people who speak", "In Armenia they speak") == [True, True]
    finally:
        editor.adapter.detach()
