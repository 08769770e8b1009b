"""Parts of the commands' parsers: options that several commands share, and readers of values."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

EXIT_CODES = """\
exit codes:
  0    done
  1    an edit or another operation failed, or an edit does not give its target
  2    bad input: an option, a file, a model or an adapter; nothing was written
  130  interrupted (Ctrl-C); finished edits are saved
"""
MODEL_HELP = "smollm2-135m (installed with the project), a local folder, or a hub id"


def new_parser(make: Any, *args: Any, description: str, epilog: str = "", **kwargs: Any) -> argparse.ArgumentParser:
    """A parser whose help keeps line breaks and whose options cannot be abbreviated."""
    kwargs["formatter_class"] = argparse.RawDescriptionHelpFormatter
    return make(*args, description=description, epilog=epilog, allow_abbrev=False, **kwargs)


def add_command(
    commands: Any, name: str, run: Callable[..., int], *, summary: str, description: str, example: str
) -> argparse.ArgumentParser:
    """A command's parser, with the output options that all commands have.

    Args:
        commands: the subparsers of ``baft``.
        name: name of the command.
        run: called with the arguments and the output; returns the exit code.
        summary: its line in ``baft --help``.
        description: the beginning of its own help.
        example: the end of its own help.
    """
    epilog = f"example:\n{example}\n\n{EXIT_CODES}"
    parser = new_parser(commands.add_parser, name, help=summary, description=description, epilog=epilog)
    parser.set_defaults(run=run)
    output = parser.add_argument_group("output")
    output.add_argument("--json", action="store_true", help="print the result as JSON on stdout, all else on stderr")
    output.add_argument("--quiet", action="store_true", help="show no progress bar and no notes")
    output.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def add_device(parser: argparse._ActionsContainer) -> None:
    """``--device`` and ``--dtype``."""
    parser.add_argument(
        "--device", help="cpu (the default), cuda, cuda:1, …, auto, or spread (the model over all devices)"
    )
    parser.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        help="the model's number format; by default the one it was saved in",
    )


def add_chat(parser: argparse.ArgumentParser) -> None:
    """``--chat`` and ``--system``."""
    parser.add_argument(
        "--chat", action="store_true", help="treat each prompt as a user's message and apply the model's chat template"
    )
    parser.add_argument("--system", metavar="TEXT", help="with --chat: a system message before the user's")


def add_adapter(parser: argparse.ArgumentParser, *, moved_model: bool = True) -> None:
    """The required ``--adapter``, and ``--model`` for a base model that was moved."""
    parser.add_argument("--adapter", metavar="DIR", required=True, help="an adapter folder, written by baft edit")
    if moved_model:
        parser.add_argument("--model", metavar="M", help="where the base model is now, if it was moved")


# ------------------------------------------------------------------------------------------- values


def whole(low: int, below: int | None = None) -> Callable[[str], int]:
    """A reader of whole numbers of at least ``low``, and less than ``below``."""

    def read(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = low - 1
        if value < low:
            raise argparse.ArgumentTypeError(f"{text!r} must be a whole number of at least {low}")
        if below is not None and value >= below:
            raise argparse.ArgumentTypeError(f"{text!r} must be below {below}")
        return value

    return read


def whole_numbers(text: str) -> tuple[int, ...]:
    """Positive whole numbers separated by commas."""
    return tuple(whole(1)(part) for part in text.split(","))


def number_between(low: float, high: float, what: str) -> Callable[[str], float]:
    """A reader of finite numbers above ``low`` and up to ``high``."""

    def read(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = low
        if not low < value <= high or value == float("inf"):
            raise argparse.ArgumentTypeError(f"{text!r} must be {what}")
        return value

    return read


def layers(text: str) -> tuple[int, ...]:
    """Block numbers separated by commas; negative ones count from the end."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} must be block numbers separated by commas, e.g. 20,25") from None
