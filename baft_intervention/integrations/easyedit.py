"""BaFT as an editing method of EasyEdit.

EasyEdit calls a method as ``apply_algo(model, tok, requests, hparams, copy=…, return_orig_weights=…, …)``, evaluates the
model that it returns, and undoes the edit with the second return value. This module implements that protocol. Only
:func:`register` imports EasyEdit::

    from easyeditor import BaseEditor
    from baft_intervention.integrations import easyedit

    easyedit.register()
    hparams = easyedit.BaFTHyperParams.from_hparams("llama-3-8b")  # a shipped file, or the path of your own
    metrics, edited_model, _ = BaseEditor.from_hparams(hparams).edit(prompts=…, target_new=…, subject=…)

*Where a prompt ends.* The default gate finds out itself where an edit acts. A gate that acts at positions must know the
prompt's end, but EasyEdit's evaluation feeds prompt and answer as one sequence. For such a gate, :class:`EditedModel`
stores every prompt of a request (its own, its rephrase, locality and portability prompts) and looks up the longest one that a
row begins with. A row that begins with none of them counts as all prompt, as in generation.

*Sequential editing.* EasyEdit passes the same base model to every call. Each call adds edits to it, until the restore
callable is called.
"""

from __future__ import annotations

import copy as copying
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..config import BaftConfig
from ..editor.editor import BaftEditor
from ..errors import ConfigError, RequestError
from ..models.tokenization import encode_prompt
from ..requests import EditRequest
from ..runtime.adapter import Edit

ALG_NAME = "BaFT"
HPARAMS = Path(__file__).with_name("hparams")  # the shipped YAML files
_PLACEHOLDER = "<|endoftext|>"  # EasyEdit's ground_truth if a user gives none
_STATE = "_baft_easyedit"  # the attribute of a model that holds its edits


@dataclass
class BaFTHyperParams:
    """The settings that EasyEdit reads of every method, and the settings of the edit.

    Args:
        model_name: hub id or folder of the base model, which EasyEdit loads.
        config: settings of the edit; in YAML, its fields are at the top level, next to the others.
        device: number of the GPU that EasyEdit uses.
        max_length: number of tokens to which EasyEdit's evaluation truncates a prompt.
        batch_size: requests per call in EasyEdit's ``batch_edit``; its other modes require 1.
        model_parallel, fp16: how EasyEdit loads the model.
        alg_name: the method's name in EasyEdit.
    """

    model_name: str
    config: BaftConfig = field(default_factory=BaftConfig)
    device: int = 0
    max_length: int = 40
    batch_size: int = 1
    model_parallel: bool = False
    fp16: bool = False
    alg_name: str = ALG_NAME

    @classmethod
    def from_hparams(cls, hparams_name_or_path: str | Path) -> BaFTHyperParams:
        """Read a YAML file by its path (with or without suffix), or a shipped one by its name.

        Raises:
            ConfigError: there is no such file, it belongs to another method, or a setting is unknown or has a bad
                value; the message names it.
        """
        import yaml

        path = _find(hparams_name_or_path)
        try:
            data = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise ConfigError(f"{path}: cannot be read as YAML: {error}") from None
        return cls.from_dict(data, where=f"{path}: ")

    @classmethod
    def from_dict(cls, data: Any, *, where: str = "") -> BaFTHyperParams:
        """Build the settings from the flat mapping of a YAML file."""
        if not isinstance(data, Mapping):
            raise ConfigError(f"{where}settings must be a mapping, got {type(data).__name__}")
        if data.get("alg_name") != ALG_NAME:
            raise ConfigError(f"{where}alg_name is {data.get('alg_name')!r}; it must be {ALG_NAME!r}")
        own = {f.name: f for f in dataclasses.fields(cls) if f.name != "config"}
        kinds = {f.name: type(f.default) for f in dataclasses.fields(BaftConfig)}
        values: dict[str, Any] = {}
        settings: dict[str, Any] = {}
        for name, value in data.items():
            if name in own:
                wanted = str if name == "model_name" else type(own[name].default)
                if type(value) is not wanted:
                    raise ConfigError(f"{where}{name} is {value!r}; it must be of type {wanted.__name__}")
                values[name] = value
            elif kinds.get(name) is float and isinstance(value, str):
                settings[name] = _number(value)  # YAML reads 1e-2 as a string; EasyEdit means a number
            else:
                settings[name] = value
        if not values.get("model_name"):
            raise ConfigError(f"{where}model_name is missing; give the base model's hub id or folder")
        return cls(**values, config=BaftConfig.from_dict(settings, where=where))

    def to_dict(self) -> dict[str, Any]:
        """The flat mapping that :meth:`from_dict` reads."""
        data = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "config"}
        return {**data, **self.config.to_dict()}


def shipped_hparams() -> tuple[str, ...]:
    """Names of the YAML files that come with the package."""
    return tuple(sorted(path.stem for path in HPARAMS.glob("*.yaml")))


def _find(name: str | Path) -> Path:
    for path in (Path(name), Path(f"{name}.yaml"), HPARAMS / f"{name}.yaml"):
        if path.is_file():
            return path
    raise ConfigError(
        f"there is no settings file {str(name)!r}; give a YAML file, or one of {', '.join(shipped_hparams())}"
    )


def _number(text: str) -> Any:
    try:
        return float(text)
    except ValueError:
        return text


def register() -> None:
    """Register the method with an installed EasyEdit under :data:`ALG_NAME`, also for batches of edits.

    Raises:
        ImportError: EasyEdit is not installed.
    """
    from easyeditor.editors.batch_editor import BatchEditor  # pyright: ignore[reportMissingImports]
    from easyeditor.util.alg_dict import ALG_DICT  # pyright: ignore[reportMissingImports]

    ALG_DICT[ALG_NAME] = apply_baft_to_model
    editors: Any = BatchEditor
    batchable = editors.is_batchable_method  # a fixed list of names; batch_edit refuses any other
    if not batchable(ALG_NAME):
        editors.is_batchable_method = staticmethod(lambda alg_name: alg_name == ALG_NAME or batchable(alg_name))


def to_edit_request(request: Mapping[str, Any]) -> EditRequest:
    """The part of an EasyEdit request to train on; EasyEdit itself reads the part to evaluate.

    Raises:
        RequestError: ``prompt`` or ``target_new`` is missing or not a string.
    """
    if not isinstance(request, Mapping):
        raise RequestError(f"a request must be an object with prompt and target_new, got {type(request).__name__}")
    truth = request.get("ground_truth")
    truths = (truth,) if isinstance(truth, str) and truth.strip() and truth != _PLACEHOLDER else ()
    values: dict[str, Any] = {"prompt": request.get("prompt"), "target_new": request.get("target_new")}
    if missing := [name for name, value in values.items() if value is None]:
        raise RequestError(f"field {missing[0]!r} is missing; the request has {', '.join(map(repr, request))}")
    return EditRequest(**values, subject=request.get("subject") or None, target_true=truths)


def prompts_of(request: Mapping[str, Any]) -> list[str]:
    """All prompts of a request, without duplicates."""
    found: list[Any] = [request.get(name) for name in ("prompt", "rephrase_prompt", "loc_prompt")]
    for kind in ("locality", "portability"):
        groups = request.get(kind) or {}
        found += [group.get("prompt") for group in groups.values() if isinstance(group, Mapping)]
    texts = [text for item in found for text in (item if isinstance(item, (list, tuple)) else [item])]
    return list(dict.fromkeys(text for text in texts if isinstance(text, str) and text.strip()))


class _State:
    """The edits of one base model, and the prompts known to belong to them if the gate acts at positions."""

    def __init__(self, editor: BaftEditor):
        self.editor = editor
        self.prompts: set[tuple[int, ...]] = set()

    def learn(self, request: Mapping[str, Any]) -> None:
        if not self.editor.config.reads_tokens:
            self.prompts |= {tuple(encode_prompt(self.editor.tokenizer, text)) for text in prompts_of(request)}

    def prompt_length(self, row: Sequence[int]) -> int:
        for length in sorted({len(prompt) for prompt in self.prompts}, reverse=True):
            if length <= len(row) and tuple(row[:length]) in self.prompts:
                return length
        return len(row)


class EditedModel(nn.Module):
    """A base model with its edits, in the form that EasyEdit expects.

    Calls and ``generate`` run the base model with its edits; all other attributes are the base model's.

    Args:
        state: the edits and the known prompts.
    """

    def __init__(self, state: _State):
        super().__init__()
        self.model: Any = state.editor.model
        self.state = state

    @property
    def editor(self) -> BaftEditor:
        return self.state.editor

    @property
    def config(self) -> Any:
        return self.model.config

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("model"), name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        ids = kwargs.get("input_ids", args[0] if args else None)
        known = self.editor.config.reads_tokens or kwargs.get("past_key_values") is not None
        if known or not isinstance(ids, Tensor):
            return self.model(*args, **kwargs)
        mask = kwargs.get("attention_mask")
        keep = torch.ones_like(ids) if mask is None else mask
        rows = [row[seen != 0].tolist() for row, seen in zip(ids, keep, strict=True)]
        with self.editor.adapter.prompts([self.state.prompt_length(row) for row in rows]):
            return self.model(*args, **kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """The base model's ``generate``, with the edits active."""
        return self.model.generate(*args, **kwargs)


class Restore:
    """Undoes one call of :func:`apply_baft_to_model`: restores the edits that the model had before.

    EasyEdit calls this value for some methods. For all others, it reads ``.items()``, the original weights, and copies
    them back into the model. BaFT changes no weights, so ``items()`` undoes the edits and returns nothing to copy.
    """

    def __init__(self, state: _State, before: tuple[Edit, ...]):
        self._state, self._before = state, before

    def __call__(self) -> None:
        editor = self._state.editor
        editor.adapter.set_edits(self._before)
        if not self._before:
            editor.detach()  # the state stays on the model, so the next edit need not fit the gates again

    def items(self) -> Iterator[tuple[str, Tensor]]:
        self()
        return iter(())


def apply_baft_to_model(
    model: Any,
    tok: Any,
    requests: Sequence[Mapping[str, Any]],
    hparams: BaFTHyperParams,
    copy: bool = False,
    return_orig_weights: bool = False,
    keep_original_weight: bool = False,
    **kwargs: Any,
) -> tuple[EditedModel, Restore]:
    """Edit a model; the function that EasyEdit calls.

    Args:
        model: the base model, or the result of an earlier call; its weights are never written.
        tok: the model's tokenizer.
        requests: EasyEdit's requests; several form one batch.
        hparams: settings.
        copy: edit a copy and leave ``model`` alone.
        return_orig_weights, keep_original_weight: ignored; they concern methods that change weights.
        **kwargs: ignored; EasyEdit passes them to other methods (``train_ds``).

    Returns:
        ``(edited model, restore)``: see :class:`EditedModel` and :class:`Restore`.

    Raises:
        RequestError, PositionError, EditError: a request cannot be edited; the model is unchanged.
        ConfigError: the settings differ from those of the edits already on the model.
    """
    base = model.model if isinstance(model, EditedModel) else model
    items = [requests] if isinstance(requests, Mapping) else list(requests)
    wanted = [to_edit_request(request) for request in items]
    if copy:
        base = _copy_of(base)
    state = _state_of(base, tok, hparams)
    before = state.editor.edits
    try:
        state.editor.attach()
        state.editor.edit(wanted)
    except BaseException:
        if not before:
            state.editor.detach()
        raise
    setattr(base, _STATE, state)
    for request in items:
        state.learn(request)
    return EditedModel(state), Restore(state, before)


def _state_of(model: Any, tok: Any, hparams: BaFTHyperParams) -> _State:
    """The model's own state if it has one with these settings; otherwise a new one, not attached."""
    state: _State | None = getattr(model, _STATE, None)
    if state is not None and state.editor.config == hparams.config and state.editor.tokenizer is tok:
        return state
    if state is not None and state.editor.edits:
        raise ConfigError(
            "the model has edits made with other settings or another tokenizer; undo them first with their restore values"
        )
    editor = BaftEditor(model, tok, hparams.config, model_name=hparams.model_name)
    editor.detach()
    return _State(editor)


def _copy_of(model: Any) -> Any:
    """A deep copy with the same edits; the hooks and their owners are created anew, not copied."""
    state: _State | None = getattr(model, _STATE, None)
    if state is None:
        return copying.deepcopy(model)
    delattr(model, _STATE)
    attached = state.editor.adapter.attached
    state.editor.detach()
    try:
        twin = copying.deepcopy(model)
    finally:
        if attached:
            state.editor.attach()
        setattr(model, _STATE, state)
    editor = BaftEditor(twin, state.editor.tokenizer, state.editor.config, model_name=state.editor.model_name)
    editor.adapter.shared = {layer: dict(tensors) for layer, tensors in state.editor.adapter.shared.items()}
    editor.adapter.set_edits(state.editor.edits)
    again = _State(editor)
    again.prompts = set(state.prompts)
    setattr(twin, _STATE, again)
    return twin
