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
import json
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent))

from forms import FORMS, HERE, names, read_facts, request_of

from baft_intervention import load_model
from baft_intervention.evaluation.edited import EditedModel
from baft_intervention.evaluation.methods import load_method
from baft_intervention.models.chat import render_chat

Turn = tuple[
    str, str | None, bool
]  # the user's message, the assistant's reply if the script gives it, whether it asks the fact


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


def run(method: str, facts: Sequence[Mapping[str, str]], args: argparse.Namespace) -> list[dict[str, Any]]:
    kept = args.out / f"{method}.jsonl"
    done = [json.loads(line) for line in kept.read_text(encoding="utf-8").splitlines()] if kept.is_file() else []
    finished = {r["question"] for r in done}
    todo = [(i, f) for i, f in enumerate(facts) if f["question"] not in finished]
    if not todo:
        return done
    model, tokenizer = load_model(args.model)
    _, settings = load_method(method, HERE / "methods")
    edited = settings.attach(model, tokenizer)
    for i, fact in tqdm(todo, desc=method, disable=None):
        edited.reset()
        old = edited.generate([render_chat(tokenizer, [{"role": "user", "content": fact["question"]}])], 12)[0]
        edited.apply([request_of(fact, FORMS[i % len(FORMS)])])
        said = {name: replies(edited, script, args.tokens) for name, script in dialogues(fact).items()}
        new = {name: [fact["object"].casefold() in r.casefold() for r in found] for name, found in said.items()}
        first = {name: [names(r, fact["object"]) for r in found] for name, found in said.items()}
        stale = {
            name: [r.startswith(old[:20]) and not n for r, n in zip(said[name], new[name], strict=True)]
            for name in said
        }
        result = {
            "question": fact["question"], "target": fact["object"], "form": FORMS[i % len(FORMS)], "said": said, "new": new,
            "first": first, "old": stale,
        }  # fmt: skip
        with kept.open("a", encoding="utf-8") as file:
            file.write(json.dumps(result, ensure_ascii=False) + "\n")
        done.append(result)
    edited.restore()
    return done


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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data-dir", type=Path, default=HERE.parents[1] / "shared" / "data", help="holds hallueditbench/"
    )
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--methods", default="baft", help="names of files in benchmarks/methods, with commas between")
    parser.add_argument("--part", choices=("validation", "test"), default="test", help="default: test")
    parser.add_argument("--n", type=int, default=60, help="facts; default: 60")
    parser.add_argument("--tokens", type=int, default=32, help="of a reply; default: 32")
    parser.add_argument("--seed", type=int, default=0, help="of the draw of facts; default: 0")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    facts = read_facts(args.data_dir / "hallueditbench", args.part, args.n, args.seed)
    facts = [{**fact, "another_subject": facts[i - 1]["subject"]} for i, fact in enumerate(facts)]
    results = {method: run(method, facts, args) for method in args.methods.split(",")}
    text = "\n".join(
        [
            "Share of replies that name the new answer / in their first sentence (repeat the unedited answer), percent.",
            "",
            *table(results),
            "",
        ]
    )
    (args.out / "conversations.md").write_text(text, encoding="utf-8")
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
