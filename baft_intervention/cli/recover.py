"""``baft recover``: save the intact edits of a damaged adapter."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ..errors import AdapterError
from .console import OK, Output
from .options import add_command


def add(commands: Any) -> None:
    """The options of ``baft recover``."""
    parser = add_command(
        commands,
        "recover",
        run,
        summary="save the intact edits of a damaged adapter",
        description="Copies everything that matches its checksums from a folder with a damaged log (adapter.log) to a new folder,\n"
        "and says what is lost. An edit comes back if the record that replaced or undid it is lost. The damaged folder\n"
        "stays as it is.",
        example="  baft recover --adapter japan --out recovered",
    )
    parser.add_argument("--adapter", metavar="DIR", required=True, help="the damaged folder")
    parser.add_argument("--out", metavar="DIR", required=True, help="a new folder for the intact edits")


def run(args: argparse.Namespace, out: Output) -> int:
    """Copy the intact edits."""
    from ..storage.exchange import DESCRIPTION, read_directory
    from ..storage.working_store import check_place, write_directory

    place = Path(args.out).expanduser()
    check_place(place)
    if (place / DESCRIPTION).exists():
        raise AdapterError(f"{place} already holds an adapter, which would be overwritten; give a new folder")
    state, description = read_directory(args.adapter, recover=True)
    write_directory(
        place, state, {k: v for k, v in description.items() if k not in ("schema", "seal", "tensors_sha256")}
    )
    edits = description["edits"]
    out.say(f"{len(edits)} intact edits are in {place}; {args.adapter} is unchanged")
    out.result({"adapter": str(place), "edits": [edit["id"] for edit in edits]})
    return OK
