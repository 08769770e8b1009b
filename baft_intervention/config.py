"""Settings of an edit: frozen, checked when made, and read from or written to YAML and JSON."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from torch import nn

from .core.positions import PositionRule
from .errors import ConfigError, PositionError
from .gates import make_weighting, weighting_class
from .models.structure import find_blocks, hidden_size

logger = logging.getLogger(__name__)

Allocation = Literal["per_edit", "joint"]
Engine = Literal["auto", "reference"]
Init = Literal["identity", "random"]
Schedule = Literal["linear", "constant"]

# layer 27 of 30 on SmolLM2: of 20, 25 and 27 the edits there generalise best on the validation parts (docs/theory/gate.md)
DEFAULT_DEPTH = 0.9
MOST_SEED = 2**63 - 1  # the largest that torch takes
MOST_AUGMENTATIONS = 12  # sentences that can stand before a request
# fields of earlier versions and their defaults: a saved adapter that has them still loads
_REMOVED = {"bases": "free", "bank_size": 256, "order": "auto", "mini_batch": 0, "epochs": 0}

Check = Callable[[str, Any], Any]  # (name, value) -> the value to keep; raises ConfigError


def _setting(check: Check, *, identity: bool = False) -> dict[str, Any]:
    """A field's metadata.

    Args:
        check: of its value.
        identity: whether the field decides what an adapter's tensors mean. Two adapters that differ in it cannot be joined;
            every other field matters in training alone.
    """
    return {"check": check, "identity": identity}


def _whole(low: int, high: int | None = None) -> Check:
    def check(name: str, value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or value < low:
            raise ConfigError(f"{name} is {value!r}; it must be a whole number of at least {low}")
        if high is not None and value > high:
            found = f"is {value}" if value.bit_length() <= 64 else f"has {value.bit_length()} bits"
            raise ConfigError(f"{name} {found}; it must be at most {high}")
        return value

    return check


def _real(low: float = 0.0, *, above: bool = False) -> Check:
    """A finite number of at least ``low``, or above it."""

    def check(name: str, value: Any) -> float:
        try:
            good = not isinstance(value, bool) and isinstance(value, (int, float)) and math.isfinite(value)
        except OverflowError:  # a whole number of 400 digits
            good = False
        if not good or value < low or (above and value == low):
            raise ConfigError(f"{name} is {value!r}; it must be a number {'above' if above else 'of at least'} {low:g}")
        return float(value)

    return check


def _choice(literal: Any) -> Check:
    def check(name: str, value: Any) -> Any:
        if value not in get_args(literal):
            raise ConfigError(f"{name} is {value!r}; it must be one of {', '.join(get_args(literal))}")
        return value

    return check


def _flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise ConfigError(f"{name} is {value!r}; it must be true or false")
    return value


def _layers(name: str, value: Any) -> tuple[int, ...] | None:
    if value is None:
        return None
    layers = (value,) if isinstance(value, int) else value
    if not isinstance(layers, (list, tuple)) or not layers:
        raise ConfigError(f"{name} is {value!r}; it must be a list of block numbers, e.g. [20]")
    for layer in layers:
        if isinstance(layer, bool) or not isinstance(layer, int):
            raise ConfigError(f"{name} has {layer!r}; a block number is a whole number")
    return tuple(layers)


def _positions(name: str, value: Any) -> str | None:
    if value is None:
        return None
    try:
        PositionRule.parse(value)
    except PositionError as error:
        raise ConfigError(str(error)) from None
    return value


def _weighting(name: str, value: Any) -> str:
    weighting_class(value)
    return value


def _options(name: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise ConfigError(f"{name} is {value!r}; it must be a mapping of options")
    return dict(value)


def _ending(name: str, value: Any) -> str:
    if not isinstance(value, str) or value != value.strip():
        raise ConfigError(f"{name} is {value!r}; it must be a text without spaces around it, e.g. '.', or ''")
    return value


@dataclass(frozen=True)
class BaftConfig:
    """Settings of an edit. ``BaftConfig()`` suits single facts on a decoder of any size.

    What to change, and when:

    - The edit misses paraphrases: let the gate open more, ``weighting_options={"false_openings": 0.03}``.
    - The edit moves its neighbours: let it open less, ``weighting_options={"false_openings": 0.003}``.
    - A long target is not reached: edit a lower block, e.g. ``layers=(20,)`` of 30.
    - LoReFT, for comparison: ``weighting="constant", ending=""``.
    - The plainest reading of the paper: ``weighting="linear", locality_coefficient=1.0, ending=""``.

    Args:
        rank: r, the number of bases of an edit, from 1 to the hidden size. One fact needs few; the paper uses 12.
        layers: decoder blocks whose output is edited, 0-based; negative numbers count from the end. None takes the block
            at nine tenths of the depth.
        positions: which tokens are edited, see :mod:`baft_intervention.core.positions`; by default the gate decides, or for a
            gate that does not read tokens (``linear``, ``cosine``, …) the rule ``last``.
        weighting: the gate: name of a registered weighting network, see :mod:`baft_intervention.gates`.
        weighting_options: keyword arguments of that network.
        allocation: ``per_edit`` gives every request its own bases, and ``undo`` is exact. ``joint`` trains all requests of
            one call in one set of bases, as batched editing does in the paper.
        init: ``random`` starts the map as pyreft's LoReFT does, ``identity`` at no change, see
            :class:`~baft_intervention.core.basis_map.BasisWeightedMap`.
        learning_rate: of AdamW. The default gate allows a high rate: most edits finish in a few steps, and their paraphrases
            follow. Long targets need a lower one.
        weight_decay: of AdamW. It scales the basis parameter and leaves the orthonormal basis as it is.
        schedule: ``linear`` lowers the rate to 0 over ``steps``; ``constant`` keeps it.
        steps: most optimiser steps of an edit.
        loss_target: training stops when the mean loss over target tokens (nats) is below this value and every token of target
            and ending is the most likely one; 0 never stops early.
        ending: a text that is trained after the target, e.g. ``"."``; left out after a target that ends in punctuation. In
            chat the default gate trains the end of the turn instead.
        append_eos: train the end-of-sequence token after the target, in place of ``ending``.
        ending_coefficient: weight of the loss of ``ending`` (or of the end of sequence) beside the target's.
        augmentations: copies of each request that are trained too, each after another unrelated sentence; 0 to 12.
            Useful without a data-driven gate (``linear``, ``constant``). Conversations are not copied.
        locality_coefficient: weight of the mean basis weight on unrelated text (the paper's locality regularisation).
        output_coefficient: weight of the change (KL) of the next-token distribution on 16 unrelated texts. Every step
            runs them through the whole model, which is slow; useful without a data-driven gate.
        balance_coefficient: weight of the paper's incremental load balancing over bases.
        max_grad_norm: an edit's gradient is clipped to this norm.
        seed: of initialisation and augmentation; the same seed gives the same bytes on the same machine.
        engine: ``auto`` takes the fastest exact path; ``reference`` calls the whole model at every step.

    Raises:
        ConfigError: a value out of range; the message names the field, the value, and what is allowed.
    """

    rank: int = field(default=12, metadata=_setting(_whole(1), identity=True))
    layers: tuple[int, ...] | None = field(default=None, metadata=_setting(_layers, identity=True))
    positions: str | None = field(default=None, metadata=_setting(_positions, identity=True))
    weighting: str = field(default="fact", metadata=_setting(_weighting, identity=True))
    weighting_options: Mapping[str, Any] = field(default_factory=dict, metadata=_setting(_options, identity=True))
    allocation: Allocation = field(default="per_edit", metadata=_setting(_choice(Allocation)))
    init: Init = field(default="random", metadata=_setting(_choice(Init)))
    learning_rate: float = field(default=2e-2, metadata=_setting(_real(above=True)))
    weight_decay: float = field(default=0.0, metadata=_setting(_real()))
    schedule: Schedule = field(default="linear", metadata=_setting(_choice(Schedule)))
    steps: int = field(default=60, metadata=_setting(_whole(1)))
    loss_target: float = field(default=0.02, metadata=_setting(_real()))
    ending: str = field(default="", metadata=_setting(_ending))
    append_eos: bool = field(default=False, metadata=_setting(_flag))
    ending_coefficient: float = field(default=0.3, metadata=_setting(_real()))
    augmentations: int = field(default=0, metadata=_setting(_whole(0, MOST_AUGMENTATIONS)))
    locality_coefficient: float = field(default=0.0, metadata=_setting(_real()))
    output_coefficient: float = field(default=0.0, metadata=_setting(_real()))
    balance_coefficient: float = field(default=0.0, metadata=_setting(_real()))
    max_grad_norm: float = field(default=1.0, metadata=_setting(_real(above=True)))
    seed: int = field(default=0, metadata=_setting(_whole(0, MOST_SEED)))
    engine: Engine = field(default="auto", metadata=_setting(_choice(Engine)))

    def __post_init__(self) -> None:
        for f in dataclasses.fields(self):
            object.__setattr__(self, f.name, f.metadata["check"](f.name, getattr(self, f.name)))
        make_weighting(self.weighting, 2, 1, **self.weighting_options)  # an unknown option fails now, not in training
        if self.positions is not None and self.reads_tokens:
            raise ConfigError(
                f"positions is {self.positions!r}, but the gate {self.weighting!r} decides itself where an edit acts; leave "
                "positions out, or choose a gate that acts at positions, e.g. weighting='linear'"
            )
        if self.allocation == "joint" and weighting_class(self.weighting).routed:
            raise ConfigError(
                f"allocation is 'joint', but the edits of weighting {self.weighting!r} compete one by one; "
                "use 'per_edit', or a weighting whose updates add up, e.g. 'linear'"
            )

    @classmethod
    def identity_fields(cls) -> tuple[str, ...]:
        """Fields that decide what an adapter's tensors mean; the others matter in training alone."""
        return tuple(f.name for f in dataclasses.fields(cls) if f.metadata["identity"])

    @property
    def needs_bank(self) -> bool:
        """Whether the gate starts from unrelated text."""
        return weighting_class(self.weighting).needs_bank

    @property
    def reads_tokens(self) -> bool:
        """Whether the gate decides at every token where the edits act; otherwise :attr:`rule` does."""
        return weighting_class(self.weighting).reads_tokens

    @property
    def rule(self) -> PositionRule:
        """The position rule; the last token of the prompt where none is given."""
        return PositionRule.parse(self.positions or "last")

    def rate_at(self, step: int) -> float:
        """The learning rate of optimiser step ``step``, counted from 0: ``learning_rate (1 - step / steps)`` if linear."""
        return self.learning_rate * (1.0 - step / self.steps if self.schedule == "linear" else 1.0)

    def resolved_layers(self, num_layers: int) -> tuple[int, ...]:
        """0-based, ascending block numbers for a model of ``num_layers`` blocks.

        Raises:
            ConfigError: a block that the model does not have, or the same block twice.
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
        """The defaults for ``model`` with nothing left open: block numbers by depth, and the rank at most the width.

        Record these with a result: they name the block that was edited.

        Args:
            model: a causal language model.
            changes: fields that you choose yourself.

        Raises:
            ConfigError: a wrong value, or a block that the model does not have.
        """
        settings: dict[str, Any] = {"rank": min(cls.rank, hidden_size(model))} | changes
        config = cls(**settings)
        return dataclasses.replace(config, layers=config.resolved_layers(len(find_blocks(model))))

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        data = dataclasses.asdict(self)
        data["layers"] = None if self.layers is None else list(self.layers)
        return data

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], *, where: str = "") -> BaftConfig:
        """Read settings.

        Fields of earlier versions are ignored, so that old adapters load; one that was not at its default is logged.

        Args:
            data: fields and their values; the others have their defaults.
            where: the place the settings come from, to begin a message with: ``"edits.yaml: "``.

        Raises:
            ConfigError: not a mapping, an unknown field, or a wrong value.
        """
        if not isinstance(data, Mapping):
            raise ConfigError(f"{where}settings must be an object of fields, got {type(data).__name__}: {data!r}")
        known = [f.name for f in dataclasses.fields(cls)]
        for name, value in data.items():
            if name in _REMOVED:
                if value != _REMOVED[name]:
                    logger.warning("%ssetting %r is no longer there; its value %r is ignored", where, name, value)
            elif name not in known:
                raise ConfigError(f"{where}unknown setting {name!r}; known settings: {', '.join(known)}")
        try:
            return cls(**{name: value for name, value in data.items() if name not in _REMOVED})
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
        """Write JSON if the name ends in ``.json``, else YAML."""
        import yaml

        path = Path(path)
        data = self.to_dict()
        text = json.dumps(data, indent=2) if path.suffix == ".json" else yaml.safe_dump(data, sort_keys=False)
        path.write_text(text, encoding="utf-8")
