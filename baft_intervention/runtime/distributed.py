"""Several processes as one: a thin layer over ``torch.distributed``, and nothing at all in one process.

``torchrun`` and ``accelerate launch`` start W processes, each with a *rank* 0 to W - 1 and a model of its own. What is
independent (edits that compete, records of an evaluation) is shared out over ranks and gathered; what is one thing (an
edit of several requests) is trained by all of them (:class:`DataParallel`); files are written by rank 0 alone. Every rank calls
the same methods in the same order, and ends with the same edits.

An error on one rank is raised on every rank, so that none waits for one that has given up. A rank that is killed takes
the others with it: the launcher ends them.
"""

from __future__ import annotations

import contextlib
import contextvars
import datetime
import os
import pickle
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import EditError

T = TypeVar("T")

# one rank may be writing its bank, or waiting for a slow disk; that a rank has died is noticed without it
_PATIENCE = datetime.timedelta(hours=6)
_alone: contextvars.ContextVar[bool] = contextvars.ContextVar("alone", default=False)


def world_size() -> int:
    """W, how many processes work together; 1 where no process group is initialised, and inside :func:`alone`."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() and not _alone.get() else 1


def rank() -> int:
    """This process's number, 0 to W - 1."""
    return dist.get_rank() if world_size() > 1 else 0


def is_main() -> bool:
    """Whether this is rank 0, which writes files and shows results."""
    return rank() == 0


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Inside, this process is the only one: what it edits is its own matter, and no other rank waits for it."""
    token = _alone.set(True)
    try:
        yield
    finally:
        _alone.reset(token)


@contextlib.contextmanager
def processes() -> Iterator[None]:
    """Inside, the processes that ``torchrun`` or ``accelerate launch`` started are one group.

    Nothing happens in a process that was started alone, or where a group is there already. Each rank takes the GPU of its
    local rank, if there are any. The group speaks gloo: what it carries is small, and ranks may share a GPU.
    """
    started = int(os.environ.get("WORLD_SIZE", "1")) > 1 and "RANK" in os.environ
    if not started or not dist.is_available() or dist.is_initialized():
        yield
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    dist.init_process_group("gloo", timeout=_PATIENCE)
    try:
        yield
    finally:
        dist.destroy_process_group()


def shard(items: Sequence[T]) -> Sequence[T]:
    """This rank's share: every W-th, beginning with its own number."""
    return items[rank() :: world_size()]


def unshard(parts: Sequence[Sequence[T]]) -> list[T]:
    """The items of all ranks in their first order, from the shares in the order of ranks."""
    return [parts[i % len(parts)][i // len(parts)] for i in range(sum(len(part) for part in parts))]


def gather(make: Callable[[], T]) -> list[T]:
    """What ``make()`` gives on each rank, in the order of ranks, on every rank.

    Raises:
        Exception: that of the lowest rank on which ``make()`` failed, on every rank.
    """
    if world_size() == 1:
        return [make()]
    found: list[Any] = [None] * world_size()
    dist.all_gather_object(found, _outcome(make))
    return [_value(k, outcome) for k, outcome in enumerate(found)]


def from_main(make: Callable[[], T]) -> T:
    """What ``make()`` gives on rank 0, on every rank; it is not called on others, and its error is raised on all."""
    if world_size() == 1:
        return make()
    found: list[Any] = [_outcome(make) if is_main() else None]
    dist.broadcast_object_list(found, src=0)
    return _value(0, found[0])


def _outcome(make: Callable[[], Any]) -> tuple[Any, Exception | None]:
    try:
        return make(), None
    except Exception as error:
        try:
            pickle.loads(pickle.dumps(error))
        except Exception:  # an error of somebody's own that cannot travel
            error = RuntimeError(f"{type(error).__name__}: {error}")
        return None, error


def _value(number: int, outcome: tuple[Any, Exception | None]) -> Any:
    value, error = outcome
    if error is not None:
        if number != rank():
            error.__cause__ = RuntimeError(f"raised on rank {number}")
        raise error
    return value


@dataclass(frozen=True)
class DataParallel:
    """One edit that all ranks train at once, each on some of its rows.

        loss = sum over ranks of share * (mean loss of the rank's rows),   gradient likewise

    so that it is the loss of one process on all rows, and every rank takes the same step.

    Args:
        share: this rank's rows over all rows; 0 where there are fewer rows than ranks, and the rank repeats one.
    """

    share: float

    @classmethod
    def of(cls, rows: Sequence[T]) -> tuple[DataParallel, Sequence[T]]:
        """This rank's part in training ``rows``, and the rows that it takes."""
        own = shard(rows)
        return cls(len(own) / len(rows)), own or rows[:1]

    def sum(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Sums over ranks, the same bits on every rank; shapes, dtypes and devices are kept.

        Raises:
            EditError: another rank has failed.
        """
        self._check(failed=False)
        flat = torch.cat([tensor.detach().flatten().double() for tensor in tensors]).to(_device())
        dist.all_reduce(flat)
        parts = flat.split([tensor.numel() for tensor in tensors])
        return [part.to(like).view_as(like) for part, like in zip(parts, tensors, strict=True)]

    def mean(self, values: Sequence[Tensor]) -> list[Tensor]:
        """Means over the edit's rows, from means over this rank's."""
        return self.sum([self.share * value for value in values])

    def use(self, weights: Tensor, used: Tensor) -> tuple[Tensor, Tensor]:
        """``(own weights (..., n, r), used (..., r))`` with which a rank's loss has its part of the gradient of all.

        What the other ranks' positions use counts as used already; a rank that repeats a row uses nothing.
        """
        own = weights if self.share else weights * 0
        return own, used + self.total(weights) - own.detach().sum(-2)

    def total(self, weights: Tensor) -> Tensor:
        """Use of the bases ``(..., r)`` by all rows of the edit, from the weights ``(..., n, r)`` of this rank's."""
        return self.sum([weights.detach().sum(-2) * float(self.share > 0)])[0]

    def all(self, value: bool) -> bool:
        """Whether ``value`` is true on every rank."""
        return float(self.sum([torch.tensor(float(not value))])[0]) == 0

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Inside, an error of this rank reaches the others at their next :meth:`sum`."""
        try:
            yield
        except _Elsewhere:
            raise
        except Exception:
            with contextlib.suppress(_Elsewhere):
                self._check(failed=True)
            raise

    def _check(self, *, failed: bool) -> None:
        flag = torch.tensor([float(failed)], device=_device())
        dist.all_reduce(flag)
        if flag.item() > 0:
            raise _Elsewhere("another rank could not go on with an edit that all ranks train; its own error says why")


class _Elsewhere(EditError):
    """Another rank has failed."""


def _device() -> torch.device:
    """Where tensors must lie to be sent: NCCL alone takes those of a GPU only."""
    return torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")
