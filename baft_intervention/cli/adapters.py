"""Opening a model or an adapter, and reading prompts, for several commands."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from ..config import BaftConfig
from ..editor.editor import BaftEditor
from ..errors import ConfigError, DataError
from ..models.loading import load_model
from ..storage.exchange import DESCRIPTION, read_directory


def open_editor(args: argparse.Namespace, config: BaftConfig | None = None, *, keep: bool = False) -> BaftEditor:
    """The editor of ``--adapter``, or without it of ``--model``.

    Args:
        args: with ``adapter``, ``model``, ``device`` and ``dtype``.
        config: settings of new edits; by default the adapter's.
        keep: open the adapter for writing: no other process writes to it until the editor is closed.
    """
    if args.adapter is None:
        return BaftEditor.from_pretrained(args.model or "smollm2-135m", config, device=args.device, dtype=args.dtype)
    if not (Path(args.adapter).expanduser() / DESCRIPTION).is_file():
        read_directory(args.adapter)  # raises; opening it would take a model folder, or make a new adapter
    if keep:
        return BaftEditor.open(args.adapter, args.model, config, device=args.device, dtype=args.dtype)
    if args.model is None:
        editor = BaftEditor.from_pretrained(args.adapter, device=args.device, dtype=args.dtype)
        editor.config = config or editor.config
        return editor
    _, description = read_directory(args.adapter)
    config = config or BaftConfig.from_dict(description["config"], where=f"{args.adapter}: ")
    dtype = args.dtype or description["base_model"].get("dtype")
    model, tokenizer = load_model(args.model, device=args.device, dtype=dtype)
    editor = BaftEditor(model, tokenizer, config, model_name=args.model)
    editor.load_adapter(args.adapter)
    return editor


def check_system(args: argparse.Namespace) -> None:
    """Check that ``--system`` comes with ``--chat``."""
    if args.system is not None and not args.chat:
        raise ConfigError("--system is a message of a conversation; give --chat with it")


def conversation(prompt: str, system: str | None) -> list[dict[str, str]]:
    """The prompt as a user's message, for ``--chat``."""
    first = [] if system is None else [{"role": "system", "content": system}]
    return [*first, {"role": "user", "content": prompt}]


def read_prompts(given: Sequence[str], source: str | None) -> list[str]:
    """The prompts on the command line, and those of a file or of standard input.

    Args:
        given: the prompts on the command line.
        source: a file with one prompt per line; ``-`` means standard input, as does None without given prompts.
    """
    prompts = list(given)
    if source is None and not prompts:
        if sys.stdin is None or sys.stdin.isatty():
            raise DataError('give a prompt: --prompt "…", --prompts FILE, or text on standard input')
        source = "-"
    if source is not None:
        name = "standard input" if source == "-" else source
        try:
            text = sys.stdin.buffer.read() if source == "-" else Path(source).expanduser().read_bytes()
            lines = text.decode("utf-8-sig").split("\n")
        except OSError as error:
            raise DataError(f"{name}: cannot be read: {error.strerror or error}") from None
        except UnicodeDecodeError as error:
            raise DataError(f"{name}: byte {error.start} is not UTF-8 ({error.reason}); save it as UTF-8") from None
        prompts += [line.removesuffix("\r") for line in lines if line.strip()]
        if not prompts:
            raise DataError(f"{name} has no prompts; write one per line")
    for prompt in prompts:
        if not prompt.strip():
            raise DataError("a prompt is empty; give some text")
        if not prompt.isprintable() and any("\ud800" <= c <= "\udfff" for c in prompt):
            raise DataError(f"the prompt {prompt!r} is not UTF-8 text")
    return prompts
