"""``baft edit``: train edits of a model and save them as an adapter."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import AdapterError, BaftError, ConfigError, DataError, RequestError
from .console import FAILED, OK, Output, Silent
from .options import MODEL_HELP, add_chat, add_command, add_device, layers, whole

if TYPE_CHECKING:
    from ..config import BaftConfig
    from ..editor.editor import BaftEditor, EditReport
    from ..requests import EditRequest

_ANSWER_TOKENS = 12  # length of the answers shown before and after


def add(commands: Any) -> None:
    """The options of ``baft edit``."""
    parser = add_command(
        commands,
        "edit",
        run,
        summary="edit facts of a model and save them as an adapter",
        description="Trains one small map for each request and saves them all in a folder. All requests are checked before the\n"
        "first is trained; if one fails, nothing is written. The file of edits is JSON, JSON Lines or CSV with the\n"
        "fields prompt and target_new, and optionally subject, id, target_true, rephrase, locality; benchmark files\n"
        "(ZsRE, CounterFact, …) work too.",
        example='  echo \'[{"prompt": "The capital of Japan is", "target_new": "Osaka", "subject": "Japan"}]\' > edits.json\n'
        "  baft edit --model smollm2-135m --edits edits.json --out japan\n"
        '  baft generate --adapter japan --prompt "The capital city of Japan is" --compare\n\n'
        "  more edits into the same adapter:  baft edit --adapter japan --edits more.json",
    )
    parser.add_argument("--model", metavar="M", help=f"{MODEL_HELP}; default: smollm2-135m, or the adapter's")
    parser.add_argument("--edits", metavar="FILE", required=True, help="the edits, as JSON, JSON Lines or CSV")
    parser.add_argument("--out", metavar="DIR", help="folder for the adapter; default: the one of --adapter")
    parser.add_argument("--adapter", metavar="DIR", help="add the edits to this adapter")
    parser.add_argument("--overwrite", action="store_true", help="replace an adapter that --out already holds")
    parser.add_argument("--skip-bad", action="store_true", help="skip requests that cannot be used, and list them")
    parser.add_argument("--limit", type=whole(1), metavar="N", help="only the first N records of the file")
    parser.add_argument("--task", help="the file's benchmark or format if it is not recognised")
    parser.add_argument(
        "--show", type=whole(0), default=20, metavar="N", help="ask the first N prompts before and after; default: 20"
    )
    add_chat(parser)
    settings = parser.add_argument_group("settings", "options that are not given come from --config, else the defaults")
    settings.add_argument("--config", metavar="FILE", help="settings as YAML or JSON, fields of BaftConfig")
    settings.add_argument("--rank", type=int, metavar="R", help="number of bases of an edit; default: 12")
    settings.add_argument(
        "--layers",
        type=layers,
        metavar="L[,L]",
        help="blocks to edit, counted from 0, negative from the end; default: one at 9/10 of the depth",
    )
    settings.add_argument(
        "--positions",
        metavar="RULE",
        help="for a gate other than fact: last (its default), subject, subject_all, prompt, all, f3+l2",
    )
    settings.add_argument(
        "--weighting",
        metavar="NAME",
        help="the gate: fact (the default), cosine, whitened, linear, mlp, constant",
    )
    settings.add_argument("--steps", type=int, metavar="N", help="at most N optimiser steps per edit")
    settings.add_argument("--learning-rate", type=float, metavar="LR", help="learning rate of AdamW")
    settings.add_argument("--seed", type=int, metavar="N", help="the same seed gives the same bytes in the adapter")
    add_device(parser)


def run(args: argparse.Namespace, out: Output) -> int:
    """Train the requests of a file and save the edits."""
    from ..runtime.distributed import is_main, processes

    with processes():
        return _run(args, out if is_main() else Silent())


def _run(args: argparse.Namespace, out: Output) -> int:
    from ..data import load_requests
    from ..runtime.distributed import from_main
    from ..storage.exchange import DESCRIPTION
    from .adapters import check_system, open_editor

    place = from_main(lambda: _place_of_result(args))
    config = _settings(args)
    check_system(args)
    data = load_requests(args.edits, args.task, limit=args.limit, skip_bad=args.skip_bad)
    in_place = args.adapter is not None and place.resolve() == Path(args.adapter).expanduser().resolve()
    keep = from_main(lambda: not in_place and not (place / DESCRIPTION).exists())
    with open_editor(args, config, keep=in_place) as editor:
        return _edit(args, out, editor, data, place, keep=keep, in_place=in_place)


def _edit(
    args: argparse.Namespace, out: Output, editor: BaftEditor, data: Any, place: Path, *, keep: bool, in_place: bool
) -> int:
    """Edit, and write each finished edit to disk; an adapter to be overwritten stays until all edits are finished."""
    from ..models.chat import render_request

    asked = [request.as_chat(args.system) if args.chat else request for request in data.requests]
    if args.skip_bad:
        requests, skipped = _usable(editor, asked)
    else:
        requests, skipped = [render_request(editor.tokenizer, request) for request in asked], []
    skipped = [*data.bad, *skipped]
    if not requests:
        raise DataError(f"{args.edits}: no request can be used; the first problem: {skipped[0]}")
    for text in skipped:
        out.note(f"baft: skipped: {text}")
    shown = [request.prompt for request in requests[: args.show]]
    with editor.enabled(False):
        before = _ask(editor, shown)
    if keep:
        editor.keep_in(place)
    finished = {edit.id for edit in editor.edits}
    try:
        report = editor.edit(requests, progress=out.progress)
    except KeyboardInterrupt:
        new = [edit for edit in editor.edits if edit.id not in finished]
        if not new:
            editor.close(discard=True)
            raise KeyboardInterrupt("interrupted before an edit was finished; nothing was written") from None
        if not in_place:
            editor.save_pretrained(place)
        raise KeyboardInterrupt(
            f"interrupted: {len(new)} of {len(requests)} edits are finished and saved in {place}"
        ) from None
    except BaseException:
        editor.close(discard=True)
        raise
    after = _ask(editor, shown)
    if not in_place:  # otherwise each edit is already in the log
        editor.save_pretrained(place)
    _show(out, report, requests, before, after, place, len(editor.edits))
    out.result(
        {
            "adapter": str(place),
            "base_model": editor.model_name,
            "settings": editor.config.to_dict(),
            **report.to_dict(),
            "answers": [{"prompt": p, "before": b, "after": a} for p, b, a in zip(shown, before, after, strict=True)],
            "skipped": skipped,
            "edits_in_adapter": len(editor.edits),
        }
    )
    return OK if all(edit.reached for edit in report.edits) else FAILED


def _show(
    out: Output,
    report: EditReport,
    requests: Sequence[EditRequest],
    before: Sequence[str],
    after: Sequence[str],
    place: Path,
    total: int,
) -> None:
    edit_of = {request.id: edit for edit in report.edits for request in edit.requests}
    rows = [
        (edit_of[r.id].id, r.question, r.target_new, b, a, "ok" if edit_of[r.id].reached else "missed")
        for r, b, a in zip(requests, before, after, strict=False)
    ]
    if rows:
        out.table(("edit", "prompt", "target", "before", "after", ""), rows, mark=5)
    if 0 < len(rows) < len(requests):
        out.say(f"… and {len(requests) - len(rows)} more")
    missed = [edit for edit in report.edits if not edit.reached]
    what = f"{len(report.edits)} edits" if len(report.edits) != 1 else "1 edit"
    replaced = f", {len(report.replaced)} earlier ones of the same prompts replaced" if report.replaced else ""
    out.say(f"{what} in {report.seconds:.1f} s{replaced}; {total} in {place}")
    if missed:
        out.say(f"{len(missed)} edits do not give the whole target yet; raise --steps or --rank", style="bold red")


def _place_of_result(args: argparse.Namespace) -> Path:
    """The folder for the adapter, checked before the training."""
    from ..storage.exchange import DESCRIPTION
    from ..storage.working_store import check_place

    if args.out is None and args.adapter is None:
        raise ConfigError("give --out DIR, the folder for the adapter")
    place = Path(args.out or args.adapter).expanduser()
    check_place(place)
    same = args.adapter is not None and place.resolve() == Path(args.adapter).expanduser().resolve()
    if (place / DESCRIPTION).exists() and not (same or args.overwrite):
        raise AdapterError(
            f"{place} already holds an adapter; give --adapter {place} to add to it, or --overwrite to replace it"
        )
    return place


def _settings(args: argparse.Namespace) -> BaftConfig:
    """Settings from the given adapter or the ``--config`` file, overridden by options."""
    from ..config import BaftConfig
    from ..storage.exchange import read_directory

    names = (field.name for field in dataclasses.fields(BaftConfig))
    given = {name: value for name in names if (value := getattr(args, name, None)) is not None}
    if args.adapter is None:
        base = BaftConfig.from_file(args.config) if args.config else BaftConfig()
        return dataclasses.replace(base, **given)
    if args.config:
        raise ConfigError(f"{args.adapter} has its own settings; leave --config out, or start a new adapter with --out")
    base = BaftConfig.from_dict(read_directory(args.adapter)[1]["config"], where=f"{args.adapter}: ")
    changed = dataclasses.replace(base, **given)
    for name in BaftConfig.identity_fields():
        if getattr(base, name) != getattr(changed, name):
            raise ConfigError(
                f"--{name} does not fit {args.adapter}, whose edits were made with {name} = {getattr(base, name)!r}; "
                "leave the option out, or start a new adapter with --out"
            )
    return changed


def _usable(editor: BaftEditor, requests: Sequence[EditRequest]) -> tuple[list[EditRequest], list[str]]:
    """Requests that can be trained, and the errors of the others."""
    from ..training.encoding import encode_requests

    good: dict[str, EditRequest] = {}
    bad = []
    for request in requests:
        try:
            [encoded] = encode_requests(editor.tokenizer, [request], editor.config)
            request = encoded.request
            if request.prompt in good:
                raise RequestError(f"{request.where}: an earlier request has the same prompt")
        except BaftError as error:
            bad.append(str(error))
        else:
            good[request.prompt] = request
    return list(good.values()), bad


def _ask(editor: BaftEditor, prompts: Sequence[str]) -> list[str]:
    return editor.generate(list(prompts), max_new_tokens=_ANSWER_TOKENS) if prompts else []
