"""Settings of an edit: frozen, validated, to and from YAML and JSON."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from torch import nn

from .core.positions import PositionRule
from .errors import ConfigError, PositionError
from .gates import make_weighting, weighting_class
from .models.structure import find_blocks, hidden_size

Allocation = Literal["per_edit", "joint"]
Bases = Literal["free", "orthogonal"]
Engine = Literal["auto", "reference"]
Init = Literal["identity", "random"]
Order = Literal["auto", "depth", "breadth"]
Schedule = Literal["linear", "constant"]

# layer 27 of 30 on SmolLM2: of 20, 25 and 27 the edits there generalise best on the validation parts (docs/tradeoff.md)
DEFAULT_DEPTH = 0.9
MOST_SEED = 2**63 - 1  # torch takes no larger one
MOST_AUGMENTATIONS = 12  # sentences that there are to put before a request


@dataclass(frozen=True)
class BaftConfig:
    """What to choose, for a practitioner.

    The defaults suit single facts on a decoder of any size. Start with ``BaftConfig()``; if a paraphrase is missed,
    lower ``weighting_options={"margin": -0.45}``; if a neighbour moves, raise it (-0.2). ``weighting="constant"`` gives LoReFT
    for comparison, ``weighting="linear", locality_coefficient=1.0`` the plainest reading of the paper.

    Args:
        rank: r, bases an edit, 1 to the hidden size. One fact needs few; the paper uses 12.
        layers: decoder blocks whose output is edited, 0-based; negative ones count from the end. None chooses
            one at nine tenths of the depth.
        positions: which tokens, see :mod:`baft_intervention.core.positions`.
        weighting: name of a registered weighting network.
        weighting_options: its keyword arguments.
        allocation: ``per_edit`` gives every request bases of its own (``undo`` is exact); ``joint`` trains all requests
            of one call in one set of bases, as the paper's batched editing does.
        order: of the requests of one call. ``depth``: each is trained to its end before the next, a true stream. ``breadth``: all
            together. ``auto``: together where that is the same (edits that compete) or asked for (``joint``), else (edits that
            add up) one after another. With ``joint`` bases, depth-first forgets: the last request is what was trained last.
        mini_batch: requests a step of ``joint`` breadth-first training (augmentations count as requests); 0 for all.
        epochs: passes over the mini-batches, a step on each; 0 for as many as ``steps`` allows.
        bases: ``free`` lets each edit find its own; ``orthogonal`` allots them: to the earlier edits' bases orthogonal while
            ``rank`` times the number of edits is at most the hidden size, then along the least used directions (see
            :mod:`~baft_intervention.training.allotment`). Later edits then depend on which are there.
        init: ``identity`` or ``random``, see :class:`~baft_intervention.core.basis_map.BasisWeightedMap`.
        learning_rate, weight_decay: of AdamW; decay leaves the orthonormal basis where it is.
        schedule: ``linear`` lets the rate fall to 0 over ``steps``, ``constant`` does not. The gate allows a high rate at
            first, with which most edits are done in a few steps and their paraphrases follow; long targets need a low one.
        steps: most optimiser steps an edit.
        loss_target: stop when the mean loss over target tokens (nats) falls below, and each of them, and what ends them, is the
            most likely one; 0 never stops early.
        ending: a text to train behind the target too: the model, when it writes by itself, then ends the answer there and does
            not go on to "1961111". Not behind a target that ends in punctuation; "" for none, in fewer steps.
        append_eos: train the end of sequence behind the target, in place of ``ending``.
        ending_coefficient: weight of the ending's loss, or the end of sequence's, beside the target's.
        augmentations: copies of each request, each behind another sentence that has nothing to do with it, that are trained
            along; 0 to 12. Of use where no gate decides (``linear``, ``constant``). A conversation has none.
        locality_coefficient: weight of the mean basis weight on the bank (locality regularisation).
        output_coefficient: weight of the change of the next token's distribution (KL) on a few unrelated texts. They are run
            through the whole model at every step, by the reference engine: slow, and of use where no gate decides.
        balance_coefficient: weight of the incremental load-balancing loss over bases.
        bank_size: unrelated texts that the model writes for itself (once a model, cached); 0 for none.
        max_grad_norm: clip an edit's gradient to this norm.
        seed: of initialisation and of the bank's texts.
        engine: ``auto`` takes the fastest exact path, ``reference`` the whole model at every step.

    Raises:
        ConfigError: a value out of range; the message names the field, the value and what is allowed.
    """

    rank: int = 12
    layers: tuple[int, ...] | None = None
    positions: str = "last"
    weighting: str = "subject_relation"
    weighting_options: Mapping[str, Any] = field(default_factory=dict)
    allocation: Allocation = "per_edit"
    order: Order = "auto"
    mini_batch: int = 0
    epochs: int = 0
    bases: Bases = "free"
    init: Init = "random"
    learning_rate: float = 2e-2
    weight_decay: float = 0.0
    schedule: Schedule = "linear"
    steps: int = 60
    loss_target: float = 0.02
    ending: str = "."
    append_eos: bool = False
    ending_coefficient: float = 0.3
    augmentations: int = 0
    locality_coefficient: float = 0.0
    output_coefficient: float = 0.0
    balance_coefficient: float = 0.0
    bank_size: int = 256
    max_grad_norm: float = 1.0
    seed: int = 0
    engine: Engine = "auto"

    def __post_init__(self) -> None:
        _whole(self, "rank", 1)
        _whole(self, "steps", 1)
        for name in ("bank_size", "mini_batch", "epochs"):
            _whole(self, name, 0)
        _whole(self, "augmentations", 0, MOST_AUGMENTATIONS)
        _whole(self, "seed", 0, MOST_SEED)
        _real(self, "learning_rate", 0.0, open_low=True)
        _real(self, "max_grad_norm", 0.0, open_low=True)
        for name in (
            "weight_decay",
            "loss_target",
            "ending_coefficient",
            "locality_coefficient",
            "output_coefficient",
            "balance_coefficient",
        ):
            _real(self, name, 0.0)
        _choice(self, "allocation", get_args(Allocation))
        _choice(self, "bases", get_args(Bases))
        _choice(self, "order", get_args(Order))
        _choice(self, "init", get_args(Init))
        _choice(self, "schedule", get_args(Schedule))
        _choice(self, "engine", get_args(Engine))
        if not isinstance(self.ending, str) or self.ending != self.ending.strip():
            raise ConfigError(f"ending is {self.ending!r}; it must be a text without spaces around it, e.g. '.', or ''")
        if not isinstance(self.append_eos, bool):
            raise ConfigError(f"append_eos is {self.append_eos!r}; it must be true or false")
        if self.layers is not None:
            layers = (self.layers,) if isinstance(self.layers, int) else self.layers
            if not isinstance(layers, (list, tuple)) or not layers:
                raise ConfigError(f"layers is {self.layers!r}; it must be a list of block numbers, e.g. [20]")
            for layer in layers:
                if isinstance(layer, bool) or not isinstance(layer, int):
                    raise ConfigError(f"layers has {layer!r}; a block number is a whole number")
            object.__setattr__(self, "layers", tuple(layers))
        try:
            PositionRule.parse(self.positions)
        except PositionError as error:
            raise ConfigError(str(error)) from None
        if not isinstance(self.weighting_options, Mapping):
            raise ConfigError(f"weighting_options is {self.weighting_options!r}; it must be a mapping of options")
        object.__setattr__(self, "weighting_options", dict(self.weighting_options))
        make_weighting(self.weighting, 2, 1, **self.weighting_options)  # an unknown option is told now, not at training
        if self.bank_size == 0 and (self.needs_bank or self.locality_coefficient):
            reason = (
                "locality_coefficient > 0 needs" if self.locality_coefficient else f"weighting {self.weighting!r} needs"
            )
            raise ConfigError(f"bank_size is 0, but {reason} unrelated representations; give bank_size, e.g. 256")

        if self.allocation == "joint" and weighting_class(self.weighting).routed:
            raise ConfigError(
                f"allocation is 'joint', but the edits of weighting {self.weighting!r} compete one by one; "
                "use 'per_edit', or a weighting whose updates add up, e.g. 'linear'"
            )

        if self.mini_batch and (self.allocation != "joint" or self.order == "depth"):
            raise ConfigError(
                f"mini_batch is {self.mini_batch}, but mini-batches are of requests that share bases and are trained together; "
                "use allocation 'joint' with order 'breadth' or 'auto', or mini_batch 0"
            )
        if self.epochs and not self.mini_batch:
            raise ConfigError(
                f"epochs is {self.epochs}, but there are no mini-batches to pass over; give mini_batch too"
            )
        apart = not weighting_class(self.weighting).routed or self.bases == "orthogonal"
        if self.order == "breadth" and self.allocation == "per_edit" and apart:
            reason = f"weighting {self.weighting!r} add up" if self.bases == "free" else "bases 'orthogonal' take turns"
            raise ConfigError(
                f"order is 'breadth', but the edits of {reason} and are trained on what the earlier ones left; use 'depth', or "
                "allocation 'joint' with a weighting whose updates add up"
            )

    @property
    def needs_bank(self) -> bool:
        return weighting_class(self.weighting).needs_bank

    @property
    def rule(self) -> PositionRule:
        return PositionRule.parse(self.positions)

    def rate_at(self, step: int) -> float:
        """The learning rate of optimiser step ``step``, counted from 0: ``learning_rate (1 - step / steps)`` where it falls."""
        return self.learning_rate * (1.0 - step / self.steps if self.schedule == "linear" else 1.0)

    def resolved_layers(self, num_layers: int) -> tuple[int, ...]:
        """0-based, ascending block numbers for a model of ``num_layers`` blocks.

        Raises:
            ConfigError: a block that the model has not, or the same one twice.
        """
        if self.layers is None:
            return (min(num_layers - 1, round(DEFAULT_DEPTH * num_layers)),)
        found = []
        for layer in self.layers:
            index = layer + num_layers if layer < 0 else layer
            if not 0 <= index < num_layers:
                raise ConfigError(f"layers has {layer}; this model has blocks 0 to {num_layers - 1}")
            found.append(index)
        if len(set(found)) != len(found):
            raise ConfigError(f"layers is {list(self.layers)}; a block occurs twice")
        return tuple(sorted(found))

    @classmethod
    def for_model(cls, model: nn.Module, **changes: Any) -> BaftConfig:
        """The defaults as they come out for ``model``, with nothing left open: block numbers by depth, the rank by width.

        Written down with a result, they say which block was edited on a model of how many.

        Args:
            model: a causal language model.
            changes: fields that you choose yourself.

        Raises:
            ConfigError: a wrong value, or a block that the model has not.
        """
        settings: dict[str, Any] = {"rank": min(cls.rank, hidden_size(model))} | changes
        config = cls(**settings)
        return dataclasses.replace(config, layers=config.resolved_layers(len(find_blocks(model))))

    def to_dict(self) -> dict[str, Any]:
        data = dataclasses.asdict(self)
        data["layers"] = None if self.layers is None else list(self.layers)
        return data

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], *, where: str = "") -> BaftConfig:
        """Read settings; an unknown field is an error that names it and the known ones."""
        if not isinstance(data, Mapping):
            raise ConfigError(f"{where}settings must be an object of fields, got {type(data).__name__}: {data!r}")
        known = [f.name for f in dataclasses.fields(cls)]
        for name in data:
            if name not in known:
                raise ConfigError(f"{where}unknown setting {name!r}; known settings: {', '.join(known)}")
        try:
            return cls(**data)
        except (ConfigError, TypeError, ValueError) as error:
            raise ConfigError(f"{where}{error}") from None

    @classmethod
    def from_file(cls, path: str | Path) -> BaftConfig:
        """Read a YAML or JSON file (JSON is YAML)."""
        import yaml

        path = Path(path)
        try:
            data = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise ConfigError(f"{path}: cannot be read as YAML or JSON: {error}") from None
        return cls.from_dict(data or {}, where=f"{path}: ")

    def save(self, path: str | Path) -> None:
        """Write as JSON where the name ends so, else as YAML."""
        import yaml

        path = Path(path)
        data = self.to_dict()
        text = json.dumps(data, indent=2) if path.suffix == ".json" else yaml.safe_dump(data, sort_keys=False)
        path.write_text(text, encoding="utf-8")


def _whole(config: BaftConfig, name: str, low: int, most: int | None = None) -> None:
    value = getattr(config, name)
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise ConfigError(f"{name} is {value!r}; it must be a whole number of at least {low}")
    if most is not None and value > most:
        raise ConfigError(f"{name} has {value.bit_length()} bits; it must be at most {most}")


def _real(config: BaftConfig, name: str, low: float, *, open_low: bool = False) -> None:
    value = getattr(config, name)
    try:
        good = not isinstance(value, bool) and isinstance(value, (int, float)) and math.isfinite(value)
    except OverflowError:  # a whole number of 400 digits
        good = False
    if not good or value < low or (open_low and value == low):
        raise ConfigError(f"{name} is {value!r}; it must be a number {'above' if open_low else 'of at least'} {low:g}")
    object.__setattr__(config, name, float(value))


def _choice(config: BaftConfig, name: str, allowed: tuple[str, ...]) -> None:
    value = getattr(config, name)
    if value not in allowed:
        raise ConfigError(f"{name} is {value!r}; it must be one of {', '.join(allowed)}")
