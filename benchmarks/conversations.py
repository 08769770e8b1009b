"""Does an edit hold in conversation? Six scripted dialogues about each fact, in the model's own chat template.

    python benchmarks/conversations.py --methods baft,loreft --n 60 --out benchmarks/results/conversations

The facts are HalluEditBench's (--part validation: the topics on which settings may be chosen; test: the others), edited one by
one, in turn as a question, a statement and in chat. A dialogue is a list of the user's messages; the assistant's are the edited
model's own, but where the script gives them. A turn that asks for the fact counts where the reply names the new answer. "old"
is the share of these replies that name the unedited model's answer instead. Finished facts are kept, so that the same command
resumes a run.
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from edited_facts import make_parser, measured, read_options, report
from forms import FORMS, names, read_facts, request_of

from baft_intervention.evaluation.edited import EditedModel
from baft_intervention.models.chat import render_chat

# the user's message, the assistant's reply if the script gives it, whether it asks for the fact
Turn = tuple[str, str | None, bool]


def dialogues(fact: Mapping[str, str]) -> dict[str, list[Turn]]:
    """The scripts about a fact; what the model is told about others is never the new answer."""
    question, subject, relation = fact["question"], fact["subject"], fact["relation"]
    return {
        "asked twice": [(question, None, True), ("And once more: " + question, None, True)],
        "after small talk": [
            ("Hello! How are you today?", "I am fine, thank you. How can I help you?", False),
            (question, None, True),
        ],
        "after another fact": [(fact["another"], None, False), (question, None, True)],
        "the user has named the answer": [
            (f"Yesterday a friend told me about {fact['object']}.", "That sounds interesting.", False),
            (question, None, True),
        ],
        "are you sure?": [(question, None, True), (f"Are you sure? {question}", None, True)],
        "a list of subjects": [
            (
                f"I am making a list of the {relation} of several things. The first one is {fact['another_subject']}, "
                f"the second one is {subject}. So, for the second one: {question}",
                None,
                True,
            )
        ],
    }


def replies(edited: EditedModel, script: Sequence[Turn], tokens: int) -> list[str]:
    """What the model says wherever the script asks for the fact."""
    turns: list[dict[str, str]] = []
    found = []
    for message, reply, asks in script:
        turns.append({"role": "user", "content": message})
        if reply is None:
            reply = edited.generate([render_chat(edited.tokenizer, turns)], tokens)[0].strip()
        if asks:
            found.append(reply)
        turns.append({"role": "assistant", "content": reply or "."})
    return found


def run(method: str, facts: Sequence[Mapping[str, Any]], args: argparse.Namespace) -> list[dict[str, Any]]:
    """Results of one method, kept ones first."""

    def measure(edited: EditedModel, fact: Mapping[str, Any]) -> dict[str, Any]:
        asked = render_chat(edited.tokenizer, [{"role": "user", "content": fact["question"]}])
        old = edited.generate([asked], 12)[0]
        edited.apply([request_of(fact, fact["form"])])
        said = {name: replies(edited, script, args.tokens) for name, script in dialogues(fact).items()}
        new = {name: [fact["object"].casefold() in r.casefold() for r in found] for name, found in said.items()}
        first = {name: [names(r, fact["object"]) for r in found] for name, found in said.items()}
        stale = {
            name: [r.startswith(old[:20]) and not n for r, n in zip(said[name], new[name], strict=True)]
            for name in said
        }
        return {"target": fact["object"], "form": fact["form"], "said": said, "new": new, "first": first, "old": stale}

    return list(measured(method, facts, ("question",), measure, args))


def table(results: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[str]:
    """A row a dialogue, a column a method: the share of replies that name the new answer / in the first sentence / (old)."""
    lines = ["| dialogue | " + " | ".join(results) + " |", "|---|" + "---:|" * len(results)]
    cells: dict[tuple[str, str], dict[str, list[bool]]] = defaultdict(lambda: defaultdict(list))
    for method, found in results.items():
        for result in found:
            for kind in ("new", "first", "old"):
                for name, values in result[kind].items():
                    cells[method, name][kind] += values
                    cells[method, "all"][kind] += values

    def share(values: Sequence[bool]) -> str:
        return f"{100 * sum(values) / len(values):.0f}" if values else "–"

    names_ = list(next(iter(results.values()))[0]["new"]) if any(results.values()) else []
    for name in [*names_, "all"]:
        cell = (cells[method, name] for method in results)
        lines.append(
            f"| {name} | "
            + " | ".join(f"{share(c['new'])} / {share(c['first'])} ({share(c['old'])})" for c in cell)
            + " |"
        )
    return lines


def main() -> int:
    parser = make_parser(__doc__, "hallueditbench")
    parser.add_argument("--tokens", type=int, default=32, help="of a reply; default: 32")
    args = read_options(parser)
    facts = read_facts(args.data_dir / "hallueditbench", args.part, args.n, args.seed)
    facts = [
        {**fact, "another_subject": facts[i - 1]["subject"], "form": FORMS[i % len(FORMS)]}
        for i, fact in enumerate(facts)
    ]
    results = {method: run(method, facts, args) for method in args.methods.split(",")}
    heading = f"{args.model}, {len(facts)} facts of the {args.part} part, percent of replies that name the new answer"
    report(
        [f"{heading} / in their first sentence (that repeat the unedited answer)", "", *table(results)],
        args.out / "conversations.md",
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
