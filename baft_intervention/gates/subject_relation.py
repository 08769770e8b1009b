"""The default gate, ``subject_relation``: is the prompt about the edit's subject, and does it ask for its relation?"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import ConfigError
from .base import EditContext, SharedContext, WeightingNetwork, register_weighting
from .cosine import gate
from .relation_space import RelationSpace
from .whitening import Whitening

_ANSWER_LIMIT = 0.85  # the same words in another sentence reach 0.9 to 1, other words reach 0.5
_PARTS = 8  # tokens before the subject's last that are compared; longer names are rare
_TEMPLATES = 8  # prompts in the edit's own words that are compared
_LAST_LIMIT = 0.3  # of the last token; below it the others are not compared
_START_LAST_LIMIT = 0.9  # of the last of several tokens at the start of a text: the same tokens give 1
_START_LIMIT = 0.85  # a word's forms ("Japan", "Japanese") reach 0.7 to 0.8 of each other at the start of a text


class Directions(nn.Module):
    """Directions ``(m, d)`` that all edits share; empty until fitted."""

    directions: Tensor

    def __init__(self, embed_dim: int):
        super().__init__()
        self.register_buffer("directions", torch.zeros(0, embed_dim))

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: Any, **kwargs: Any) -> None:
        saved = state_dict.get(prefix + "directions")
        if saved is not None and saved.shape != self.directions.shape:
            self.directions = torch.empty_like(saved, device=self.directions.device)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


@register_weighting("subject_relation")
class SubjectRelationWeighting(WeightingNetwork):
    """``w(h) = sigmoid(a min(subject, relation))``: open where the prompt is about the edit's subject *and* relation (ours).

    A language model shows the two at different places (measurements in ``docs/theory/gate.md``).

    *Subject*: at the output of an early block, a token's whitened representation tells which entity it ends, anywhere in
    a prompt and whatever stands around it:

        subject = c_last - theta_s                         for a subject of one token,
        subject = (c_last + mean_i c_i) / 2 - theta_n      for others,      c = max_t cos(S_early(h_t - mu), s),

    with ``s`` the subject's last token in the edit's own prompt and ``s_i`` the tokens before it, at most eight. One in a
    thousand edits has a subject whose last word stands in a given unrelated question ("The Green *Ripper*"); none has all its
    words there. The first token of a text looks like any other first token, so if the edit's prompt begins with its subject,
    the subject is read inside another prompt. A second key recognises texts that begin with the subject: the same tokens
    precede its last token there, so its vector is nearly the same (cosine 0.9; for a single token 0.85, after the mean of
    common first words is subtracted).

    A prompt that names the edit's answer after its subject ("The capital of Japan, which is not Osaka, is") does not ask for
    it: the gate stays closed if ``cos(S_early(h_t - mu), s') > 0.85`` for a token there, with ``s'`` the answer's last token
    after the edit's own prompt.

    *Relation*: at the edited block, the last token's representation minus the subject's share has the direction of the
    relation. ``c`` is the mean over a few prompts about the same subject, ``phi`` the coordinates of a
    :class:`~baft_intervention.gates.relation_space.RelationSpace`, in which a relation stays the same under another wording and
    another subject, and ``V`` its dictionary of common relations (computed once a model):

        z = phi(u - c),  u = norm(S(h - mu)),      relation = z.e - max(theta_r, max_j z.V_j + margin),      e = z of the edit,

    a nearest-neighbour test: is this prompt closer to the edit's than to any other relation? Rows of ``V`` with the edit's
    meaning (``same_relation``) do not compete. A question is reworded as a question, and its rewordings are near it, so it
    takes a larger margin than an unfinished sentence, whose rewordings may end in any word. A request without a subject has
    ``c = 0``, the plain cosine and no competitors; its ``theta_r`` is calibrated on prompts of its own kind: the dictionary's
    questions for a question, the bank and the dictionary's other forms for the rest.

    A prompt in the edit's words but with another relation ("The mother of X is" for "The father of X is") lies nearer to the
    edit than any paraphrase. So an edit also stores its own sentence with eight other relations in it, ``T_i``, and

        relation <= z.e - max_i z.T_i          where max_i z.T_i > same_sentence.

    If several edits are open at one prompt, the one with the largest ``z.e + subject`` acts: of two about one subject the one
    with the nearer wording, of two with the same wording the one whose subject is named in full.

    Nothing is trained: 21 d + 9 k + 13 stored numbers an edit.

    Args:
        sharpness: ``a``.
        subject_threshold: smallest ``theta_s``; the bank may raise it.
        name_threshold: ``theta_n``; at 0.56, seven in a million pairs of an edit and a question about something else pass.
        relation_threshold: smallest ``theta_r``.
        margin: added to the competitors' similarity; a larger one is stricter, a smaller one more general.
        question_margin: the margin of an edit whose prompt is a question.
        same_sentence: cosine to one of ``T`` above which a prompt is in the edit's own words; paraphrases reach 0.2 to 0.4. 1
            switches this test off.
        same_relation: cosine of the second halves from which a row of ``V`` has the edit's meaning.
        components: ``k``; 0 omits the second half.
        false_positive_rate: share of the bank that may pass each of the two tests.
        read_depth: depth of the early block, as a fraction of all blocks.
    """

    layout = 3
    routed = True
    needs_bank = True
    reads_subject = True
    reads_answer = True
    shared = ("whitening", "subject_whitening", "relations", "starts")
    key: Tensor
    centre: Tensor
    threshold: Tensor
    margin: Tensor
    subject_key: Tensor
    start_key: Tensor
    start_tokens: Tensor
    part_keys: Tensor
    part_share: Tensor
    subject_limit: Tensor
    answer_key: Tensor
    has_subject: Tensor
    template_keys: Tensor

    def __init__(
        self,
        embed_dim: int,
        rank: int,
        *,
        sharpness: float = 60.0,
        subject_threshold: float = 0.6,
        name_threshold: float = 0.56,
        relation_threshold: float = 0.1,
        margin: float = -0.34,
        question_margin: float = 0.0,
        same_relation: float = 0.4,
        same_sentence: float = 0.5,
        components: int = 60,
        false_positive_rate: float = 0.005,
        read_depth: float = 4 / 30,
    ):
        super().__init__(embed_dim, rank)
        if not sharpness > 0:
            raise ConfigError(f"sharpness is {sharpness}; it must be positive")
        if not 0.0 < false_positive_rate < 1.0:
            raise ConfigError(f"false_positive_rate is {false_positive_rate}; it must lie strictly between 0 and 1")
        if components < 0:
            raise ConfigError(f"components is {components}; it must not be negative")
        cosines = {"subject_threshold": subject_threshold, "name_threshold": name_threshold, "margin": margin}
        cosines["relation_threshold"] = relation_threshold
        for name, value in {
            **cosines,
            "question_margin": question_margin,
            "same_relation": same_relation,
            "same_sentence": same_sentence,
        }.items():
            if not -1.0 <= value <= 1.0:
                raise ConfigError(f"{name} is {value}; a cosine must be in [-1, 1]")
        if not 0.0 <= read_depth < 1.0:
            raise ConfigError(f"read_depth is {read_depth}; it must be in [0, 1)")
        self.sharpness, self.same_relation, self.same_sentence = float(sharpness), same_relation, same_sentence
        self.margins = (float(margin), float(question_margin))
        self.subject_threshold, self.name_threshold = subject_threshold, name_threshold
        self.relation_threshold = relation_threshold
        self.false_positive_rate, self.read_depth = false_positive_rate, read_depth
        self.whitening, self.subject_whitening = Whitening(embed_dim), Whitening(embed_dim)
        self.relations = RelationSpace(embed_dim, components)
        self.starts = Directions(embed_dim)
        self.register_buffer("key", torch.zeros(embed_dim + components))  # e; 0: closed until initialised
        self.register_buffer("centre", torch.zeros(embed_dim))  # c
        self.register_buffer("threshold", torch.tensor(float(relation_threshold)))  # theta_r
        self.register_buffer("margin", torch.tensor(float(margin)))
        self.register_buffer("subject_key", torch.zeros(embed_dim))  # s
        self.register_buffer("start_key", torch.zeros(embed_dim))  # s at the start of a text
        self.register_buffer(
            "part_keys", torch.zeros(_PARTS, embed_dim)
        )  # s_i, the last ones first; 0 where there are none
        self.register_buffer("part_share", torch.zeros(_PARTS))  # of the mean
        self.register_buffer("start_tokens", torch.tensor(0.0))  # how many tokens it has at the start of a text
        self.register_buffer("answer_key", torch.zeros(embed_dim))  # s'
        self.register_buffer("subject_limit", torch.tensor(float(subject_threshold)))  # theta_s
        self.register_buffer(
            "template_keys", torch.zeros(_TEMPLATES, embed_dim + components)
        )  # T_i; 0 where there are none
        self.register_buffer("has_subject", torch.tensor(0.0))  # 1 where the edit names a subject

    def _direction(self, h: Tensor) -> Tensor:
        return self.relations(F.normalize(self.whitening(h), dim=-1) - self.centre)

    def _first_word(self, unit: Tensor) -> Tensor:
        return F.normalize(unit - self.starts.directions.mean(0), dim=-1)

    def subject_score(self, h: Tensor) -> Tensor:
        unit = F.normalize(self.subject_whitening(h), dim=-1)
        found = unit @ self.subject_key - self.subject_limit
        found = torch.where(
            (self.part_share.sum() > 0) & (found <= 0), torch.full_like(found, -1.0), found
        )  # no need to look on
        found = torch.maximum(found, self._at_start(unit))
        return torch.where(self.has_subject > 0, found, torch.ones_like(found))

    def name_scores(self, h: Tensor) -> Tensor:
        unit = F.normalize(self.subject_whitening(h), dim=-1)
        others = torch.stack([unit @ self.subject_key, self._at_start(unit)], dim=-1)
        return torch.cat([unit @ self.part_keys.mT, others], dim=-1)

    def combined_subject_score(self, subject_score: Tensor, name_scores: Tensor) -> Tensor:
        found, last, at_start = name_scores[..., :_PARTS], name_scores[..., _PARTS], name_scores[..., _PARTS + 1]
        named = torch.where(
            self.part_share.sum() > 0,
            0.5 * (last + (found * self.part_share).sum(-1)) - self.name_threshold,
            last - self.subject_limit,
        )
        named = torch.maximum(named, at_start)
        named = torch.where(
            named > 0, named, torch.full_like(named, -1.0)
        )  # nearly named is not named, for there are many edits
        return torch.where(self.has_subject > 0, named, subject_score)

    def _at_start(self, unit: Tensor) -> Tensor:
        """Positive if the token ends a subject at the start of the text, where its representation is always the same."""
        along = unit @ self.start_key
        longer = along - _START_LAST_LIMIT
        if len(self.starts.directions):  # the cosine of _first_word, from the same product
            mean = self.starts.directions.mean(0)
            single = (along - mean @ self.start_key) / (unit - mean).norm(dim=-1).clamp(min=1e-12) - _START_LIMIT
        else:
            single = torch.full_like(along, -1.0)
        found = torch.where(self.start_tokens > 1, longer, single)
        return torch.where(self.start_tokens > 0, found, torch.full_like(found, -1.0))

    def answer_score(self, h: Tensor) -> Tensor:
        return F.normalize(self.subject_whitening(h), dim=-1) @ self.answer_key - _ANSWER_LIMIT

    def similarities(self, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``(z.e, max_j z.V_j, max_i z.T_i)`` of the relation test, ``(...)`` each.

        The second is -2 if nothing competes, the third 0 if the edit's sentence has no place for another relation.
        """
        z = self._direction(h)  # (..., d + k)
        own, template = z @ self.key, (z @ self.template_keys.mT).amax(-1)
        if not len(self.relations.rows):
            return own, torch.full_like(own, -2.0), template
        rival = (self.relations.same(self.key) < self.same_relation) & (self.has_subject > 0)  # (m,)
        return own, torch.where(rival, self.relations.nearest(z), -2.0).amax(-1), template

    def match(self, h: Tensor, subject_score: Tensor | None = None) -> Tensor:
        return self._match(*self.similarities(h), subject_score)

    def _match(self, own: Tensor, nearest: Tensor, template: Tensor, subject_score: Tensor | None) -> Tensor:
        relation = own - torch.maximum(self.threshold.expand(own.shape), nearest + self.margin)
        relation = torch.where(template > self.same_sentence, torch.minimum(relation, own - template), relation)
        return relation if subject_score is None else torch.minimum(relation, subject_score)

    def priority(self, h: Tensor, subject_score: Tensor | None = None) -> Tensor:
        own, nearest, template = self.similarities(h)
        match = self._match(own, nearest, template, subject_score)
        named = 0.0 if subject_score is None else self.has_subject * subject_score
        return torch.where(match > 0, own + named, match)

    def forward(self, h: Tensor, subject_score: Tensor | None = None) -> Tensor:
        return gate(self.sharpness, self.match(h, subject_score), self.rank)

    @torch.no_grad()
    def fit_shared(self, bank: Tensor, context: SharedContext | None = None) -> None:
        self.whitening.fit(bank)
        if context is None:
            raise ConfigError("the subject_relation weighting needs the read layer's bank and a relation dictionary")
        self.subject_whitening.fit(context.subject_bank)
        self.starts.directions = F.normalize(self.subject_whitening(context.starts), dim=-1).mean(0, keepdim=True)
        units = F.normalize(self.whitening(context.relations), dim=-1)  # (N, d)
        relation, form, subject = context.design.unbind(1)
        self.relations.fit(units, relation, form, subject, context.centre, competing=context.competing)

    @torch.no_grad()
    def initialise(self, h_edit: Tensor, bank: Tensor | None, context: EditContext | None = None) -> None:
        if bank is None:
            raise ConfigError("the subject_relation weighting needs a bank of unrelated text, got None")
        if context is None:
            plain = F.normalize(F.normalize(self.whitening(h_edit), dim=-1).mean(0), dim=0)
            # the first half alone
            self.key.copy_(F.pad(plain / self.relations.share**0.5, (0, self.key.shape[0] - plain.shape[0])))
            similar = self._direction(bank) @ self.key
            self.threshold.copy_(self._limit(similar, max(self.relation_threshold, 0.2)))
            return
        self.centre.copy_(F.normalize(self.whitening(context.same_subject), dim=-1).mean((0, 1)))
        self.key.copy_(F.normalize(self._direction(h_edit).mean(0), dim=0))
        self.margin.fill_(self.margins[context.question])
        if context.template is not None and context.template_relations is not None:
            keys = self._direction(context.template[:_TEMPLATES])
            # the relation that is nearest in meaning may be the edit's own under another name
            own = int(self.relations.same(self.key).argmax())
            self.template_keys[: len(keys)] = keys * (context.template_relations[:_TEMPLATES] != own).unsqueeze(-1)
        subject = F.normalize(self.subject_whitening(context.subject), dim=-1).mean(0)
        self.subject_key.copy_(F.normalize(subject, dim=0))
        similar = F.normalize(self.subject_whitening(context.subject_bank), dim=-1) @ self.subject_key
        self.subject_limit.copy_(self._limit(similar, self.subject_threshold))
        if context.name is not None and len(context.name):
            keys = F.normalize(self.subject_whitening(context.name), dim=-1).flip(0)[:_PARTS]
            self.part_keys[: len(keys)] = keys
            self.part_share[: len(keys)] = 1.0 / len(keys)
            self.subject_limit.fill_(min(_LAST_LIMIT, self.name_threshold))
        if context.start_tokens:
            start = F.normalize(self.subject_whitening(context.start), dim=-1)
            start = (self._first_word(start) if context.start_tokens == 1 else start).mean(0)
            self.start_key.copy_(F.normalize(start, dim=0))
            self.start_tokens.fill_(float(context.start_tokens))
        if context.answer is not None and len(context.answer) == 1:  # of several answers none is the edit's
            self.answer_key.copy_(F.normalize(self.subject_whitening(context.answer[0]), dim=-1))
        self.has_subject.fill_(1.0)

    def _limit(self, similar: Tensor, least: float) -> Tensor:
        """The similarity that only ``false_positive_rate`` of the bank exceeds, at least ``least``."""
        return torch.quantile(similar.float(), 1.0 - self.false_positive_rate).clamp(min=least, max=0.95)
