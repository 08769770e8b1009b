"""Two adapters as one, and whose edit stays where both answer the same prompt."""

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
    """One prompt, two answers.

    Args:
        prompt: what both adapters have edited.
        ours, theirs: the targets.
        ours_id, theirs_id: the edits.
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
        added: ids of edits that came in.
        replaced: ids of edits that went out for one that came in.
        same: ids of edits that both have: same prompt, subject and target; ours stayed.
        renamed: their id -> id here, where another edit had it already.
        conflicts: prompts with two answers.
        kept: whose answer stayed in each conflict.
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
    """Which of their edits come in, under which ids, and the report; nothing is changed.

    Raises:
        ConfigError: ``on_conflict`` is none of its values.
        AdapterError: edits that add up, which were trained on top of each other; or conflicts that are errors.
    """
    if on_conflict not in get_args(OnConflict):
        raise ConfigError(f"on_conflict is {on_conflict!r}; it must be one of {', '.join(get_args(OnConflict))}")
    if not ours.routed and theirs:
        raise AdapterError(
            f"the edits of weighting {ours.config.weighting!r} add up and were trained on top of each other; only adapters "
            "whose edits compete (cosine, subject_relation) can be merged"
        )
    coming: list[Edit] = []
    replaced, same, conflicts, renamed = [], [], [], {}
    taken = {edit.id for edit in ours.edits}
    for edit in theirs:
        request = edit.requests[0]  # where edits compete, each has one
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
            coming.append(edit)
    if conflicts and on_conflict == "error":
        first = conflicts[0]
        raise AdapterError(
            f"{len(conflicts)} prompt{'s have' if len(conflicts) > 1 else ' has'} two answers, e.g. {first.prompt!r}: ours "
            f"{first.ours!r}, theirs {first.theirs!r}; nothing was merged; say which stays: on_conflict 'ours' or 'theirs'"
        )
    added = []
    for edit in coming:
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
    ours: Mapping[int, Mapping[str, Tensor]], theirs: Mapping[int, Mapping[str, Tensor]], where: str
) -> None:
    """Refuse edits whose gates were fitted to another bank: what they measure is not what the gates here measure.

    Args:
        ours, theirs: ``layer -> {name: tensor}``, what the edits of each adapter share.
        where: begins the message.

    Raises:
        AdapterError: a shared tensor differs by more than 1e-4 (two machines may differ by rounding).
    """
    for layer, own in ours.items():
        for name, tensor in own.items():
            other = theirs[layer][name]
            if other.shape != tensor.shape or not torch.allclose(other, tensor, atol=1e-4):
                raise AdapterError(
                    f"{where}its gates were fitted to another bank ({name!r} of layer {layer} differs), so its edits cannot be "
                    "put beside these; make them again with the same version and bank_texts"
                )
