"""``baft``: edit a language model's facts from the command line."""

from __future__ import annotations

import argparse
import gc
import io
import json
import os
import sys
import traceback
from collections.abc import Sequence
from importlib import import_module

from .. import __version__
from ..errors import AdapterError, BaftError, ConfigError, EditError
from .console import BAD_INPUT, FAILED, INTERRUPTED, Output, set_up_logging
from .options import EXIT_CODES, new_parser

COMMANDS = ("demo", "edit", "generate", "inspect", "list", "undo", "merge", "recover", "validate", "evaluate")


def build_parser() -> argparse.ArgumentParser:
    """The parser of the whole command line."""
    parser = new_parser(
        argparse.ArgumentParser,
        prog="baft",
        description="Edit what a language model knows, with basis-level representation fine-tuning (BaFT).\n"
        "The model's weights stay unchanged: an edit is a small map on one layer's output. Edits are saved in a folder\n"
        "(the adapter) and can be undone.",
        epilog="start here:\n  baft demo\n  baft edit --help\n\n" + EXIT_CODES,
    )
    parser.add_argument("--version", action="version", version=f"baft {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name in COMMANDS:
        import_module(f".{name}", __package__).add(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and give its exit code."""
    argv = _with_negative_layers(list(sys.argv[1:] if argv is None else argv))
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a terminal without UTF-8 must not end a run
    if not argv:
        build_parser().print_help(sys.stderr)
        return BAD_INPUT
    debug, as_json = "--debug" in argv, "--json" in argv
    if any("\0" in text for text in argv):  # a shell cannot pass one, and a file name cannot contain one
        return _report(ConfigError(), "an argument has a null character in it", BAD_INPUT, debug=debug, as_json=as_json)
    try:
        args = build_parser().parse_args(argv)
        debug, as_json = args.debug, args.json
        return _run(args)
    except BaftError as error:
        code = FAILED if isinstance(error, EditError) or _not_the_users(error) else BAD_INPUT
        return _report(error, str(error), code, debug=debug, as_json=as_json)
    except KeyboardInterrupt as error:
        return _report(error, str(error) or "interrupted", INTERRUPTED, debug=debug, as_json=as_json)
    except BrokenPipeError:  # the reader has closed the pipe, e.g. `baft list | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except Exception as error:
        text = f"unexpected {type(error).__name__}: {error} (run again with --debug for the traceback)"
        return _report(error, text, FAILED, debug=debug, as_json=as_json)


def _run(args: argparse.Namespace) -> int:
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # before transformers is imported
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # before torch is imported: threads that spin while they wait made the demo 14 times slower on busy cores
    # (423 s against 30 s, 2 threads on 2 cores at a load of 6)
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if args.quiet:
        os.environ.setdefault("TQDM_DISABLE", "1")  # before tqdm is imported
    # imports make a million objects that stay; Python's default of a collection every 700 takes a sixth of the start-up
    gc.set_threshold(100_000, 20, 20)
    set_up_logging(quiet=args.quiet, debug=args.debug)
    return args.run(args, Output(as_json=args.json, quiet=args.quiet))


def _with_negative_layers(argv: list[str]) -> list[str]:
    """Write ``--layers -5,-1`` as ``--layers=-5,-1``, since argparse would read the value as an option."""
    joined: list[str] = []
    for text in argv:
        if joined and joined[-1] == "--layers" and text[:1] == "-" and text[1:2].isdigit():
            joined[-1] = f"--layers={text}"
        else:
            joined.append(text)
    return joined


def _not_the_users(error: BaftError) -> bool:
    """Whether the operation failed on valid input, e.g. on a full disk."""
    return isinstance(error, AdapterError) and isinstance(error.__cause__, OSError)


def _report(error: BaseException, text: str, code: int, *, debug: bool, as_json: bool) -> int:
    if debug:
        traceback.print_exception(error)
    print(f"baft: error: {' '.join(text.split())}", file=sys.stderr)
    if as_json:
        print(json.dumps({"error": text, "type": type(error).__name__, "exit_code": code}, indent=1))
    return code


if __name__ == "__main__":
    sys.exit(main())
