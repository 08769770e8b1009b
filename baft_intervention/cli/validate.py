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
        description="Reads every record of the files (a folder means all data files in it), and reports each malformed record\n"
        "with its place and problem.",
        example="  baft validate edits.json\n  baft validate ../data --json",
    )
    parser.add_argument("files", nargs="+", metavar="FILE", help="JSON, JSON Lines or CSV files, or folders of them")
    parser.add_argument("--task", help="the benchmark or format if it is not recognised")


def run(args: argparse.Namespace, out: Output) -> int:
    """Show what is in the files and what is wrong with them."""
    from ..data import validate

    report = validate(args.files, task=args.task)
    out.say(report.to_text())
    out.result(report.to_dict())
    return OK if report.ok else BAD_INPUT
