"""What training takes: encoded rows, jobs, and the context of an edit. It returns :class:`~..runtime.adapter.Edit`\\ s."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from ..core.basis_map import BasisWeightedMap
from ..models.tokenization import IGNORE_INDEX
from ..requests import EditRequest


@dataclass(frozen=True)
class TrainingRow:
    """A request as token ids: prompt, target, and the columns that are edited.

    Args:
        ids: prompt, target and ending.
        labels: the same, with ``IGNORE_INDEX`` in the prompt.
        positions: the edited columns.
        ending: how many of the last ids are the ending, which follows the target.
        ending_coefficient: weight of the ending's loss; the target's has weight 1.
    """

    ids: list[int]
    labels: list[int]
    positions: list[int]
    ending: int = 0
    ending_coefficient: float = 1.0

    @property
    def stages(self) -> list[int]:
        """For each edited column, how many of the answer's tokens stand up to it; 0 on the prompt."""
        return [max(0, column - self.prompt_length + 1) for column in self.positions]

    def token_weights(self) -> tuple[list[float], list[float]]:
        """The weight of each label in the row's loss, and its weight in the mean over the target alone."""
        target = len(self.labels) - self.prompt_length - self.ending
        mean = [1.0 / target] * target + [0.0] * self.ending
        if not self.ending:
            return mean, mean
        return mean[:target] + [self.ending_coefficient / self.ending] * self.ending, mean

    @property
    def prompt_length(self) -> int:
        """The number of prompt ids: those before the first label."""
        return next(i for i, label in enumerate(self.labels) if label != IGNORE_INDEX)


@dataclass(frozen=True)
class EncodedRequest:
    """A rendered request and its row, which travel together from the editor's checks to training."""

    request: EditRequest
    row: TrainingRow


@dataclass(frozen=True)
class Job:
    """One edit to train: a request, or a joint group of requests.

    Args:
        requests: what is asked.
        rows: the encoded requests, in order, then their augmentations.
        maps: ``layer -> map``, seeded and with initialised gates; training changes them in place.
    """

    requests: tuple[EditRequest, ...]
    rows: tuple[TrainingRow, ...]
    maps: Mapping[int, BasisWeightedMap]


@dataclass
class TrainingContext:
    """What an edit is trained beside.

    Args:
        bank: ``layer -> (N, d)``, unrelated representations; or empty.
        used: ``layer -> (r,)``, the use of the bases by earlier edits.
        texts: ids of unrelated texts, for the output loss; or empty.
        earlier: ``layer -> function (P, d) -> (P, d)``, the summed update of earlier edits; empty where edits compete.
    """

    bank: Mapping[int, Tensor] = field(default_factory=dict)
    used: Mapping[int, Tensor] = field(default_factory=dict)
    texts: Sequence[Sequence[int]] = ()
    earlier: Mapping[int, Callable[[Tensor], Tensor]] = field(default_factory=dict)
