"""What a weighting network is, and the registry of them."""

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
    """What a network may fit once a model and layer, beside the bank (see ``training/start.py``).

    Args:
        subject_bank: ``(N, d)`` unrelated representations at the read layer.
        starts: ``(K, d)`` representations at the read layer of common words that begin a text.
        relations: ``(N, d)`` last-token representations of the dictionary's prompts.
        design: ``(N, 3)`` numbers of each prompt's relation, form and subject.
        centre: numbers of the relations that an edit's :attr:`EditContext.same_subject` asks.
        competing: numbers of the forms that an edit is to be told from.
    """

    subject_bank: Tensor
    starts: Tensor
    relations: Tensor
    design: Tensor
    centre: Tensor
    competing: tuple[int, ...] = (0,)


@dataclass(frozen=True)
class EditContext:
    """What a network may start from beside the edit's own representations.

    Args:
        subject: ``(n, d)`` representations of the subject's last token at the read layer, one a request.
        start: ``(n, d)`` the same where the subject begins a text.
        start_tokens: how many tokens it has there; 0 where a text begins with a special token, and for several requests whose
            subjects are not single tokens.
        same_subject: ``(n, k, d)`` last-token representations of a few prompts about the same subject.
        subject_bank: ``(N, d)`` unrelated representations at the read layer.
        question: whether every prompt is a question.
        answer: ``(n, d)`` representations at the read layer of the target's last token, behind the prompt.
        name: ``(m, d)`` representations at the read layer of the subject's tokens before its last; None for several requests.
        template: ``(k, d)`` last-token representations of the prompt with other relations in the place of its own; None for
            several requests, and where there are none.
        template_relations: the numbers of these relations, ``(k,)``.
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
        routed: whether :meth:`match` tells if an input is the edit's. The edits of an adapter with a routed network compete,
            and only that of the highest :meth:`priority` acts; otherwise the updates of all edits are summed.
        needs_bank: whether :meth:`initialise` needs unrelated representations.
        reads_subject: whether :meth:`subject_score` of an earlier layer, the read layer, enters :meth:`match`.
        reads_answer: whether :meth:`answer_score` tells where the edit's answer is named: what is answered is not asked.
        shared: names of submodules that all edits of a layer have in common.
        layout: number of the form that its saved tensors have; raise it where their names, shapes or meaning change, so that
            adapters of before are refused with a reason.
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
        """``w(h)``; ``subject_score (...)`` comes only to a network that ``reads_subject``, None where it was not read."""
        raise NotImplementedError

    def match(self, h: Tensor, subject_score: Tensor | None = None) -> Tensor:
        """``(...,)``: above 0 where the input is taken to be the edit's."""
        raise NotImplementedError(f"{type(self).__name__} is not routed: it has no match")

    def priority(self, h: Tensor, subject_score: Tensor | None = None) -> Tensor:
        """``(...,)``: of competing edits that with the largest acts; above 0 exactly where :meth:`match` is."""
        return self.match(h, subject_score)

    def subject_score(self, h: Tensor) -> Tensor:
        """``h (..., d)`` at the read layer -> ``(...,)``: above 0 where the token may end the subject.

        Its largest value over a prompt enters :meth:`match`, where it is above 0 by way of :meth:`combined_subject_score`.
        """
        raise NotImplementedError(f"{type(self).__name__} reads no subject")

    def name_scores(self, h: Tensor) -> Tensor:
        """``h (..., d)`` at the read layer -> ``(..., k)``: the token's similarity to each key of the name."""
        return h.new_zeros(*h.shape[:-1], 0)

    def combined_subject_score(self, subject_score: Tensor, name_scores: Tensor) -> Tensor:
        """A prompt's score ``(...,)`` from its tokens' largest :meth:`subject_score` and :meth:`name_scores` ``(..., k)``."""
        return subject_score

    def of_prompt(self, h: Tensor) -> Tensor:
        """The subject score ``()`` of a prompt's tokens ``h (T, d)``; :meth:`answer_score` is not looked at."""
        best = self.subject_score(h).amax(0)
        return torch.where(best > 0, self.combined_subject_score(best, self.name_scores(h).amax(0)), best)

    def answer_score(self, h: Tensor) -> Tensor:
        """``h (..., d)`` at the read layer -> ``(...,)``: above 0 where the token ends the edit's answer.

        Where one stands behind the subject, the largest value is taken for *minus* the subject score.
        """
        raise NotImplementedError(f"{type(self).__name__} reads no answer")

    def read_layer(self, layers: Sequence[int], num_layers: int) -> int:
        """The block whose output :meth:`subject_score` reads: ``read_depth`` of the depth, at most the lowest edited one."""
        return min(round(self.read_depth * num_layers), *layers)

    def fit_shared(self, bank: Tensor, context: SharedContext | None = None) -> None:
        """Fit what all edits of a layer share to the bank ``(N, d)``; once a model and layer. Nothing by default."""

    @torch.no_grad()
    def initialise(self, h_edit: Tensor, bank: Tensor | None, context: EditContext | None = None) -> None:
        """Start from data: ``h_edit (n, d)``, the edit's own representations, and ``bank (N, d)``, unrelated ones.

        Called once before training, at the positions that will be edited. ``context`` comes to a network that
        ``reads_subject``, where the requests name subjects. Nothing by default.
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
        ConfigError: no network of this name; the message lists those that there are.
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
