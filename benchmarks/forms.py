"""Does an edit hold however it is asked, and does everything else about its subject stay? HalluEditBench's facts, in three forms.

    python benchmarks/forms.py --methods loreft,baft --n 60 --out benchmarks/results/forms

Each fact is edited alone, three times: as a question, as an unfinished statement ("The R of S is") and in chat. Each edit is then
asked the same questions, none of which training sees. The table gives, in percent, how many are followed (the next token begins
the new answer; with --text also: the first sentence that the model writes names it) and how many stay (the next token is the
unedited model's; in brackets: its logits are bit-equal). --part validation reads the six topics on which settings may be
chosen, --part test the other seven. Finished records are kept, so that the same command resumes a run.
"""

from __future__ import annotations

import argparse
import csv
import random
import re
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))

from edited_facts import make_parser, measured, read_options, report

from baft_intervention import EditRequest, Message
from baft_intervention.data import split_of
from baft_intervention.evaluation.edited import EditedModel
from baft_intervention.models.chat import render_chat
from baft_intervention.models.tokenization import encode_pair, encode_prompt, pad_rows, pad_token_id

ASKED = ("question", "paraphrased_question", "locality_question")  # columns that must name the subject
FORMS = ("question", "statement", "chat")
FOLLOW = ("own form", "other form", "paraphrase", "chat question", "chat paraphrase")
STAY = (
    "same subject", "same subject, chat", "What is S known for?", "When did S begin?", "S is famous for its", "reversed",
    "another subject",
)  # fmt: skip


def read_facts(folder: Path, part: str, count: int, seed: int) -> list[dict[str, str]]:
    """``count`` facts, as many of each topic as of the others, one a subject; each with another fact's question."""
    topics = [path for path in sorted(folder.glob("*.csv")) if split_of(path) == part]
    if not topics:
        raise SystemExit(f"{folder} has no topic of the {part} part; give --data-dir or set BAFT_DATA")
    drawn: list[list[dict[str, str]]] = []
    for path in topics:
        with path.open(encoding="utf-8", newline="") as file:
            rows = [row for row in csv.DictReader(file) if all(row["subject"] in row[name] for name in ASKED)]
        random.Random(seed).shuffle(rows)
        drawn.append(list({row["subject"]: row for row in rows}.values()))
    facts = [rows[i] for i in range(max(map(len, drawn))) for rows in drawn if i < len(rows)][:count]
    return [{**fact, "another": facts[i - 1]["question"]} for i, fact in enumerate(facts)]


def request_of(fact: Mapping[str, str], form: str) -> EditRequest:
    subject, target = fact["subject"], fact["object"]
    if form == "statement":
        return EditRequest(statement(fact), target, subject=subject)
    request = EditRequest(fact["question"], target, subject=subject)
    return request.as_chat() if form == "chat" else request


def statement(fact: Mapping[str, str]) -> str:
    return f"The {fact['relation']} of {fact['subject']} is"


def probes_of(tokenizer: Any, fact: Mapping[str, str], form: str) -> dict[str, str]:
    """What the edited model is asked: name -> prompt."""

    def chat(text: str) -> str:
        return render_chat(tokenizer, [Message("user", text)])

    question, subject = fact["question"], fact["subject"]
    own = {"question": question, "statement": statement(fact), "chat": chat(question)}[form]
    return {
        "own form": own,
        "other form": question if form == "statement" else statement(fact),
        "paraphrase": fact["paraphrased_question"],
        "chat question": chat(question),
        "chat paraphrase": chat(fact["paraphrased_question"]),
        "same subject": fact["locality_question"],
        "same subject, chat": chat(fact["locality_question"]),
        "What is S known for?": f"What is {subject} known for?",
        "When did S begin?": f"When did {subject} begin?",
        "S is famous for its": f"{subject} is famous for its",
        "reversed": fact["reversed_relation_question"],
        "another subject": fact["another"],
    }


@torch.no_grad()
def next_logits(edited: EditedModel, prompts: Sequence[str]) -> torch.Tensor:
    """``(N, V)`` next-token logits, each prompt as a call of its own, so that equal means bit-equal."""
    found = []
    for prompt in prompts:
        ids, mask = pad_rows([encode_prompt(edited.tokenizer, edited.rewrite(prompt))], pad_token_id(edited.tokenizer))
        with edited.prompts([ids.shape[1]]):
            found.append(edited.model(input_ids=ids, attention_mask=mask).logits[0, -1].float())
    return torch.stack(found)


def begins(tokenizer: Any, prompt: str, target: str) -> set[int]:
    """First tokens of the answer, with and without its leading space."""
    bare = tokenizer(target, add_special_tokens=False)["input_ids"]
    return {encode_pair(tokenizer, prompt, target)[1][0], *bare[:1]}


def names(text: str, target: str) -> bool:
    """Whether the first sentence names the target."""
    sentence = re.split(r"(?<=[.!?])\s|\n", text.strip(), maxsplit=1)[0]
    return target.casefold() in sentence.casefold()


def ask(
    edited: EditedModel, fact: Mapping[str, str], form: str, unedited: Mapping[str, torch.Tensor], text: bool
) -> dict[str, Any]:
    """One edit's answers: ``follow``, ``text`` and ``stay``, each a mapping from the probe's name to a truth value."""
    probes = probes_of(edited.tokenizer, fact, form)
    after = dict(zip(probes, next_logits(edited, list(probes.values())), strict=True))
    result: dict[str, Any] = {"follow": {}, "stay": {}, "bits": {}, "text": {}}
    for name in FOLLOW:
        result["follow"][name] = int(after[name].argmax()) in begins(edited.tokenizer, probes[name], fact["object"])
    for name in STAY:
        result["stay"][name] = int(after[name].argmax()) == int(unedited[name].argmax())
        result["bits"][name] = torch.equal(after[name], unedited[name])
    if text:
        for name, answer in zip(FOLLOW, edited.generate([probes[n] for n in FOLLOW], 24), strict=True):
            result["text"][name] = names(answer, fact["object"])
    return result


def run(method: str, facts: Sequence[Mapping[str, str]], args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Results of one method, kept ones first."""

    def measure(edited: EditedModel, fact: Mapping[str, str]) -> dict[str, Any]:
        probes = probes_of(edited.tokenizer, fact, fact["form"])
        unedited = dict(zip(probes, next_logits(edited, list(probes.values())), strict=True))
        edited.apply([request_of(fact, fact["form"])])
        return ask(edited, fact, fact["form"], unedited, args.text)

    edits = [{**fact, "form": form} for fact in facts for form in FORMS]
    return measured(method, edits, ("question", "form"), measure, args)


def table(results: Mapping[str, Sequence[Mapping[str, Any]]], text: bool) -> list[str]:
    """The table in Markdown: a row a probe, a column a method and form."""
    columns = [(method, form) for method in results for form in FORMS]
    lines = ["| probe | " + " | ".join(f"{m}, {f}" for m, f in columns) + " |", "|---|" + "---:|" * len(columns)]
    cells: dict[tuple[str, str], list[Mapping[str, Any]]] = defaultdict(list)
    for method, found in results.items():
        for result in found:
            cells[method, result["form"]].append(result)

    def share(cell: Sequence[Mapping[str, Any]], kind: str, name: str) -> str:
        values = [result[kind][name] for result in cell if name in result[kind]]
        return f"{100 * sum(values) / len(values):.0f}" if values else "–"

    for name in FOLLOW:
        shown = [
            share(cells[c], "follow", name) + (f" / {share(cells[c], 'text', name)}" if text else "") for c in columns
        ]
        lines.append(f"| follows: {name} | " + " | ".join(shown) + " |")
    for name in STAY:
        shown = [f"{share(cells[c], 'stay', name)} ({share(cells[c], 'bits', name)})" for c in columns]
        lines.append(f"| stays: {name} | " + " | ".join(shown) + " |")
    return lines


def main() -> int:
    parser = make_parser(__doc__, "hallueditbench")
    parser.add_argument("--text", action="store_true", help="also let the model write 24 tokens after each probe")
    args = read_options(parser)
    facts = read_facts(args.data_dir / "hallueditbench", args.part, args.n, args.seed)
    results = {method: list(run(method, facts, args)) for method in args.methods.split(",")}
    heading = f"{args.model}, {len(facts)} facts of the {args.part} part, percent; stays: argmax (bit-equal)"
    report([heading, "", *table(results, args.text)], args.out / "table.md")
    return 0


if __name__ == "__main__":
    sys.exit(main())
