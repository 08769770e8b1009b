"""The base class of editing methods, and their registry.

A method is a frozen dataclass whose fields are its settings and whose :meth:`Method.attach` gives an
:class:`~baft_intervention.evaluation.edited.EditedModel`. To add one, write a class and a YAML file::

    @register_method("mine")
    @dataclass(frozen=True)
    class Mine(Method):
        \"\"\"One line that the tables print.\"\"\"
        learning_rate: float = 1e-3

        def attach(self, model, tokenizer):
            return MineOnModel(self, model, tokenizer)

    # benchmarks/methods/mine.yaml
    method: mine
    settings:
      learning_rate: 1.0e-3
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from ...errors import BaftError, ConfigError, EditError
from ...models.structure import find_blocks
from ...registry import did_you_mean
from ...requests import EditRequest
from ..edited import EditedModel

_METHODS: dict[str, type[Method]] = {}
_M = TypeVar("_M", bound="type[Method]")


@dataclass(frozen=True)
class Method:
    """Base class; its fields are the settings that every method has.

    Args:
        seed: seed of everything that the method draws.
    """

    name: ClassVar[str] = ""
    seed: int = 0

    def attach(self, model: Any, tokenizer: Any) -> EditedModel:
        """The model ready for edits, still unedited.

        Raises:
            ConfigError: the settings do not fit the model.
        """
        raise NotImplementedError

    def edit(self, model: Any, tokenizer: Any, requests: Sequence[EditRequest]) -> EditedModel:
        """A model with the requests applied as one batch; call ``restore()`` on it afterwards.

        Raises:
            EditError: the edit failed; the model is unchanged.
        """
        edited = self.attach(model, tokenizer)
        try:
            edited.apply(requests)
        except BaseException:
            edited.restore()
            raise
        return edited

    def settings(self) -> dict[str, Any]:
        """The fields as plain JSON values, for results."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()}

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> Method:
        """Make the method from plain values.

        Raises:
            ConfigError: a setting is unknown or has the wrong type.
        """
        fields = {f.name: f for f in dataclasses.fields(cls)}
        for name in settings:
            if name not in fields:
                raise ConfigError(
                    f"method {cls.name!r} has no setting {name!r}; its settings: {', '.join(fields)}"
                    f"{did_you_mean(str(name), fields)}"
                )
        values: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in settings.items()}
        for name, value in values.items():
            default = fields[name].default
            if default is dataclasses.MISSING or default is None or isinstance(value, type(default)):
                continue
            if isinstance(default, float) and isinstance(value, int) and not isinstance(value, bool):
                continue
            if name == "layer" and isinstance(value, (int, float)) and not isinstance(value, bool):
                continue
            wanted = type(default).__name__
            raise ConfigError(
                f"setting {name!r} of method {cls.name!r} is {value!r}; it must be a {wanted}, e.g. {default!r}"
            )
        return cls(**values)


def register_method(name: str, *, replace: bool = False) -> Callable[[_M], _M]:
    """Class decorator that puts a method into the registry.

    Raises:
        ConfigError: the name is taken.
    """

    def register(cls: _M) -> _M:
        if name in _METHODS and not replace:
            raise ConfigError(f"method {name!r} is registered already; choose another name or pass replace=True")
        cls.name = name
        _METHODS[name] = cls
        return cls

    return register


def method_names() -> tuple[str, ...]:
    """Every registered name, sorted."""
    return tuple(sorted(_METHODS))


def make_method(name: str, settings: Mapping[str, Any] | None = None) -> Method:
    """A registered method with these settings, and defaults for the rest.

    Raises:
        ConfigError: the method or a setting is unknown.
    """
    if name not in _METHODS:
        known = method_names()
        raise ConfigError(f"unknown method {name!r}; known methods: {', '.join(known)}{did_you_mean(name, known)}")
    return _METHODS[name].from_settings(settings or {})


def load_method(source: str, folder: Path | None = None) -> tuple[str, Method]:
    """``(label, method)`` from a YAML file, from a name that has one in ``folder``, or from a registered name.

    The label is the file's stem, so that two files may hold one method with different settings.

    Raises:
        ConfigError: the file cannot be read, or has an unknown method, field or setting.
    """
    import yaml

    path = Path(source)
    if path.suffix not in (".yaml", ".yml"):
        path = folder / f"{source}.yaml" if folder is not None else Path()
        if not path.is_file():
            return source, make_method(source)
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"method file {source!r} cannot be read: {error}") from None
    if not isinstance(data, Mapping) or not isinstance(data.get("method"), str):
        raise ConfigError(f"{path}: a method file needs 'method: NAME' (one of {', '.join(method_names())})")
    if unknown := sorted(set(map(str, data)) - {"method", "settings", "about"}):
        raise ConfigError(f"{path}: unknown field {unknown[0]!r}; known fields: method, settings, about")
    try:
        return path.stem, make_method(data["method"], data.get("settings") or {})
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def resolve_layer(model: Any, layer: int | float) -> int:
    """A block number counted from 0: a whole number (negative from the end), or a fraction of the depth, rounded.

    Raises:
        ConfigError: the model does not have this block.
    """
    depth = len(find_blocks(model))
    if isinstance(layer, float) and not layer.is_integer():
        index = min(depth - 1, round(layer * depth))
    else:
        index = int(layer) + depth if layer < 0 else int(layer)
    if not 0 <= index < depth:
        raise ConfigError(
            f"layer is {layer!r}; this model has blocks 0 to {depth - 1} (or give a fraction of the depth, 0.8)"
        )
    return index


def as_edit_error(error: BaseException, requests: Sequence[EditRequest]) -> EditError:
    """An edit's failure as :class:`EditError` that names the request; other errors (bugs) are raised unchanged."""
    if isinstance(error, (BaftError, FloatingPointError)):
        return EditError(f"{requests[0].where if requests else ''}: {error}")
    raise error
