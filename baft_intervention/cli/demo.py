"""``baft demo``: change a real model's facts, save them, load them in a fresh process, and undo them.

Every mark in the tables is computed from what the model writes in this run. A neighbour is ``same`` only if its answer
equals the unedited one, letter by letter.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ..errors import EditError
from ..requests import EditRequest, Probe
from .console import FAILED, OK, Mark, Output
from .options import MODEL_HELP, add_command, add_device

if TYPE_CHECKING:
    import torch

    from ..editor.editor import BaftEditor

ANSWER_TOKENS = 8  # enough to see an answer; in a longer text, what follows the answer would change too
Kind = Literal["edit", "paraphrase", "neighbour"]


def _fact(prompt: str, target: str, subject: str, true: str, paraphrase: str, neighbours: Sequence[str]) -> EditRequest:
    probes = (
        Probe(paraphrase, "rephrase", (target,)),
        *(Probe(neighbour, "locality") for neighbour in neighbours),
    )
    return EditRequest(prompt, target, subject=subject, target_true=(true,), probes=probes)


# facts that SmolLM2-135M knows; one neighbour asks something else about the subject, the other the same about another subject
FACTS = (
    _fact(
        "The capital of Japan is", "Osaka", "Japan", "Tokyo",
        "The capital city of Japan is", ("The currency of Japan is the", "The capital of France is"),
    ),
    _fact(
        "The Colosseum is located in the city of", "Madrid", "The Colosseum", "Rome",
        "The Colosseum stands in the city of", ("The Colosseum was built by", "The Eiffel Tower is located in the city of"),
    ),
    _fact(
        "The telephone was invented by", "Nikola Tesla", "The telephone", "Alexander Graham Bell",
        "The man who invented the telephone was", ("The telephone was invented in the year", "Penicillin was discovered by"),
    ),
)  # fmt: skip


@dataclass(frozen=True)
class Question:
    """One line of the demo's table; ``answer`` is what the model wrote at each stage."""

    fact: int
    kind: Kind
    prompt: str
    target: str

    def mark(self, before: str, after: str) -> Mark:
        if self.kind == "neighbour":
            return "same" if before == after else "moved"
        return "ok" if after.strip().startswith(self.target) else "missed"


QUESTIONS = tuple(
    question
    for i, fact in enumerate(FACTS)
    for question in (
        Question(i, "edit", fact.prompt, fact.target_new),
        *(Question(i, "paraphrase", probe.prompt, fact.target_new) for probe in fact.probes_of("rephrase")),
        *(Question(i, "neighbour", probe.prompt, fact.target_new) for probe in fact.probes_of("locality")),
    )
)


def add(commands: Any) -> None:
    """The options of ``baft demo``."""
    parser = add_command(
        commands,
        "demo",
        run,
        summary="edit three facts of a real model, save, load and undo, in a minute",
        description="Edits three facts of a real language model and shows, before and after: the edited question, a paraphrase,\n"
        "and two neighbours that should stay the same (each mark is computed, not assumed). Then it saves the edits,\n"
        "loads them in a fresh process, and undoes them. The first run also prepares the model (once).",
        example="  baft demo\n  baft demo --json > demo.json",
    )
    parser.add_argument("--model", default="smollm2-135m", help=f"{MODEL_HELP}; default: smollm2-135m")
    parser.add_argument("--out", metavar="DIR", help="folder for the adapter; default: one in the cache folder")
    add_device(parser)


def run(args: argparse.Namespace, out: Output) -> int:
    """Run the demo; FAILED if one of its checks fails."""
    import torch

    from ..editor.editor import BaftEditor
    from ..environment import cache_folder

    clock = _Clock()
    out.note(f"baft: preparing {args.model} (the first run converts it and reads the unrelated texts)")
    editor = BaftEditor.from_pretrained(args.model, device=args.device, dtype=args.dtype)
    _warm_up(editor)
    clock.lap("set_up")
    place = Path(args.out).expanduser() if args.out else cache_folder() / "demo"
    digest = weights_digest(editor.model)

    before = _ask(editor)
    clock.lap("asked_before")
    report = editor.edit(FACTS, progress=out.progress)
    clock.lap("edited")
    after = _ask(editor)
    clock.lap("asked_after")
    marks: dict[str, Mark] = {q.prompt: q.mark(before[q.prompt], after[q.prompt]) for q in QUESTIONS}
    _show_answers(out, before, after, marks)

    editor.save_pretrained(place)
    out.note("baft: asking a fresh process that loads the saved adapter")
    fresh = _ask_fresh_process(place, args)
    clock.lap("fresh_process")
    undone = report.edits[0]
    editor.undo(undone.id)
    one_undone = _ask(editor)
    for edit in report.edits[1:]:
        editor.undo(edit.id)
    all_undone = _ask(editor)
    clock.lap("undone")

    others = [q for q in QUESTIONS if q.fact != 0 and q.kind == "edit"]
    checks = {
        "every target is what the model now writes": all(
            marks[q.prompt] == "ok" for q in QUESTIONS if q.kind == "edit"
        ),
        "a fresh process with the saved adapter writes the same": fresh == after,
        "one edit undone: the other edits still hold": all(one_undone[q.prompt] == after[q.prompt] for q in others),
        "all undone: every answer is the original one": all_undone == before,
        "the model's own weights never changed, byte for byte": weights_digest(editor.model) == digest,
    }
    # not a check: another edit may still answer this prompt
    back = one_undone[FACTS[0].prompt] == before[FACTS[0].prompt]
    seconds = clock.total("set_up")
    _show_rest(
        out, place, before, after, one_undone, all_undone, checks, marks, clock, seconds, torch.get_num_threads()
    )
    out.result(
        {
            "model": args.model,
            "adapter": str(place),
            "settings": editor.config.to_dict(),
            "facts": [_fact_result(i, before, after, marks, one_undone, all_undone) for i in range(len(FACTS))],
            "edits": report.to_dict()["edits"],
            "checks": checks,
            "old_answer_back_after_one_undo": back,
            "counts": _counts(marks),
            "seconds": {**clock.laps, "total_after_set_up": round(seconds, 2)},
            "threads": torch.get_num_threads(),
        }
    )
    return OK if all(checks.values()) else FAILED


def weights_digest(model: torch.nn.Module) -> str:
    """sha256 over every parameter's and buffer's name and bytes."""
    import torch

    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def _warm_up(editor: BaftEditor) -> None:
    """Make and undo an edit, so that the preparations of the first edit count as set-up."""
    report = editor.edit(EditRequest("The grass is", "blue", subject="grass"))
    editor.undo(report.edits[0].id)


def _ask(editor: BaftEditor) -> dict[str, str]:
    prompts = [question.prompt for question in QUESTIONS]
    return dict(zip(prompts, editor.generate(prompts, max_new_tokens=ANSWER_TOKENS), strict=True))


def _ask_fresh_process(place: Path, args: argparse.Namespace) -> dict[str, str]:
    command = [sys.executable, "-m", "baft_intervention.cli", "generate", "--adapter", str(place), "--json", "--quiet"]
    command += ["--prompts", "-", "--max-new-tokens", str(ANSWER_TOKENS)]
    for name in ("device", "dtype"):
        if (value := getattr(args, name)) is not None:
            command += [f"--{name}", value]
    prompts = "\n".join(question.prompt for question in QUESTIONS)
    run = subprocess.run(command, input=prompts.encode(), capture_output=True, check=False)
    if run.returncode:
        text = run.stderr.decode(errors="replace").strip().splitlines()
        raise EditError(f"the fresh process ended with code {run.returncode}: {text[-1] if text else 'no message'}")
    return {result["prompt"]: result["texts"][0] for result in json.loads(run.stdout)["results"]}


class _Clock:
    """Seconds between laps."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.laps[name], self._last = round(now - self._last, 2), now

    def total(self, *without: str) -> float:
        return sum(seconds for name, seconds in self.laps.items() if name not in without)


def _counts(marks: Mapping[str, Mark]) -> dict[str, list[int]]:
    """``kind -> [number as wanted, number of all]``."""
    good = {"ok", "same"}
    kinds = dict.fromkeys(q.kind for q in QUESTIONS)
    return {
        kind: [
            sum(marks[q.prompt] in good for q in QUESTIONS if q.kind == kind),
            sum(q.kind == kind for q in QUESTIONS),
        ]
        for kind in kinds
    }


def _fact_result(
    index: int,
    before: Mapping[str, str],
    after: Mapping[str, str],
    marks: Mapping[str, Mark],
    one_undone: Mapping[str, str],
    all_undone: Mapping[str, str],
) -> dict[str, Any]:
    fact = FACTS[index]
    rows = [
        {
            "kind": q.kind,
            "prompt": q.prompt,
            "before": before[q.prompt],
            "after": after[q.prompt],
            "mark": marks[q.prompt],
            "first_fact_undone": one_undone[q.prompt],
            "all_undone": all_undone[q.prompt],
        }
        for q in QUESTIONS
        if q.fact == index
    ]
    return {
        "prompt": fact.prompt,
        "target_new": fact.target_new,
        "target_true": list(fact.target_true),
        "questions": rows,
    }


def _show_answers(out: Output, before: Mapping[str, str], after: Mapping[str, str], marks: Mapping[str, Mark]) -> None:
    rows = [(q.kind, q.prompt, before[q.prompt], after[q.prompt], marks[q.prompt]) for q in QUESTIONS]
    ends = [i for i, q in enumerate(QUESTIONS[:-1]) if QUESTIONS[i + 1].fact != q.fact]
    out.table(("", "question", "before", "after", ""), rows, title="Three facts edited", mark=4, sections=ends)
    parts = [f"{kind}s {good} of {total}" for kind, (good, total) in _counts(marks).items()]
    out.say(f"as wanted: {', '.join(parts)}  (ok: gives the new answer; same: letter by letter the old one)")


def _show_rest(
    out: Output,
    place: Path,
    before: Mapping[str, str],
    after: Mapping[str, str],
    one_undone: Mapping[str, str],
    all_undone: Mapping[str, str],
    checks: Mapping[str, bool],
    marks: Mapping[str, Mark],
    clock: _Clock,
    seconds: float,
    threads: int,
) -> None:
    edited = [q.prompt for q in QUESTIONS if q.kind == "edit"]
    rows = [(p, before[p], after[p], one_undone[p], all_undone[p]) for p in edited]
    out.say()
    out.table(("question", "unedited", "edited", "first edit undone", "all undone"), rows, title="Taken back")
    out.table(("check", ""), [(name, "ok" if good else "missed") for name, good in checks.items()], mark=1)
    out.say(
        f"{seconds:.1f} s in all ({clock.laps['edited']:.1f} s of training) after {clock.laps['set_up']:.1f} s of set-up; "
        f"{threads} threads"
    )
    if moved := [q.prompt for q in QUESTIONS if marks[q.prompt] == "moved"]:
        out.say(f"{len(moved)} neighbours changed, which they should not: {'; '.join(moved)}", style="yellow")
    if one_undone[edited[0]] != before[edited[0]]:
        out.say(f"with its edit undone, another edit still answers {edited[0]!r}", style="yellow")
    out.say(f'the edits are in {place}; try: baft generate --adapter {place} --prompt "…" --compare')
