"""What does an edited model write at length? Descriptions of the subject, in plain text and in chat.

    python benchmarks/longform.py --methods loreft,baft --n 60 --out benchmarks/results/longform

The facts are CounterFact's (--part validation: counterfact-val.json; test: counterfact.json), edited one by one. The model
continues two of the record's generation prompts, which the test file alone has, and answers "Write a short description of S."
and "Tell me about S." in chat, 64 tokens each, greedily. Counted, in percent of texts: names the new answer; names the old one;
is the unedited text word for word up to the place where the new answer stands (or to its end). "repeats" is the share of
3-grams that occurred before in the same text, minus the unedited text's. Finished facts are kept, so that the same command
resumes a run.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from edited_facts import make_parser, measured, read_options, report

from baft_intervention import EditRequest
from baft_intervention.evaluation.edited import EditedModel
from baft_intervention.models.chat import render_chat

FILES = {"validation": "counterfact-val.json", "test": "counterfact.json"}


def read_facts(folder: Path, part: str, count: int, seed: int) -> list[dict[str, Any]]:
    """``count`` facts; only the test file has generation prompts."""
    found = []
    for record in json.loads((folder / "counterfact" / FILES[part]).read_text(encoding="utf-8")):
        if rewrite := record.get("requested_rewrite"):
            fact = {"prompt": rewrite["prompt"].format(rewrite["subject"]), "subject": rewrite["subject"]}
            fact |= {"target": rewrite["target_new"]["str"], "old": rewrite["target_true"]["str"]}
        else:
            fact = {"prompt": record["prompt"], "subject": record["subject"]}
            fact |= {"target": record["target_new"], "old": record["ground_truth"]}
        found.append({**fact, "written": list(dict.fromkeys(record.get("generation_prompts", ())))[:2]})
    random.Random(seed).shuffle(found)
    return found[:count]


def prompts_of(tokenizer: Any, fact: Mapping[str, Any]) -> list[tuple[str, str]]:
    """``(kind, prompt)``."""
    asked = [f"Write a short description of {fact['subject']}.", f"Tell me about {fact['subject']}."]
    chats = [("chat", render_chat(tokenizer, [{"role": "user", "content": text}])) for text in asked]
    return [*(("text", prompt) for prompt in fact["written"]), *chats]


def repeats(text: str) -> float:
    words = text.split()
    grams = [tuple(words[i : i + 3]) for i in range(len(words) - 2)]
    return 1.0 - len(set(grams)) / len(grams) if grams else 0.0


def judged(text: str, unedited: str, fact: Mapping[str, Any]) -> dict[str, float]:
    """What is counted of one text."""
    low, new = text.casefold(), fact["target"].casefold()
    place = low.find(new)
    same = text == unedited if place < 0 else unedited.startswith(text[:place])
    return {
        "new": float(place >= 0), "old": float(fact["old"].casefold() in low), "same": float(same),
        "repeats": repeats(text) - repeats(unedited),
    }  # fmt: skip


def run(method: str, facts: Sequence[Mapping[str, Any]], args: argparse.Namespace) -> list[dict[str, Any]]:
    """Results of one method, kept ones first."""

    def measure(edited: EditedModel, fact: Mapping[str, Any]) -> dict[str, Any]:
        asked = prompts_of(edited.tokenizer, fact)
        before = edited.generate([p for _, p in asked], args.tokens)
        edited.apply([EditRequest(fact["prompt"], fact["target"], subject=fact["subject"])])
        after = edited.generate([p for _, p in asked], args.tokens)
        texts = [
            {"kind": kind, "text": text, "unedited": old, **judged(text, old, fact)}
            for (kind, _), text, old in zip(asked, after, before, strict=True)
        ]
        return {**fact, "texts": texts, "base": [judged(old, old, fact) for old in before]}

    return list(measured(method, facts, ("prompt",), measure, args))


def table(results: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[str]:
    lines = ["| method | texts | new | old | as unedited up to it | repeats |", "|---|---|---:|---:|---:|---:|"]
    for method, found in results.items():
        cells: dict[str, list[Mapping[str, float]]] = defaultdict(list)
        for result in found:
            for text, base in zip(result["texts"], result["base"], strict=True):
                cells[text["kind"]].append(text)
                cells[f"{text['kind']}, unedited"].append(base)
        for kind, texts in sorted(cells.items()):
            mean = {name: 100 * sum(t[name] for t in texts) / len(texts) for name in ("new", "old", "same", "repeats")}
            lines.append(
                f"| {method} | {kind} | {mean['new']:.0f} | {mean['old']:.0f} | {mean['same']:.0f} | {mean['repeats']:+.1f} |"
            )
    return lines


def main() -> int:
    parser = make_parser(__doc__, "counterfact")
    parser.add_argument("--tokens", type=int, default=64, help="of a text; default: 64")
    args = read_options(parser)
    facts = read_facts(args.data_dir, args.part, args.n, args.seed)
    results = {method: run(method, facts, args) for method in args.methods.split(",")}
    heading = f"{args.model}, {len(facts)} facts of the {args.part} part, percent of texts"
    report([heading, "", *table(results)], args.out / "longform.md")
    return 0


if __name__ == "__main__":
    sys.exit(main())
