"""The base class of weighting networks, what they are fitted to, and their registry."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from ..errors import ConfigError
from ..registry import registrar

_REGISTRY: dict[str, type[WeightingNetwork]] = {}
_Network = TypeVar("_Network", bound="type[WeightingNetwork]")


@dataclass(frozen=True)
class SharedContext:
    """Data for :meth:`WeightingNetwork.fit_shared`, once a model and layer (made by ``training/gate_initialisation.py``).

    Args:
        subject_bank: ``(N, d)`` unrelated representations at the read layer.
        starts: ``(K, d)`` read-layer representations of common words at the start of a text.
        relations: ``(N, d)`` last-token representations of the dictionary's prompts.
        design: ``(N, 3)`` indices of each prompt's relation, form and subject.
        centre: indices of the relations in an edit's :attr:`EditContext.same_subject`.
        competing: indices of the forms that an edit competes with.
    """

    subject_bank: Tensor
    starts: Tensor
    relations: Tensor
    design: Tensor
    centre: Tensor
    competing: tuple[int, ...] = (0,)


@dataclass(frozen=True)
class EditContext:
    """Data for :meth:`WeightingNetwork.initialise` beside the edit's own representations.

    Args:
        subject: ``(n, d)`` representations of the subject's last token at the read layer, one a request.
        start: ``(n, d)`` the same, with the subject at the start of a text.
        start_tokens: number of its tokens there; 0 if texts begin with a special token, or for several requests whose
            subjects are not single tokens.
        same_subject: ``(n, k, d)`` last-token representations of a few prompts about the same subject.
        subject_bank: ``(N, d)`` unrelated representations at the read layer.
        question: whether every prompt is a question.
        answer: ``(n, d)`` representations at the read layer of the target's last token, after the prompt.
        name: ``(m, d)`` representations at the read layer of the subject's tokens before its last; None for several requests.
        template: ``(k, d)`` last-token representations of the prompt with other relations in place of its own; None for
            several requests, or if the prompt has no place for a relation.
        template_relations: ``(k,)`` indices of these relations.
    """

    subject: Tensor
    start: Tensor
    start_tokens: int
    same_subject: Tensor
    subject_bank: Tensor
    question: bool = False
    answer: Tensor | None = None
    name: Tensor | None = None
    template: Tensor | None = None
    template_relations: Tensor | None = None


class WeightingNetwork(nn.Module):
    """Base class: ``forward(h (..., d)) -> w (..., r)``, fp32 in and out.

    Class attributes:
        routed: whether the network has a :meth:`match`. Edits with a routed network compete, and only the edit with the
            highest :meth:`priority` acts at a position; otherwise the updates of all edits are summed.
        needs_bank: whether :meth:`initialise` needs unrelated representations.
        reads_subject: whether :meth:`match` uses :meth:`subject_score`, read at an earlier layer, the read layer.
        reads_answer: whether :meth:`answer_score` finds the edit's answer in a prompt, which then does not ask for it.
        shared: names of submodules that all edits of a layer share.
        layout: version of its saved tensors. Raise it when their names, shapes or meaning change, so that older adapters
            are refused with a reason.
    """

    routed: ClassVar[bool] = False
    needs_bank: ClassVar[bool] = False
    reads_subject: ClassVar[bool] = False
    reads_answer: ClassVar[bool] = False
    shared: ClassVar[tuple[str, ...]] = ()
    layout: ClassVar[int] = 1
    read_depth: float = 0.0

    def __init__(self, embed_dim: int, rank: int):
        super().__init__()
        self.embed_dim, self.rank = embed_dim, rank

    def forward(self, h: Tensor, subject_score: Tensor | None = None) -> Tensor:
        """``w(h)``; ``subject_score (...)`` is None unless the network ``reads_subject`` and the read layer has run."""
        raise NotImplementedError

    def match(self, h: Tensor, subject_score: Tensor | None = None) -> Tensor:
        """``(...,)``: positive if the input belongs to the edit."""
        raise NotImplementedError(f"{type(self).__name__} is not routed: it has no match")

    def priority(self, h: Tensor, subject_score: Tensor | None = None) -> Tensor:
        """``(...,)``: the competing edit with the largest priority acts; positive exactly where :meth:`match` is."""
        return self.match(h, subject_score)

    def subject_score(self, h: Tensor) -> Tensor:
        """``h (..., d)`` at the read layer -> ``(...,)``: positive if the token may end the subject.

        The largest value over a prompt enters :meth:`match`, refined by :meth:`combined_subject_score` if it is positive.
        """
        raise NotImplementedError(f"{type(self).__name__} reads no subject")

    def name_scores(self, h: Tensor) -> Tensor:
        """``h (..., d)`` at the read layer -> ``(..., k)``: the token's similarity to each key of the name."""
        return h.new_zeros(*h.shape[:-1], 0)

    def combined_subject_score(self, subject_score: Tensor, name_scores: Tensor) -> Tensor:
        """A prompt's score ``(...,)`` from its tokens' largest :meth:`subject_score` and :meth:`name_scores` ``(..., k)``."""
        return subject_score

    def of_prompt(self, h: Tensor) -> Tensor:
        """The subject score ``()`` of a prompt with tokens ``h (T, d)``, without :meth:`answer_score`."""
        best = self.subject_score(h).amax(0)
        return torch.where(best > 0, self.combined_subject_score(best, self.name_scores(h).amax(0)), best)

    def answer_score(self, h: Tensor) -> Tensor:
        """``h (..., d)`` at the read layer -> ``(...,)``: positive if the token ends the edit's answer.

        If such a token follows the subject, the subject score becomes minus the largest value.
        """
        raise NotImplementedError(f"{type(self).__name__} reads no answer")

    def read_layer(self, layers: Sequence[int], num_layers: int) -> int:
        """The block whose output :meth:`subject_score` reads: at ``read_depth``, and not above the lowest edited block."""
        return min(round(self.read_depth * num_layers), *layers)

    def fit_shared(self, bank: Tensor, context: SharedContext | None = None) -> None:
        """Fit the ``shared`` submodules to the bank ``(N, d)``, once a model and layer. The default does nothing."""

    @torch.no_grad()
    def initialise(self, h_edit: Tensor, bank: Tensor | None, context: EditContext | None = None) -> None:
        """Initialise from data, once before training. The default does nothing.

        Args:
            h_edit: ``(n, d)`` representations of the edit's own prompts at the positions that are edited.
            bank: ``(N, d)`` unrelated representations.
            context: only for a network that ``reads_subject``, if the requests name subjects.
        """


def register_weighting(name: str) -> Callable[[_Network], _Network]:
    """Class decorator: make a network known as ``name`` to configs, adapters and the command line.

    Raises:
        ConfigError: the name is taken by another class.
    """
    return registrar(_REGISTRY, name, "weighting name")


def weighting_names() -> tuple[str, ...]:
    return tuple(sorted(_REGISTRY))


def weighting_class(name: str) -> type[WeightingNetwork]:
    """The registered class.

    Raises:
        ConfigError: no network has this name; the message lists the known ones.
    """
    if name not in _REGISTRY:
        raise ConfigError(f"weighting is {name!r}; known networks: {', '.join(weighting_names())}")
    return _REGISTRY[name]


def make_weighting(name: str, embed_dim: int, rank: int, **options: Any) -> WeightingNetwork:
    """Build a network.

    Raises:
        ConfigError: an unknown name, or an option that the network does not take.
    """
    cls = weighting_class(name)
    try:
        return cls(embed_dim, rank, **options)
    except TypeError as error:
        raise ConfigError(f"weighting_options {options!r} do not fit the weighting {name!r}: {error}") from None
