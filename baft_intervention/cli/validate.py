"""``baft validate``: check files of edits."""

from __future__ import annotations

import argparse
from typing import Any

from .console import BAD_INPUT, OK, Output
from .options import add_command


def add(commands: Any) -> None:
    """The options of ``baft validate``."""
    parser = add_command(
        commands,
        "validate",
        run,
        summary="check files of edits",
        description="Reads every record of the files (a folder stands for all data files in it), and says where each malformed\n"
        "record is and what is wrong with it.",
        example="  baft validate edits.json\n  baft validate ../data --json",
    )
    parser.add_argument("files", nargs="+", metavar="FILE", help="JSON, JSON Lines or CSV files, or folders of them")
    parser.add_argument("--task", help="the benchmark or format, where it is not recognised")


def run(args: argparse.Namespace, out: Output) -> int:
    """Show what is wrong with the files."""
    from ..data import validate

    report = validate(args.files, task=args.task)
    out.say(report.to_text())
    out.result(report.to_dict())
    return OK if report.ok else BAD_INPUT
