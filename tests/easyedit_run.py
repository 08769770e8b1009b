"""EasyEdit's own ``BaseEditor`` with our plug-in on a tiny model: ``python easyedit_run.py FOLDER`` prints what it measured.

Needs only the package itself, ``pip install --no-deps easyeditor==0.0.1.dev0``, the one release there is (October 2023; its
pins are of that time). What its *other* methods import, and its vision models, is replaced by empty stand-ins, and the GPU
that it writes into every call by the CPU: nothing of this is on the way from ``BaseEditor`` to the plug-in and its scores.
A process of its own, since importing EasyEdit changes logging and seeds for everybody.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import json
import logging
import os
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import BatchEncoding

sys.path.insert(0, str(Path(__file__).resolve().parent))

from baft_intervention.integrations import easyedit
from edits import config, digest, hooks
from tiny import tiny_model, tiny_tokenizer

ABSENT = (
    "cv2", "einops", "fairscale", "higher", "hydra", "iopath", "nltk", "omegaconf", "openai", "peft", "scipy", "seaborn",
    "sentence_transformers", "sklearn", "timm", "torchvision", "easyeditor.trainer.blip2_models",
)  # fmt: skip


class _Nothing:
    """Stands for any function, class or constant: can be called, indexed, subclassed and used as a decorator."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return args[0] if args and callable(args[0]) else _Nothing()

    def __getitem__(self, item: Any) -> Any:
        return _Nothing()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Nothing()


class _Module(types.ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (_Nothing,), {}) if name[0].isupper() else _Nothing()


class _StandIns(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if any(name == absent or name.startswith(f"{absent}.") for absent in ABSENT):
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return _Module(spec.name)

    def exec_module(self, module: types.ModuleType) -> None: ...


def _on_the_cpu(method: Callable[..., Any]) -> Callable[..., Any]:
    def to(self: Any, *args: Any, **kwargs: Any) -> Any:
        return method(self, *("cpu" if str(a).startswith("cuda") else a for a in args), **kwargs)

    return to


def _base_editor() -> Any:
    """EasyEdit's ``BaseEditor``, the method registered."""
    from transformers.models.auto import modeling_auto  # noqa: F401  (with the real libraries, before the stand-ins)

    sys.meta_path.insert(0, _StandIns())
    for kind in (torch.nn.Module, torch.Tensor, BatchEncoding):
        kind.to = _on_the_cpu(kind.to)
    from easyeditor import BaseEditor  # pyright: ignore[reportMissingImports]

    logging.disable(logging.INFO)
    easyedit.register()
    easyedit.register()  # twice is once
    return BaseEditor


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    return [float(v) for v in value] if isinstance(value, (list, tuple)) else value


def main(folder: Path) -> None:
    os.chdir(folder)  # EasyEdit writes logs into the current directory
    place = str(folder / "baichuan-tiny")  # a family that EasyEdit loads by the Auto classes
    tiny_model("llama").save_pretrained(place)
    tiny_tokenizer().save_pretrained(place)
    base_editor = _base_editor()
    settings = config(weighting="constant", layers=(1,))
    editor = base_editor.from_hparams(easyedit.BaFTHyperParams(place, settings, batch_size=1))
    before = digest(editor.model)
    facts: dict[str, Any] = {
        "prompts": ["The capital of France is", "The mother tongue of Leo is"], "target_new": ["Japan", "city"],
        "subject": ["France", "Leo"],
        "rephrase_prompts": ["Well, the capital of France is", "Well, the mother tongue of Leo is"],
    }  # fmt: skip
    other = {"prompt": ["The president of France is", "He was"], "ground_truth": ["London", "a painter"]}
    told: dict[str, Any] = {}
    metrics, _, _ = editor.edit(
        **facts, locality_inputs={"near": dict(other)}, portability_inputs={"hop": dict(other)}, verbose=False
    )
    told["single"] = [{when: _plain(m[when]) for when in ("pre", "post")} for m in metrics]
    told["hooks_after_single"] = len(hooks(editor.model))
    editor.hparams.batch_size = 2
    metrics, edited, _ = editor.batch_edit(**facts, verbose=False)
    told["batch"] = [{when: _plain(m[when]) for when in ("pre", "post")} for m in metrics]
    told["edits_after_batch"] = len(edited.editor.edits)
    told["weights_unchanged"] = digest(editor.model) == before
    sys.stdout.write("\n" + json.dumps(told) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
