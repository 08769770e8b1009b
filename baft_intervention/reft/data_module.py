"""Edits as a data set for pyreft's trainers and :class:`~baft_intervention.reft.trainer.BaftTrainer`.

A row holds plain lists without padding. The collator pads a batch on the tokenizer's side and shifts the intervention
locations with the text; pyreft's own collator does not shift them.

Ragged locations (``subject_all``, ``prompt``, …) must become a rectangle, because pyvene requires equally many locations
in every row. Repeating a location would leave the value right, but pyvene writes representations back by index, so the
gradient of a position written twice counts twice. The filler is therefore a padding column after all text (before it
under left padding). Nothing attends to this column and it has no label, so it changes neither value nor gradient. If the
longest row of a batch needs a filler, the batch gets one more column.
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
_FIELDS = ("prompt", "target_new", "subject")  # the columns that are read; others are ignored


@dataclass(frozen=True)
class EditCollator:
    """Pads rows of :func:`make_edit_data_module` to a batch.

    A call returns ``input_ids``, ``attention_mask`` and ``labels`` ``(B, T)``, and ``intervention_locations``
    ``(B, I, P)`` for I interventions and P positions; all are int64.

    Args:
        pad_id: id of the padding token. It may be a real token's id: the attention mask is computed from lengths.
        side: side of the padding, ``right`` or ``left``; locations shift with the text.
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
    """A trainer's data arguments: ``{"train_dataset", "eval_dataset", "data_collator"}``.

    Example::

        module = make_edit_data_module(tokenizer, requests, positions="last", num_interventions=1)
        BaftTrainer(model=reft_model, tokenizer=tokenizer, args=args, **module).train()

    Args:
        tokenizer: the model's tokenizer; batches are padded on its ``padding_side``.
        data: requests, or rows with the columns ``prompt``, ``target_new`` and, for a subject rule, ``subject``.
        positions: rule for the tokens to edit, see :mod:`baft_intervention.core.positions`; the same for every intervention.
        num_interventions: number of representations in the ``ReftConfig``.
        append_eos: also train the end-of-sequence token after the target.
        eval_data: evaluation data in the same form as ``data``; without it, ``eval_dataset`` is None.

    Returns:
        Data sets with the columns :data:`COLUMNS`. ``labels`` are -100 outside the target. ``intervention_locations``
        holds ``num_interventions`` lists of positions in ``input_ids``, computed from the ids that the model will see.

    Raises:
        DataError: there are no rows, or a row lacks a required column.
        RequestError, PositionError: a row cannot be encoded; the message names the row.
        ConfigError: ``num_interventions`` is below 1, or ``positions`` is not a known rule.
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
