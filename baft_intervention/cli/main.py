"""``baft``: edit a language model's facts from the command line.

This module only reads the command line, so that ``baft --help`` is quick: what a command does stands in
:mod:`~baft_intervention.cli.commands` and :mod:`~baft_intervention.cli.demo`, which are imported when it runs.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import sys
import traceback
from collections.abc import Sequence
from importlib import import_module
from typing import Any

from .. import __version__
from ..errors import AdapterError, BaftError, ConfigError, EditError

OK, FAILED, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130
_EXIT_CODES = """\
exit codes:
  0    done
  1    an edit or another operation failed, or an edit does not give its target
  2    bad input: an option, a file, a model or an adapter; nothing was written
  130  interrupted (Ctrl-C); edits that were finished are saved
"""
_MODEL_HELP = "smollm2-135m (comes with the project's set-up), a local folder, or a hub id"


def build_parser(command: str | None = None) -> argparse.ArgumentParser:
    """The command line. Only the ``command`` that is going to run has the options that cost an import."""
    parser = _parser(
        argparse.ArgumentParser,
        prog="baft",
        description="Edit what a language model knows, with basis-level representation fine-tuning (BaFT).\n"
        "The model's weights stay as they are: an edit is a small map on one layer's output, kept in a folder\n"
        "(the adapter), and can be undone.",
        epilog="start here:\n  baft demo\n  baft edit --help\n\n" + _EXIT_CODES,
    )
    parser.add_argument("--version", action="version", version=f"baft {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    _add_demo(commands)
    _add_edit(commands)
    _add_generate(commands)
    _add_inspect(commands)
    _add_list(commands)
    _add_undo(commands)
    _add_merge(commands)
    _add_recover(commands)
    _add_validate(commands)
    _add_evaluate(commands, with_options=command == "evaluate")
    return parser


def _parser(make: Any, *args: Any, description: str, epilog: str = "", **kwargs: Any) -> argparse.ArgumentParser:
    kwargs["formatter_class"] = argparse.RawDescriptionHelpFormatter
    return make(*args, description=description, epilog=epilog, allow_abbrev=False, **kwargs)


def _command(commands: Any, name: str, short: str, description: str, example: str) -> argparse.ArgumentParser:
    epilog = f"example:\n{example}\n\n{_EXIT_CODES}"
    parser = _parser(commands.add_parser, name, help=short, description=description, epilog=epilog)
    output = parser.add_argument_group("output")
    output.add_argument("--json", action="store_true", help="the result as JSON on stdout, all else on stderr")
    output.add_argument("--quiet", action="store_true", help="no progress bar and no notes")
    output.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def _add_place(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", help="cpu (the default), cuda, cuda:1, …, auto, or spread over all")
    parser.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        help="of the model; by default what it was saved in",
    )


def _add_chat(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--chat", action="store_true", help="each prompt is what a user says: put it into the model's chat template"
    )
    parser.add_argument("--system", metavar="TEXT", help="with --chat: a system message before it")


def _add_demo(commands: Any) -> None:
    parser = _command(
        commands,
        "demo",
        "edit three facts of a real model, save, load, undo: all in a minute",
        "Edits three facts of a real language model and shows, before and after: the edited question, a paraphrase,\n"
        "and two neighbours that should not move (whether they did is looked up, not assumed). Then it saves the\n"
        "edits, loads them in a fresh process, and takes them back. The first run also prepares the model (once).",
        "  baft demo\n  baft demo --json > demo.json",
    )
    parser.add_argument("--model", default="smollm2-135m", help=f"{_MODEL_HELP}; default: smollm2-135m")
    parser.add_argument("--out", metavar="DIR", help="folder for the adapter; by default one in the cache folder")
    _add_place(parser)


def _add_edit(commands: Any) -> None:
    parser = _command(
        commands,
        "edit",
        "edit facts of a model and save them as an adapter",
        "Trains one small map for each request and saves them all in a folder. All requests are checked before the\n"
        "first is trained; if one fails, nothing is written. The file of edits is JSON, JSON Lines or CSV with the\n"
        "fields prompt and target_new, and optionally subject, id, target_true, rephrase, locality; benchmark files\n"
        "(ZsRE, CounterFact, …) are understood too.",
        '  echo \'[{"prompt": "The capital of Japan is", "target_new": "Osaka", "subject": "Japan"}]\' > edits.json\n'
        "  baft edit --model smollm2-135m --edits edits.json --out japan\n"
        '  baft generate --adapter japan --prompt "The capital city of Japan is" --compare\n\n'
        "  more edits into the same adapter:  baft edit --adapter japan --edits more.json",
    )
    parser.add_argument("--model", metavar="M", help=f"{_MODEL_HELP}; default: smollm2-135m, or the adapter's")
    parser.add_argument("--edits", metavar="FILE", required=True, help="the edits, as JSON, JSON Lines or CSV")
    parser.add_argument("--out", metavar="DIR", help="folder for the adapter; with --adapter by default that one")
    parser.add_argument("--adapter", metavar="DIR", help="continue this adapter: its edits stay, these are added")
    parser.add_argument("--overwrite", action="store_true", help="replace an adapter that --out already holds")
    parser.add_argument("--skip-bad", action="store_true", help="leave out requests that cannot be used, and say which")
    parser.add_argument("--limit", type=_whole(1), metavar="N", help="only the first N records of the file")
    parser.add_argument("--task", help="the file's benchmark or format, where it is not recognised")
    parser.add_argument(
        "--show", type=_whole(0), default=20, metavar="N", help="ask the first N prompts before and after; default: 20"
    )
    _add_chat(parser)
    settings = parser.add_argument_group("settings", "what is not given comes from --config, else from the defaults")
    settings.add_argument("--config", metavar="FILE", help="settings as YAML or JSON, fields of BaftConfig")
    settings.add_argument("--rank", type=int, metavar="R", help="bases an edit; default: 12")
    settings.add_argument(
        "--layers",
        type=_layers,
        metavar="L[,L]",
        help="blocks, 0-based, negative from the end; default: one at 9/10 of the depth",
    )
    settings.add_argument(
        "--positions", metavar="RULE", help="last (the default), subject, subject_all, prompt, all, f3+l2"
    )
    settings.add_argument(
        "--weighting",
        metavar="NAME",
        help="the weighting network: subject_relation (the default), cosine, constant, linear, mlp",
    )
    settings.add_argument("--steps", type=int, metavar="N", help="most optimiser steps an edit")
    settings.add_argument("--learning-rate", type=float, metavar="LR", help="of AdamW")
    settings.add_argument("--seed", type=int, metavar="N", help="same seed, same bytes in the adapter")
    _add_place(parser)


def _add_generate(commands: Any) -> None:
    parser = _command(
        commands,
        "generate",
        "ask an edited (or an unedited) model",
        "Continues each prompt, greedily unless --sample or --beams is given. Prompts come from --prompt, from a file\n"
        "with one a line, or from standard input.",
        '  baft generate --adapter japan --prompt "The capital city of Japan is" --prompt "Sushi comes from"\n'
        "  baft generate --adapter japan --prompts questions.txt --compare --json\n"
        '  echo "The capital of France is" | baft generate --model smollm2-135m',
    )
    parser.add_argument("--adapter", metavar="DIR", help="an adapter folder, written by baft edit")
    parser.add_argument(
        "--model", metavar="M", help=f"unedited: {_MODEL_HELP}; with --adapter: where its base model is now"
    )
    parser.add_argument("--prompt", action="append", metavar="TEXT", help="a prompt; may be given several times")
    parser.add_argument("--prompts", metavar="FILE", help="a file of prompts, one a line; - is standard input")
    _add_chat(parser)
    parser.add_argument("--compare", action="store_true", help="show what the unedited model says beside it")
    parser.add_argument("--max-new-tokens", type=_whole(1), default=32, metavar="N", help="default: 32")
    parser.add_argument("--batch-size", type=_whole(1), default=32, metavar="N", help="prompts at once; default: 32")
    how = parser.add_argument_group("how the answer is chosen")
    how.add_argument("--sample", action="store_true", help="draw tokens instead of taking the likeliest")
    how.add_argument("--temperature", type=_above_zero, metavar="T", help="with --sample; default: 1")
    how.add_argument("--top-p", type=_share, metavar="P", help="with --sample: only the likeliest tokens of mass P")
    how.add_argument("--beams", type=_whole(1), metavar="N", help="beam search with N beams")
    how.add_argument("--count", type=_whole(1), default=1, metavar="N", help="answers a prompt (--sample or --beams)")
    how.add_argument("--seed", type=_seed, default=0, metavar="N", help="of --sample; default: 0")
    _add_place(parser)


def _add_inspect(commands: Any) -> None:
    parser = _command(
        commands,
        "inspect",
        "see why an edit acts on a prompt, or does not",
        "Shows, token by token, how much each basis of an edit acts on a prompt, or would act, and says in one line an\n"
        "edit why: whether the prompt names its subject, and whether it asks its relation rather than another one.",
        '  baft inspect --adapter japan --prompt "The currency of Japan is the"\n'
        '  baft inspect --adapter japan --prompt "Japan\'s capital is" --png why.png',
    )
    parser.add_argument("--adapter", metavar="DIR", required=True, help="an adapter folder, written by baft edit")
    parser.add_argument("--prompt", metavar="TEXT", required=True, help="the prompt to look at")
    parser.add_argument("--png", metavar="FILE", help="draw the heat maps there, too")
    parser.add_argument(
        "--top", type=_whole(1), default=3, metavar="N", help="edits to show, the best fitting; default: 3"
    )
    parser.add_argument("--model", metavar="M", help="where the base model is now, if it was moved")
    _add_place(parser)


def _add_list(commands: Any) -> None:
    parser = _command(
        commands,
        "list",
        "show the edits of an adapter",
        "Shows the edits of an adapter folder and what it was made for. The base model is not needed.",
        "  baft list --adapter japan\n  baft list --adapter many --find Osaka",
    )
    parser.add_argument("--adapter", metavar="DIR", required=True, help="an adapter folder, written by baft edit")
    parser.add_argument("--find", metavar="TEXT", help="only edits with this text in id, prompt, subject or target")


def _add_undo(commands: Any) -> None:
    parser = _command(
        commands,
        "undo",
        "take an edit back",
        "Takes edits out of an adapter folder. The ids are shown by baft list.",
        "  baft undo --adapter japan 3f0c2a91d7be\n  baft undo --adapter japan --all",
    )
    parser.add_argument("ids", nargs="*", metavar="ID", help="the edit's id; several may be given")
    parser.add_argument("--adapter", metavar="DIR", required=True, help="an adapter folder, written by baft edit")
    parser.add_argument("--all", action="store_true", help="take back every edit")
    parser.add_argument("--out", metavar="DIR", help="write the result here and leave the adapter as it is")
    parser.add_argument("--model", metavar="M", help="where the base model is now, if it was moved")
    _add_place(parser)


def _add_merge(commands: Any) -> None:
    parser = _command(
        commands,
        "merge",
        "put the edits of two adapters together",
        "Takes the edits of another adapter of the same base model and settings into --adapter. What both have is kept once.\n"
        "Where both answer one prompt differently, nothing is merged unless --on-conflict says whose answer stays.",
        "  baft merge --adapter ours theirs --out both\n  baft merge --adapter ours theirs --on-conflict theirs",
    )
    parser.add_argument("other", metavar="OTHER", help="the adapter folder whose edits are taken in; it stays as it is")
    parser.add_argument("--adapter", metavar="DIR", required=True, help="an adapter folder, written by baft edit")
    parser.add_argument("--out", metavar="DIR", help="write the result to this new folder and leave --adapter as it is")
    parser.add_argument(
        "--on-conflict",
        choices=("error", "ours", "theirs"),
        default="error",
        help="a prompt with two answers: refuse (the default), or keep that of --adapter, or of OTHER",
    )
    parser.add_argument("--model", metavar="M", help="where the base model is now, if it was moved")
    _add_place(parser)


def _add_recover(commands: Any) -> None:
    parser = _command(
        commands,
        "recover",
        "keep what is whole of a damaged adapter",
        "Copies what fits its checksums from a folder whose log is damaged (adapter.log) to a new folder, and says what is\n"
        "lost. An edit that a lost record had replaced or undone is there again. The damaged folder stays as it is.",
        "  baft recover --adapter japan --out mended",
    )
    parser.add_argument("--adapter", metavar="DIR", required=True, help="the damaged folder")
    parser.add_argument("--out", metavar="DIR", required=True, help="a new folder for what is whole")


def _add_validate(commands: Any) -> None:
    parser = _command(
        commands,
        "validate",
        "check files of edits",
        "Reads every record of the files (a folder stands for all data files in it), and says for each malformed one\n"
        "where it is and what is wrong.",
        "  baft validate edits.json\n  baft validate ../data --json",
    )
    parser.add_argument("files", nargs="+", metavar="FILE", help="JSON, JSON Lines or CSV files, or folders of them")
    parser.add_argument("--task", help="the benchmark or format, where it is not recognised")


def _add_evaluate(commands: Any, *, with_options: bool) -> None:
    short = "score edits on a benchmark: reliability, generality, locality, portability"
    if not with_options:
        commands.add_parser("evaluate", help=short, add_help=False)
        return
    run = import_module("baft_intervention.evaluation.runner")  # metrics and protocols: only where they are asked for

    parser = _parser(
        commands.add_parser, "evaluate", help=short, description=(run.__doc__ or short), epilog=_EXIT_CODES
    )
    run.add_arguments(parser)
    known = {option for action in parser._actions for option in action.option_strings}
    for option, text in (
        ("--json", "the result as JSON on stdout"),
        ("--quiet", "no notes"),
        ("--debug", "show tracebacks"),
    ):
        if option not in known:
            parser.add_argument(option, action="store_true", help=text)


# ------------------------------------------------------------------------------------------- values of options


def _whole(low: int) -> Any:
    def read(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = low - 1
        if value < low:
            raise argparse.ArgumentTypeError(f"{text!r} must be a whole number of at least {low}")
        return value

    return read


def _seed(text: str) -> int:
    value = _whole(0)(text)
    if value >= 2**63:
        raise argparse.ArgumentTypeError(f"{text!r} must be below 2^63")
    return value


def _above_zero(text: str) -> float:
    return _between(text, 0.0, float("inf"), "a number above 0")


def _share(text: str) -> float:
    return _between(text, 0.0, 1.0, "a number above 0, at most 1")


def _between(text: str, low: float, high: float, what: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = low
    if not low < value <= high or value == float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} must be {what}")
    return value


def _with_negative_layers(argv: list[str]) -> list[str]:
    """``--layers -5,-1`` as ``--layers=-5,-1``: argparse would take the value for an option."""
    joined: list[str] = []
    for text in argv:
        if joined and joined[-1] == "--layers" and text[:1] == "-" and text[1:2].isdigit():
            joined[-1] = f"--layers={text}"
        else:
            joined.append(text)
    return joined


def _layers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} must be block numbers with commas between, e.g. 20,25") from None


# ------------------------------------------------------------------------------------------- running


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
    if any("\0" in text for text in argv):  # no shell can give one, and no file can have one in its name
        return _report(ConfigError(), "an argument has a null character in it", BAD_INPUT, debug=debug, as_json=as_json)
    try:
        args = build_parser(next((a for a in argv if not a.startswith("-")), None)).parse_args(argv)
        debug, as_json = getattr(args, "debug", debug), getattr(args, "json", as_json)
        return _run(args)
    except BaftError as error:
        code = FAILED if isinstance(error, EditError) or _not_the_users(error) else BAD_INPUT
        return _report(error, str(error), code, debug=debug, as_json=as_json)
    except KeyboardInterrupt as error:
        return _report(error, str(error) or "interrupted", INTERRUPTED, debug=debug, as_json=as_json)
    except BrokenPipeError:  # the reader has seen enough, e.g. `baft list | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except Exception as error:
        text = f"unexpected {type(error).__name__}: {error} (run it again with --debug to see where)"
        return _report(error, text, FAILED, debug=debug, as_json=as_json)


def _run(args: argparse.Namespace) -> int:
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # before transformers is imported
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # before torch is imported: where other processes want the cores too, threads that spin while they wait for each
    # other made the demo 14 times slower (423 s against 30 s, 2 threads on 2 cores at a load of 6)
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from .console import Output, set_up_logging

    set_up_logging(quiet=getattr(args, "quiet", False), debug=getattr(args, "debug", False))
    if args.command == "evaluate":
        return int(import_module("baft_intervention.evaluation.runner").main(args) or OK)
    out = Output(as_json=args.json, quiet=args.quiet)
    if args.command == "demo":
        from .demo import run_demo

        return run_demo(args, out)
    from . import commands

    return getattr(commands, f"run_{args.command}")(args, out)


def _not_the_users(error: BaftError) -> bool:
    """A disk that is full, say: the input was right and the operation failed."""
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
