"""``baft list``: show the edits of an adapter."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

from .console import OK, Output
from .options import add_adapter, add_command


def add(commands: Any) -> None:
    """The options of ``baft list``."""
    parser = add_command(
        commands,
        "list",
        run,
        summary="show the edits of an adapter",
        description="Shows the edits of an adapter folder and the settings they were made with. The base model is not needed.",
        example="  baft list --adapter japan\n  baft list --adapter many --find Osaka",
    )
    add_adapter(parser, moved_model=False)
    parser.add_argument("--find", metavar="TEXT", help="only edits with this text in id, prompt, subject or target")


def run(args: argparse.Namespace, out: Output) -> int:
    """Show a table of the edits."""
    from ..config import BaftConfig
    from ..requests import EditRequest
    from ..storage.exchange import read_directory

    _, description = read_directory(args.adapter)
    base, edits = description["base_model"], description["edits"]
    config = BaftConfig.from_dict(description["config"], where=f"{args.adapter}: ").to_dict()
    if args.find is not None:
        edits = [edit for edit in edits if any(args.find.casefold() in text for text in _searched(edit))]
    rows = []
    for edit in edits:
        facts = edit["steps"], f"{edit['loss']:.3f}", "ok" if edit["reached"] else "missed"
        asked = [EditRequest.from_dict(request) for request in edit["requests"]]
        rows += [(edit["id"], request.question, request.target_new, *facts) for request in asked]
    if rows:
        out.table(("edit", "prompt", "target", "steps", "loss", ""), rows, mark=5)
    total = len(description["edits"])
    out.say(
        f"{'' if args.find is None else f'{len(edits)} of '}{total} edit{'s' * (total != 1)} of {base['name']} "
        f"({base.get('dtype')}); weighting {config['weighting']}, rank {config['rank']}, layers {description['layers']}, "
        f"positions {config['positions']}"
    )
    out.result(
        {
            "adapter": args.adapter,
            "base_model": base,
            "settings": config,
            "layers": description["layers"],
            "edits": edits,
            "edits_in_adapter": total,
            "versions": description.get("versions", {}),
        }
    )
    return OK


def _searched(edit: Mapping[str, Any]) -> list[str]:
    """The texts that ``--find`` searches: the id, and prompt, subject and target of each request."""
    requests = [request.get(name) for request in edit["requests"] for name in ("prompt", "subject", "target_new")]
    return [text.casefold() for text in (edit["id"], *requests) if text]
