"""What ``baft edit``, ``generate``, ``inspect``, ``list``, ``undo``, ``merge``, ``recover`` and ``validate`` do."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..config import BaftConfig
from ..data import load_requests, validate
from ..editor.editor import BaftEditor, EditReport
from ..errors import AdapterError, BaftError, ConfigError, DataError, EditError, RequestError
from ..models.chat import render_request
from ..models.loading import load_model
from ..requests import EditRequest
from ..runtime.distributed import from_main, is_main, processes
from ..storage.exchange import DESCRIPTION, read_directory
from ..storage.working_store import check_place, write_directory
from ..training.engine import encode_request
from .console import Output, Silent, can_show, one_line
from .main import BAD_INPUT, FAILED, OK

# command-line options that are fields of BaftConfig; the first four decide what an adapter's tensors are
_STRUCTURE = ("rank", "layers", "positions", "weighting")
_SETTINGS = (*_STRUCTURE, "steps", "learning_rate", "seed")
_ANSWER_TOKENS = 12  # of the answers that `edit` shows before and after


# ------------------------------------------------------------------------------------------- edit


def run_edit(args: argparse.Namespace, out: Output) -> int:
    with processes():
        return _run_edit(args, out if is_main() else Silent())


def _run_edit(args: argparse.Namespace, out: Output) -> int:
    place = from_main(lambda: _place_of_result(args))
    config = _settings(args)
    _check_system(args)
    data = load_requests(args.edits, args.task, limit=args.limit, skip_bad=args.skip_bad)
    in_place = args.adapter is not None and place.resolve() == Path(args.adapter).expanduser().resolve()
    keep = from_main(lambda: not in_place and not (place / DESCRIPTION).exists())
    with _open_editor(args, config, keep=in_place) as editor:
        return _edit(args, out, editor, data, place, keep=keep)


def _edit(args: argparse.Namespace, out: Output, editor: BaftEditor, data: Any, place: Path, *, keep: bool) -> int:
    """Edit, each edit on the disk as soon as it is finished; what ``--overwrite`` replaces stays until all are."""
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
        editor.save_pretrained(place)
        raise KeyboardInterrupt(
            f"interrupted: {len(new)} of {len(requests)} edits are finished and saved in {place}"
        ) from None
    except BaseException:
        editor.close(discard=True)
        raise
    after = _ask(editor, shown)
    editor.save_pretrained(place)
    _show_edit(out, report, requests, before, after, place, len(editor.edits))
    result = report.to_dict()
    out.result(
        {
            "adapter": str(place),
            "base_model": editor.model_name,
            "settings": editor.config.to_dict(),
            **result,
            "answers": [{"prompt": p, "before": b, "after": a} for p, b, a in zip(shown, before, after, strict=True)],
            "skipped": skipped,
            "edits_in_adapter": len(editor.edits),
        }
    )
    return OK if all(edit.reached for edit in report.edits) else FAILED


def _show_edit(
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
        out.say(f"{len(missed)} do not give the whole target yet; raise --steps or --rank", style="bold red")


def _check_system(args: argparse.Namespace) -> None:
    if args.system is not None and not args.chat:
        raise ConfigError("--system is a message of a conversation; give --chat with it")


def _place_of_result(args: argparse.Namespace) -> Path:
    """Where the adapter goes, refused now and not after the training."""
    if args.out is None and args.adapter is None:
        raise ConfigError("give --out DIR, the folder for the adapter")
    place = Path(args.out or args.adapter).expanduser()
    check_place(place)
    same = args.adapter is not None and place.resolve() == Path(args.adapter).expanduser().resolve()
    if (place / DESCRIPTION).exists() and not (same or args.overwrite):
        raise AdapterError(
            f"{place} holds an adapter already; give --adapter {place} to add to it, or --overwrite to replace it"
        )
    return place


def _settings(args: argparse.Namespace) -> BaftConfig:
    """Settings from the adapter to continue or the file, with the options on top."""
    given = {name: getattr(args, name) for name in _SETTINGS if getattr(args, name) is not None}
    if args.adapter is None:
        base = BaftConfig.from_file(args.config) if args.config else BaftConfig()
        return dataclasses.replace(base, **given)
    if args.config:
        raise ConfigError(f"{args.adapter} has its own settings; leave --config out, or start a new adapter with --out")
    base = BaftConfig.from_dict(read_directory(args.adapter)[1]["config"], where=f"{args.adapter}: ")
    changed = dataclasses.replace(base, **given)
    for name in _STRUCTURE:
        if getattr(base, name) != getattr(changed, name):
            raise ConfigError(
                f"--{name} does not fit {args.adapter}, whose edits were made with {name} = {getattr(base, name)!r}; "
                "leave the option out, or start a new adapter with --out"
            )
    return changed


def _usable(editor: BaftEditor, requests: Sequence[EditRequest]) -> tuple[list[EditRequest], list[str]]:
    """Requests that can be trained, and what is wrong with the others."""
    good: dict[str, EditRequest] = {}
    bad = []
    for request in requests:
        try:
            request = render_request(editor.tokenizer, request)
            encode_request(editor.tokenizer, request, editor.config)
            if request.prompt in good:
                raise RequestError(f"{request.where}: an earlier request has the same prompt")
        except BaftError as error:
            bad.append(str(error))
        else:
            good[request.prompt] = request
    return list(good.values()), bad


def _ask(editor: BaftEditor, prompts: Sequence[str]) -> list[str]:
    return editor.generate(list(prompts), max_new_tokens=_ANSWER_TOKENS) if prompts else []


def _open_editor(args: argparse.Namespace, config: BaftConfig | None = None, *, keep: bool = False) -> BaftEditor:
    """The editor of ``--adapter``, of ``--model``, or of an adapter whose base model is now elsewhere.

    With ``keep``, ``--adapter`` is opened for writing: nobody else writes to it until the editor is closed.
    """
    if args.adapter is None:
        return BaftEditor.from_pretrained(args.model or "smollm2-135m", config, device=args.device, dtype=args.dtype)
    if not (Path(args.adapter).expanduser() / DESCRIPTION).is_file():
        read_directory(args.adapter)  # otherwise it would be taken for a model, or made; this says what is wrong
    if keep:
        return BaftEditor.open(args.adapter, args.model, config, device=args.device, dtype=args.dtype)
    if args.model is None:
        editor = BaftEditor.from_pretrained(args.adapter, device=args.device, dtype=args.dtype)
        editor.config = config or editor.config
        return editor
    _, description = read_directory(args.adapter)
    config = config or BaftConfig.from_dict(description["config"], where=f"{args.adapter}: ")
    dtype = args.dtype or description["base_model"].get("dtype")
    model, tokenizer = load_model(args.model, device=args.device, dtype=dtype)
    editor = BaftEditor(model, tokenizer, config, model_name=args.model)
    editor.load_adapter(args.adapter)
    return editor


# ------------------------------------------------------------------------------------------- generate


def run_generate(args: argparse.Namespace, out: Output) -> int:
    import torch

    if args.adapter is None and args.model is None:
        raise ConfigError("give --adapter DIR (an edited model) or --model M (an unedited one)")
    _check_system(args)
    if args.compare and args.adapter is None:
        raise ConfigError("--compare shows the unedited model beside the edited one; it needs --adapter")
    prompts = _prompts(args)
    options = _decoding(args)
    asked: list[Any] = [_conversation(prompt, args.system) for prompt in prompts] if args.chat else prompts
    editor = _open_editor(args)

    def ask() -> list[Any]:
        torch.manual_seed(args.seed)
        return editor.generate(asked, max_new_tokens=args.max_new_tokens, batch_size=args.batch_size, **options)

    answers = [a if isinstance(a, list) else [a] for a in ask()]
    unedited: list[list[str]] | None = None
    if args.compare:
        with editor.enabled(False):
            unedited = [a if isinstance(a, list) else [a] for a in ask()]
    results = []
    for i, prompt in enumerate(prompts):
        result: dict[str, Any] = {"prompt": prompt, "texts": answers[i]}
        if unedited is not None:
            result |= {"unedited": unedited[i], "same": unedited[i] == answers[i]}
        results.append(result)
    out.result(
        {
            "base_model": editor.model_name,
            "adapter": args.adapter,
            "edits": len(editor.edits),
            "options": {"max_new_tokens": args.max_new_tokens, "seed": args.seed, **options},
            "results": results,
        }
    )
    if unedited is not None:
        rows = [
            (prompt, old, new, "same" if old == new else "changed")
            for i, prompt in enumerate(prompts)
            for old, new in zip(unedited[i], answers[i], strict=True)
        ]
        out.table(("prompt", "unedited", "edited", ""), rows, mark=3)
    else:
        out.table(
            ("prompt", "answer"), [(p, text) for p, texts in zip(prompts, answers, strict=True) for text in texts]
        )
    return OK


def _prompts(args: argparse.Namespace) -> list[str]:
    prompts = list(args.prompt or [])
    source = args.prompts
    if source is None and not prompts:
        if sys.stdin is None or sys.stdin.isatty():
            raise DataError('give a prompt: --prompt "…", --prompts FILE, or text on standard input')
        source = "-"
    if source is not None:
        name = "standard input" if source == "-" else source
        try:
            text = sys.stdin.buffer.read() if source == "-" else Path(source).expanduser().read_bytes()
            lines = text.decode("utf-8-sig").split("\n")
        except OSError as error:
            raise DataError(f"{name}: cannot be read: {error.strerror or error}") from None
        except UnicodeDecodeError as error:
            raise DataError(f"{name}: byte {error.start} is not UTF-8 ({error.reason}); save it as UTF-8") from None
        prompts += [line.removesuffix("\r") for line in lines if line.strip()]
        if not prompts:
            raise DataError(f"{name}: there is no prompt in it; write one a line")
    for prompt in prompts:
        if not prompt.strip():
            raise DataError("a prompt is empty; give some text")
        if not prompt.isprintable() and any("\ud800" <= c <= "\udfff" for c in prompt):
            raise DataError(f"the prompt {prompt!r} is not UTF-8 text")
    return prompts


def _conversation(prompt: str, system: str | None) -> list[dict[str, str]]:
    first = [] if system is None else [{"role": "system", "content": system}]
    return [*first, {"role": "user", "content": prompt}]


def _decoding(args: argparse.Namespace) -> dict[str, Any]:
    if not args.sample and (args.temperature is not None or args.top_p is not None):
        raise ConfigError("--temperature and --top-p are about drawing tokens; give --sample with them")
    if args.count > 1 and not args.sample and (args.beams or 1) < args.count:
        raise ConfigError(f"--count {args.count} answers a prompt need --sample, or --beams of at least as many")
    options: dict[str, Any] = {"do_sample": bool(args.sample)}
    if args.sample:
        options |= {"temperature": args.temperature or 1.0, "top_p": args.top_p or 1.0, "top_k": 0}
    if args.beams is not None:
        options["num_beams"] = args.beams
    if args.count > 1:
        options["num_return_sequences"] = args.count
    return options


# ------------------------------------------------------------------------------------------- inspect


def run_inspect(args: argparse.Namespace, out: Output) -> int:
    from ..analysis.figures import to_plain
    from ..analysis.inspection import ASCII, BLOCKS, heat_lines, inspect_prompt

    [prompt] = _prompts(argparse.Namespace(prompt=[args.prompt], prompts=None))
    if args.png is not None:
        from ..analysis.plots import png_path

        png_path(args.png)  # refused now and not after the model is loaded
    editor = _open_editor(args)
    if not editor.edits:
        raise AdapterError(
            f"{args.adapter} holds no edit; add one with: baft edit --adapter {args.adapter} --edits FILE"
        )
    found = inspect_prompt(editor, prompt, top=args.top)
    if args.png is not None:
        from ..analysis.plots import draw_inspection, save

        save(draw_inspection(found), args.png)
    out.say(f"edits that act on {found.prompt!r}: {len(found.acting)} of {found.total}", style="bold")
    shades = BLOCKS if can_show(BLOCKS) else ASCII
    for view in found.edits:
        out.say()
        out.say(one_line(f"{view.id}: {view.prompt} -> {view.target} (block {view.layer})"), style="bold")
        out.say(f"  {view.reason}", style="green" if view.acts else "yellow")
        for line, acts in heat_lines(found, view, shades=shades):
            out.say(line, style="bold green" if acts else "")
    out.say()
    steps = ("0", "to 1/4", "to 1/2", "to 3/4", "to 1")
    out.say(
        f"weights: {', '.join(f'{s} {t}' for s, t in zip(shades, steps, strict=True))}; * edited token, elsewhere what it would be"
    )
    if args.png is not None:
        out.say(f"drawn in {args.png}")
    out.result({"adapter": args.adapter, "png": args.png, **to_plain(found)})
    return OK


# ------------------------------------------------------------------------------------------- folders of edits


def run_list(args: argparse.Namespace, out: Output) -> int:
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
    """Where ``--find`` looks: the id, and of each request prompt, subject and target."""
    requests = [request.get(name) for request in edit["requests"] for name in ("prompt", "subject", "target_new")]
    return [text.casefold() for text in (edit["id"], *requests) if text]


def run_undo(args: argparse.Namespace, out: Output) -> int:
    if bool(args.ids) == args.all:
        raise ConfigError("give the ids of the edits to undo (baft list shows them), or --all")
    place = Path(args.out or args.adapter).expanduser()
    check_place(place)
    editor = _open_editor(args, keep=args.out is None)
    with editor:
        try:
            undone = editor.undo_all([edit.id for edit in editor.edits] if args.all else list(dict.fromkeys(args.ids)))
        except EditError as error:
            raise RequestError(f"{args.adapter}: {error}") from None
        editor.save_pretrained(place)
    rows = [(edit.id, request.question, request.target_new) for edit in undone for request in edit.requests]
    if rows:
        out.table(("undone", "prompt", "target was"), rows)
    out.say(f"{len(undone)} undone, {len(editor.edits)} left in {place}")
    left = [edit.id for edit in editor.edits]
    out.result({"adapter": str(place), "undone": [edit.summary() for edit in undone], "left": left})
    return OK


def run_merge(args: argparse.Namespace, out: Output) -> int:
    place = Path(args.out or args.adapter).expanduser()
    check_place(place)
    if args.out is not None and (place / DESCRIPTION).exists():
        raise AdapterError(
            f"{place} holds an adapter already; leave --out away to merge into --adapter, or give a new folder"
        )
    editor = _open_editor(args, keep=args.out is None)
    with editor:
        report = editor.merge(args.other, on_conflict=args.on_conflict)
        editor.save_pretrained(place)
    kept = "theirs" if report.kept == "theirs" else "ours"
    rows = [(conflict.prompt, conflict.ours, conflict.theirs, kept) for conflict in report.conflicts]
    if rows:
        out.table(("conflict", "ours", "theirs", "kept"), rows)
    for old, new in report.renamed.items():
        out.say(f"their edit {old} is {new} here: an edit of another prompt has that id")
    out.say(
        f"{len(report.added)} edits taken in, {len(report.same)} were there already, {len(report.conflicts)} conflicts; "
        f"{len(editor.edits)} in {place}"
    )
    out.result({"adapter": str(place), **report.to_dict(), "edits_in_adapter": len(editor.edits)})
    return OK


def run_recover(args: argparse.Namespace, out: Output) -> int:
    place = Path(args.out).expanduser()
    check_place(place)
    if (place / DESCRIPTION).exists():
        raise AdapterError(f"{place} holds an adapter already; give a new folder, so that nothing is lost by this")
    state, description = read_directory(args.adapter, recover=True)
    write_directory(
        place, state, {k: v for k, v in description.items() if k not in ("schema", "seal", "tensors_sha256")}
    )
    edits = description["edits"]
    out.say(f"{len(edits)} edits are whole and in {place}; {args.adapter} is as it was")
    out.result({"adapter": str(place), "edits": [edit["id"] for edit in edits]})
    return OK


def run_validate(args: argparse.Namespace, out: Output) -> int:
    report = validate(args.files, task=args.task)
    out.say(report.to_text())
    out.result(report.to_dict())
    return OK if report.ok else BAD_INPUT
