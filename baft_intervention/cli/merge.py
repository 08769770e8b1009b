"""``baft merge``: add another adapter's edits to an adapter."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ..errors import AdapterError
from .console import OK, Output
from .options import add_adapter, add_command, add_device


def add(commands: Any) -> None:
    """The options of ``baft merge``."""
    parser = add_command(
        commands,
        "merge",
        run,
        summary="merge the edits of two adapters",
        description="Adds the edits of another adapter of the same base model and settings to --adapter. An edit that both have\n"
        "is kept once. If both answer a prompt differently, nothing is merged unless --on-conflict says whose answer to keep.",
        example="  baft merge --adapter ours theirs --out both\n  baft merge --adapter ours theirs --on-conflict theirs",
    )
    parser.add_argument("other", metavar="OTHER", help="the adapter folder to add edits from; it stays as it is")
    add_adapter(parser)
    parser.add_argument("--out", metavar="DIR", help="write the result to this new folder and leave --adapter as it is")
    parser.add_argument(
        "--on-conflict",
        choices=("error", "ours", "theirs"),
        default="error",
        help="a prompt with two answers: refuse (the default), or keep the answer of --adapter or of OTHER",
    )
    add_device(parser)


def run(args: argparse.Namespace, out: Output) -> int:
    """Merge two adapters and save the result."""
    from ..storage.exchange import DESCRIPTION
    from ..storage.working_store import check_place
    from .adapters import open_editor

    place = Path(args.out or args.adapter).expanduser()
    check_place(place)
    if args.out is not None and (place / DESCRIPTION).exists():
        raise AdapterError(
            f"{place} already holds an adapter; leave --out out to merge into --adapter, or give a new folder"
        )
    with open_editor(args, keep=args.out is None) as editor:
        report = editor.merge(args.other, on_conflict=args.on_conflict)
        if args.out is not None:  # otherwise the change is already in the log
            editor.save_pretrained(place)
    kept = "theirs" if report.kept == "theirs" else "ours"
    rows = [(conflict.prompt, conflict.ours, conflict.theirs, kept) for conflict in report.conflicts]
    if rows:
        out.table(("conflict", "ours", "theirs", "kept"), rows)
    for old, new in report.renamed.items():
        out.say(f"their edit {old} is now {new}: an edit of another prompt has that id")
    out.say(
        f"{len(report.added)} edits added, {len(report.same)} already there, {len(report.conflicts)} conflicts; "
        f"{len(editor.edits)} in {place}"
    )
    out.result({"adapter": str(place), **report.to_dict(), "edits_in_adapter": len(editor.edits)})
    return OK
