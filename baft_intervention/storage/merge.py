"""Merging two adapters, and resolving conflicts where both edit the same prompt."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from ..errors import AdapterError, ConfigError
from ..runtime.adapter import BaftAdapter, Edit

OnConflict = Literal["error", "ours", "theirs"]


@dataclass(frozen=True)
class Conflict:
    """A prompt to which two adapters give different answers.

    Args:
        prompt: the prompt that both adapters edit.
        ours, theirs: the target of each adapter.
        ours_id, theirs_id: ids of the two edits.
    """

    prompt: str
    ours: str
    theirs: str
    ours_id: str
    theirs_id: str


@dataclass(frozen=True)
class MergeReport:
    """What a merge did.

    Args:
        added: ids of the edits that were added.
        replaced: ids of our edits that an added edit replaced.
        same: ids of our edits that the other adapter also has, with the same prompt, subject and target; ours were kept.
        renamed: old id -> new id of each added edit whose id was already taken.
        conflicts: prompts to which the adapters give different answers.
        kept: whose answer was kept in each conflict.
    """

    added: tuple[str, ...]
    replaced: tuple[str, ...]
    same: tuple[str, ...]
    renamed: Mapping[str, str]
    conflicts: tuple[Conflict, ...]
    kept: OnConflict

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def plan_merge(ours: BaftAdapter, theirs: Sequence[Edit], on_conflict: OnConflict) -> tuple[list[Edit], MergeReport]:
    """Plan a merge without changing anything: ``(edits to add, report)``.

    Args:
        ours: the adapter to merge into.
        theirs: edits of the other adapter.
        on_conflict: whose edit to keep if both edit the same prompt; ``"error"`` refuses the merge.

    Raises:
        ConfigError: ``on_conflict`` has an unknown value.
        AdapterError: the edits add up instead of competing, or there are conflicts and ``on_conflict`` is ``"error"``.
    """
    if on_conflict not in get_args(OnConflict):
        raise ConfigError(f"on_conflict is {on_conflict!r}; it must be one of {', '.join(get_args(OnConflict))}")
    if not ours.routed and theirs:
        raise AdapterError(
            f"the edits of weighting {ours.config.weighting!r} add up and were trained on top of each other; only adapters "
            "whose edits compete (fact, cosine) can be merged"
        )
    incoming: list[Edit] = []
    replaced, same, conflicts, renamed = [], [], [], {}
    taken = {edit.id for edit in ours.edits}
    for edit in theirs:
        request = edit.requests[0]  # edits that compete have one request each
        for own in ours.asking([request.prompt]):
            known = own.requests[0]
            if (known.target_new, known.subject) == (request.target_new, request.subject):
                same.append(own.id)
                break
            conflicts.append(Conflict(request.prompt, known.target_new, request.target_new, own.id, edit.id))
            if on_conflict != "theirs":
                break
            replaced.append(own.id)
            taken.discard(own.id)
        else:
            incoming.append(edit)
    if conflicts and on_conflict == "error":
        first = conflicts[0]
        raise AdapterError(
            f"{len(conflicts)} prompt{'s have' if len(conflicts) > 1 else ' has'} two answers, e.g. {first.prompt!r}: ours "
            f"{first.ours!r}, theirs {first.theirs!r}; nothing was merged; choose which to keep: on_conflict 'ours' or 'theirs'"
        )
    added = []
    for edit in incoming:
        name, count = edit.id, 2
        while name in taken:
            name, count = f"{edit.id}-{count}", count + 1
        taken.add(name)
        if name != edit.id:
            renamed[edit.id] = name
            requests = (dataclasses.replace(edit.requests[0], id=name),)
            edit = dataclasses.replace(edit, id=name, requests=requests)
        added.append(edit)
    report = MergeReport(
        tuple(e.id for e in added), tuple(replaced), tuple(same), renamed, tuple(conflicts), on_conflict
    )
    return added, report


def check_same_coordinates(
    ours: Mapping[int, Mapping[str, Tensor]], theirs: Mapping[int, Mapping[str, Tensor]], source: str
) -> None:
    """Check that the gates of two adapters were fitted to the same bank, so that their values are comparable.

    Args:
        ours, theirs: ``layer -> {name: tensor}``, the tensors that all edits of an adapter share.
        source: prefix of the error message.

    Raises:
        AdapterError: a shared tensor differs by more than 1e-4 (rounding may differ between machines).
    """
    for layer, own in ours.items():
        for name, tensor in own.items():
            other = theirs[layer][name]
            if other.shape != tensor.shape or not torch.allclose(other, tensor, atol=1e-4):
                raise AdapterError(
                    f"{source}its gates were fitted to another bank ({name!r} of layer {layer} differs), so its edits cannot "
                    "join these; edit again with the same version and bank_texts"
                )
