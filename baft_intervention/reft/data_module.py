"""Edits as a data set for pyreft's trainers and :class:`~baft_intervention.reft.trainer.BaftTrainer`.

Rows hold plain lists of one length each, no padding; the collator pads a batch on the tokenizer's side and moves the
intervention locations with the text, which pyreft's own collator does not.

Ragged locations (``subject_all``, ``prompt``, …) must become a rectangle, because pyvene takes one list of equal
length a row. Repeating a location would do for the value, but pyvene writes representations back by index, and the
gradient of a position written twice counts twice. The filler is therefore a padding column, behind (or before) all
text: nothing attends to it and no label stands there, so it changes neither value nor gradient. A batch in which the
longest row needs a filler is padded by one more column.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import datasets
import torch
from torch import Tensor

from ..config import BaftConfig
from ..core.positions import PositionRule, pad_locations
from ..errors import ConfigError, DataError
from ..models.chat import render_request
from ..models.tokenization import IGNORE_INDEX, pad_rows, pad_token_id
from ..requests import EditRequest
from ..training.encoding import encode_request

COLUMNS = ("input_ids", "labels", "attention_mask", "intervention_locations")
_FIELDS = ("prompt", "target_new", "subject")  # what is read of a row; other columns are left alone


@dataclass(frozen=True)
class EditCollator:
    """Pad rows of :func:`make_edit_data_module` to a batch.

    Args:
        pad_id: id of padding; the attention mask is made from lengths, so it may be a real token's id.
        side: ``right`` or ``left``; locations move with the text.

    Returns of a call: ``input_ids``, ``attention_mask``, ``labels`` ``(B, T)`` and ``intervention_locations``
    ``(B, I, P)``, all int64; I interventions, P positions.
    """

    pad_id: int
    side: str = "right"

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        texts = [list(row["input_ids"]) for row in rows]
        places = [[list(one) for one in row["intervention_locations"]] for row in rows]
        count = max(len(one) for place in places for one in place)
        short = [any(len(one) < count for one in place) for place in places]
        width = max(len(text) + needs for text, needs in zip(texts, short, strict=True))  # room for a filler
        ids, mask = pad_rows(texts, self.pad_id, self.side, width)
        labels, _ = pad_rows([list(row["labels"]) for row in rows], IGNORE_INDEX, self.side, width)
        left = self.side == "left"
        filler = 0 if left else width - 1
        locations = []
        for text, place in zip(texts, places, strict=True):
            shift = width - len(text) if left else 0
            locations.append([pad_locations([i + shift for i in one], count, filler) for one in place])
        return {
            "input_ids": ids,
            "attention_mask": mask,
            "labels": labels,
            "intervention_locations": torch.tensor(locations, dtype=torch.long),
        }


def make_edit_data_module(
    tokenizer: Any,
    data: Iterable[EditRequest] | datasets.Dataset | Iterable[Mapping[str, Any]],
    *,
    positions: str | PositionRule = "last",
    num_interventions: int = 1,
    append_eos: bool = False,
    eval_data: Iterable[EditRequest] | datasets.Dataset | Iterable[Mapping[str, Any]] | None = None,
) -> dict[str, Any]:
    """What a trainer takes: ``{"train_dataset", "eval_dataset", "data_collator"}``.

    Example::

        module = make_edit_data_module(tokenizer, requests, positions="last", num_interventions=1)
        BaftTrainer(model=reft_model, tokenizer=tokenizer, args=args, **module).train()

    Args:
        tokenizer: of the model; its ``padding_side`` is the side on which batches are padded.
        data: requests, or rows with the columns ``prompt``, ``target_new`` and, for a subject rule, ``subject``.
        positions: which tokens are edited, see :mod:`baft_intervention.core.positions`; the same for every intervention.
        num_interventions: number of representations in the ``ReftConfig``.
        append_eos: train the end of sequence behind the target too.
        eval_data: as ``data``, for evaluation; ``eval_dataset`` is None without it.

    Returns:
        Data sets with the columns :data:`COLUMNS`: ``labels`` are -100 off the target, ``intervention_locations`` is
        ``num_interventions`` lists of positions in ``input_ids``, found from the ids that the model will see.

    Raises:
        DataError: no rows, or a row without a needed column.
        RequestError, PositionError: a row that cannot be encoded; the message says which.
        ConfigError: ``num_interventions`` below 1, or ``positions`` that are no rule.
    """
    if isinstance(num_interventions, bool) or not isinstance(num_interventions, int) or num_interventions < 1:
        raise ConfigError(f"num_interventions is {num_interventions!r}; it must be a whole number of at least 1")
    settings = BaftConfig(positions=str(positions), ending="", append_eos=append_eos, weighting="constant")
    return {
        "train_dataset": _encode(tokenizer, data, settings, num_interventions, "data"),
        "eval_dataset": None
        if eval_data is None
        else _encode(tokenizer, eval_data, settings, num_interventions, "eval_data"),
        "data_collator": EditCollator(pad_token_id(tokenizer), getattr(tokenizer, "padding_side", "right")),
    }


def _encode(tokenizer: Any, data: Iterable[Any], settings: BaftConfig, count: int, name: str) -> datasets.Dataset:
    columns: dict[str, list[Any]] = {column: [] for column in COLUMNS}
    for request in _requests(data, settings, name):
        row = encode_request(tokenizer, render_request(tokenizer, request), settings)
        columns["input_ids"].append(row.ids)
        columns["labels"].append(row.labels)
        columns["attention_mask"].append([1] * len(row.ids))
        columns["intervention_locations"].append([row.positions] * count)
    if not columns["input_ids"]:
        raise DataError(f"{name} has no rows; give at least one edit")
    return datasets.Dataset.from_dict(columns)


def _requests(data: Iterable[Any], settings: BaftConfig, name: str) -> Iterable[EditRequest]:
    needed = _FIELDS[: 3 if settings.rule.needs_subject else 2]
    if isinstance(data, (str, bytes, Mapping, EditRequest)):
        raise DataError(f"{name} is {type(data).__name__}; it must be a sequence of edits, or a datasets.Dataset")
    for i, item in enumerate(data):
        if isinstance(item, EditRequest):
            yield item
            continue
        if not isinstance(item, Mapping):
            raise DataError(f"{name}[{i}] is {item!r}; it must be an EditRequest or a row with {', '.join(needed)}")
        if missing := [field for field in needed if item.get(field) is None]:
            raise DataError(
                f"{name}[{i}] has no {' and no '.join(map(repr, missing))}; columns here: "
                f"{', '.join(map(str, item)) or 'none'}; needed for positions {settings.positions!r}: {', '.join(needed)}"
            )
        yield EditRequest.from_dict({f: item[f] for f in _FIELDS if item.get(f) is not None}, origin=f"{name}[{i}]")
