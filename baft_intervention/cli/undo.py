"""``baft undo``: undo edits."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ..errors import ConfigError, EditError, RequestError
from .console import OK, Output
from .options import add_adapter, add_command, add_device


def add(commands: Any) -> None:
    """The options of ``baft undo``."""
    parser = add_command(
        commands,
        "undo",
        run,
        summary="undo edits",
        description="Removes edits from an adapter folder; baft list shows their ids.",
        example="  baft undo --adapter japan 3f0c2a91d7be\n  baft undo --adapter japan --all",
    )
    parser.add_argument("ids", nargs="*", metavar="ID", help="id of an edit; several are possible")
    add_adapter(parser)
    parser.add_argument("--all", action="store_true", help="undo every edit")
    parser.add_argument("--out", metavar="DIR", help="write the result to this folder and leave --adapter as it is")
    add_device(parser)


def run(args: argparse.Namespace, out: Output) -> int:
    """Undo edits and save what is left."""
    from ..storage.working_store import check_place
    from .adapters import open_editor

    if bool(args.ids) == args.all:
        raise ConfigError("give the ids of the edits to undo (baft list shows them), or --all")
    place = Path(args.out or args.adapter).expanduser()
    check_place(place)
    with open_editor(args, keep=args.out is None) as editor:
        try:
            undone = editor.undo_all([edit.id for edit in editor.edits] if args.all else list(dict.fromkeys(args.ids)))
        except EditError as error:
            raise RequestError(f"{args.adapter}: {error}") from None
        if args.out is not None:  # otherwise the change is already in the log
            editor.save_pretrained(place)
    rows = [(edit.id, request.question, request.target_new) for edit in undone for request in edit.requests]
    if rows:
        out.table(("undone", "prompt", "target was"), rows)
    out.say(f"{len(undone)} undone, {len(editor.edits)} left in {place}")
    left = [edit.id for edit in editor.edits]
    out.result({"adapter": str(place), "undone": [edit.summary() for edit in undone], "left": left})
    return OK
