"""How often the default gate opens, without training anything: on paraphrases, neighbours, other relations, unrelated text.

    python benchmarks/gates.py --data-dir PATH --n 50 [--layer 27] [--json FILE]

Reads the training and validation records of benchmarks/sweep.py. For each record the gate starts from the request, as before an
edit, and answers the record's probes. The table shows the share that passes the subject question, and the share that passes both
questions (with the gate's own margin, and with other margins).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import sweep
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from baft_intervention import BaftConfig, BaftEditor, EditRequest
from baft_intervention.gates import SubjectRelationWeighting
from baft_intervention.runtime.representations import read_blocks
from baft_intervention.training.encoding import encode_requests
from baft_intervention.training.gate_initialisation import make_jobs

PARTS = ("zsre", "counterfact", "wiki_counterfact", "wiki_recent")  # of benchmarks/sweep.py
MARGINS = (-0.45, -0.34, -0.28, -0.2, -0.1, 0.0)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, default=Path(__file__).resolve().parents[2] / "shared" / "data")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--n", type=int, default=50, help="records a part; default: 50")
    parser.add_argument("--layer", type=int, help="edited block; default: the library's")
    parser.add_argument("--seed", type=int, default=3, help="of the draw of records; default: 3")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    config = BaftConfig(weighting="subject_relation", layers=None if args.layer is None else (args.layer,))
    editor = BaftEditor.from_pretrained(args.model, config)
    asked: dict[str, list[dict[str, float]]] = defaultdict(list)
    for part in PARTS:
        for name, answers in probe_part(editor, sweep.load_part(args, part)).items():
            asked[f"{part} {name}"] += answers
    rows = {name: shares(answers) for name, answers in sorted(asked.items())}
    columns = list(next(iter(rows.values())))
    print(f"block {editor.adapter.layers[0]}, subject read at block {editor.adapter.read_layer}; share open, %\n")
    print("| probes | " + " | ".join(columns) + " |\n|---|" + "---:|" * len(columns))
    for name, row in rows.items():
        print(f"| {name} | " + " | ".join(f"{row[c]:g}" for c in columns) + " |")
    if args.json:
        args.json.write_text(json.dumps({"command": sys.argv, "rows": rows}, indent=1) + "\n", encoding="utf-8")
    return 0


@torch.no_grad()
def probe_part(editor: BaftEditor, requests: Sequence[EditRequest]) -> dict[str, list[dict[str, float]]]:
    """``probe group -> [{subject, relation, nearest}]``: the gate's three numbers for every probe of the records."""
    adapter, layer = editor.adapter, editor.adapter.layers[0]
    read_layer = adapter.read_layer or 0
    editor.prepare()
    jobs = make_jobs(
        editor.model,
        editor.tokenizer,
        editor.config,
        adapter.layers,
        [[each] for each in encode_requests(editor.tokenizer, requests, editor.config)],
        shared=adapter.shared,
        bank=editor._bank(),
    )
    found: dict[str, list[dict[str, float]]] = defaultdict(list)
    for job in jobs:
        network: Any = job.maps[layer].weighting
        assert isinstance(network, SubjectRelationWeighting)
        probes = job.requests[0].probes
        if not probes:
            continue
        rows = [list(editor.tokenizer(probe.prompt)["input_ids"]) for probe in probes]
        early = read_blocks(editor.model, editor.tokenizer, rows, [range(len(row)) for row in rows], [read_layer])[
            read_layer
        ]
        late = read_blocks(editor.model, editor.tokenizer, rows, [[len(row) - 1] for row in rows], [layer])[layer]
        for probe, tokens, last in zip(probes, early, late, strict=True):
            own, nearest, template = network.similarities(last)
            answer = {
                "subject": float(network.of_prompt(tokens)),
                "relation": float(own),
                "nearest": float(nearest),
                "margin": float(network.margin),
                "in template": float(template > max(network.same_sentence, own)),
            }
            found[f"{probe.kind} {probe.group}".strip()].append(answer)
    return found


def shares(answers: list[dict[str, float]]) -> dict[str, float]:
    def share(condition: Any) -> float:
        return round(100.0 * sum(condition(a) for a in answers) / len(answers), 1)

    def both(a: dict[str, float], margin: float) -> bool:
        return a["subject"] > 0 and a["relation"] > a["nearest"] + margin and not a["in template"]

    row = {"n": float(len(answers)), "subject": share(lambda a: a["subject"] > 0)}
    row["both"] = share(lambda a: both(a, a["margin"]))
    for margin in MARGINS:
        row[f"margin {margin:g}"] = share(lambda a, margin=margin: both(a, margin))
    return row


if __name__ == "__main__":
    raise SystemExit(main())
