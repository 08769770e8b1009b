"""Several processes working as one: a thin layer over ``torch.distributed`` that does nothing in a single process.

``torchrun`` and ``accelerate launch`` start W processes, each with a *rank* 0 to W - 1 and its own model. Independent work (edits
that compete, records of an evaluation) is sharded over ranks and gathered. One edit of several requests is trained data-parallel
(:class:`DataParallel`). Only rank 0 writes files. All ranks call the same methods in the same order and end with the same edits.

An error on one rank is raised on every rank, so that no rank waits for one that has failed. If a rank is killed, the launcher
ends the others.
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

# a rank may wait long for another that prepares a bank or writes to a slow disk; the launcher notices a dead rank
_PATIENCE = datetime.timedelta(hours=6)
_alone: contextvars.ContextVar[bool] = contextvars.ContextVar("alone", default=False)


def world_size() -> int:
    """W, the number of processes; 1 without a process group and inside :func:`alone`."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() and not _alone.get() else 1


def rank() -> int:
    """This process's number, 0 to W - 1."""
    return dist.get_rank() if world_size() > 1 else 0


def is_main() -> bool:
    """Whether this is rank 0, the one that writes files and shows results."""
    return rank() == 0


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Inside, this process acts as if it were the only one; no other rank waits for it."""
    token = _alone.set(True)
    try:
        yield
    finally:
        _alone.reset(token)


@contextlib.contextmanager
def processes() -> Iterator[None]:
    """Inside, the processes that ``torchrun`` or ``accelerate launch`` started form one group.

    Does nothing in a process that was started alone, or if a group exists already. Each rank takes the GPU of its local rank, if
    there is one. The backend is gloo: messages are small, and ranks may share a GPU.
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
    """This rank's share: every W-th item, starting at its own number."""
    return items[rank() :: world_size()]


def unshard(parts: Sequence[Sequence[T]]) -> list[T]:
    """The inverse of :func:`shard`: all items in their original order, from the shares in rank order."""
    return [parts[i % len(parts)][i // len(parts)] for i in range(sum(len(part) for part in parts))]


def gather(make: Callable[[], T]) -> list[T]:
    """The results of ``make()`` of all ranks, in rank order, on every rank.

    Raises:
        Exception: the error of the lowest rank on which ``make()`` failed, raised on every rank.
    """
    if world_size() == 1:
        return [make()]
    found: list[Any] = [None] * world_size()
    dist.all_gather_object(found, _outcome(make))
    return [_value(k, outcome) for k, outcome in enumerate(found)]


def from_main(make: Callable[[], T]) -> T:
    """Rank 0's result of ``make()``, on every rank; other ranks do not call it, and its error is raised on all."""
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
        except Exception:  # a user's error that cannot be pickled
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
    """One edit trained by all ranks at once, each on some of its rows.

        loss = sum over ranks of share * (mean loss of the rank's rows),   gradient likewise

    which is the loss of one process on all rows; every rank takes the same step.

    Args:
        share: this rank's rows over all rows; 0 if there are fewer rows than ranks, and this rank repeats one.
    """

    share: float

    @classmethod
    def of(cls, rows: Sequence[T]) -> tuple[DataParallel, Sequence[T]]:
        """This rank's part in training ``rows``, and its rows."""
        own = shard(rows)
        return cls(len(own) / len(rows)), own or rows[:1]

    def sum(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Sums over ranks, bit-equal on every rank; shapes, dtypes and devices are kept.

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
        """``(own weights (..., n, r), used (..., r))`` for the balance loss, so that the ranks' gradients sum to one process's.

        The other ranks' use of the bases counts as used already; a rank that repeats a row uses nothing.
        """
        own = weights if self.share else weights * 0
        return own, used + self.total(weights) - own.detach().sum(-2)

    def total(self, weights: Tensor) -> Tensor:
        """Use of the bases ``(..., r)`` by all rows of the edit, from this rank's weights ``(..., n, r)``."""
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
            raise _Elsewhere("another rank failed while all ranks trained one edit; its own error says why")


class _Elsewhere(EditError):
    """Another rank has failed."""


def _device() -> torch.device:
    """The device that tensors must be on to be sent: the GPU with NCCL, else the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")
