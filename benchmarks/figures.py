"""The paper's figures and the linear trade-off, measured on a real model and drawn: docs/figures/*.png and *.json.

    python benchmarks/figures.py [--only NAME …] [--out docs/figures]
    BAFT_DATA=../shared/data python benchmarks/figures.py --only batched_editing

Figures: redundant_dimensions (the paper's Figure 1), weights_by_position (Figure 2), batched_editing (Figure 3), tension.
All but the third use the facts that come with the library. The third takes 50 ZsRE records of MEND's validation part from the
data folder; without one, the library's facts, 10 at a time. LoReFT is this library's own with ``weighting="constant"``: the
same engine, layer, rank and learning rate as BaFT.
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from baft_intervention import BaftConfig, BaftEditor, EditRequest, load_facts, load_model, load_requests
from baft_intervention.analysis.figures import (
    batched_editing,
    read_texts,
    redundant_dimensions,
    tension,
    weights_by_position,
    write_json,
)
from baft_intervention.analysis.plots import (
    draw_batched_editing,
    draw_redundant_dimensions,
    draw_tension,
    draw_weights_by_position,
    save,
)
from baft_intervention.training.bank import shipped_texts

ROOT = Path(__file__).resolve().parent.parent
LOREFT = BaftConfig(weighting="constant", ending="")
BAFT = BaftConfig()
LINEAR = BaftConfig(weighting="linear", locality_coefficient=1.0, ending="")
OPENINGS = (
    "",
    "Here is a fact.",
    "We learnt it at school.",
    "Please finish the sentence.",
    "It was late in the evening.",
)
TEXTS = shipped_texts()[::3]  # unrelated texts that are read
BANK = tuple(text for i, text in enumerate(shipped_texts()) if i % 3)  # the others are the gates' bank
ZSRE = Path("zsre", "zsre_mend_eval.json")


class Run:
    """The model, and what several figures need of it."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.model, self.tokenizer = load_model(args.model)
        self.facts = list(load_facts())

    def editor(self, config: BaftConfig) -> BaftEditor:
        return BaftEditor(self.model, self.tokenizer, config, model_name=self.args.model, bank_texts=BANK)

    def edited(self, config: BaftConfig, facts: Sequence[EditRequest]) -> BaftEditor:
        """An editor that holds each fact's edit as if trained alone; its hooks are off the model."""
        editor, edits = self.editor(config), []
        for fact in facts:
            editor.edit(fact)
            edits += editor.edits
            editor.undo(fact.id)
        editor.adapter.set_edits(edits)
        editor.detach()
        return editor


def paraphrases(fact: EditRequest) -> list[str]:
    """Its rewordings, and all wordings behind a few sentences that have nothing to do with it."""
    wordings = [fact.prompt, *(probe.prompt for probe in fact.probes_of("rephrase"))]
    return [f"{opening} {wording}".strip() for opening, wording in itertools.product(OPENINGS, wordings)][1:]


def figure_redundant_dimensions(run: Run) -> tuple[Any, Any]:
    # the default gate is wide open at an edit's own prompt: its update there is LoReFT's
    methods = {"LoReFT": LOREFT, "BaFT, linear gate": LINEAR}
    found = {name: redundant_dimensions(run.edited(config, run.facts)) for name, config in methods.items()}
    return found, draw_redundant_dimensions(found)


def figure_weights_by_position(run: Run) -> tuple[Any, Any]:
    def probes(group: str) -> list[tuple[str, str]]:
        return [(fact.id, p.prompt) for fact in run.facts for p in fact.probes if p.group == group]

    groups = {
        "edited prompt": [(fact.id, fact.prompt) for fact in run.facts],
        "paraphrase": probes("rephrase"),
        "other subject": probes("neighborhood"),
        "same subject, other relation": probes("same_subject"),
        "unrelated text": [(fact.id, text) for fact in run.facts for text in TEXTS[:16]],
    }
    found = {}
    for name, config in (("linear gate", LINEAR), ("default gate", BAFT)):
        found[name] = weights_by_position(run.edited(config, run.facts), groups)
    return found, draw_weights_by_position(found, "edited prompt", "unrelated text")


def figure_batched_editing(run: Run) -> tuple[Any, Any]:
    path = run.args.data_dir / ZSRE
    if path.is_file():
        facts, sizes = list(load_requests(path, limit=50, seed=0).requests), (10, 50)
    else:
        print(f"no {path}: the library's own facts, 10 at a time", file=sys.stderr)
        facts, sizes = run.facts[:10], (10,)
    joint = BaftConfig(weighting="constant", ending="", allocation="joint", steps=run.args.joint_steps)
    found = {}
    for name, config in (("LoReFT, joint", joint), ("BaFT", BAFT)):
        editor = run.editor(config)
        found[name] = [batched_editing(editor, facts, size) for size in sizes]
        editor.detach()
    return found, draw_batched_editing(found)


def figure_tension(run: Run) -> tuple[Any, Any]:
    found = {}
    for name, config in (("LoReFT", LOREFT), ("BaFT", BAFT)):
        editor = run.edited(config, run.facts)
        unrelated = read_texts(editor, TEXTS, prefixes=True)
        found[name] = [tension(editor, fact.id, paraphrases(fact), unrelated) for fact in run.facts]
    return found, draw_tension(found, {fact.id: f"{fact.prompt} …" for fact in run.facts})


FIGURES: dict[str, Callable[[Run], tuple[Any, Any]]] = {
    "redundant_dimensions": figure_redundant_dimensions,
    "weights_by_position": figure_weights_by_position,
    "batched_editing": figure_batched_editing,
    "tension": figure_tension,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=FIGURES, default=list(FIGURES), metavar="NAME")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "figures")
    parser.add_argument("--model", default="smollm2-135m")
    default = Path(os.environ.get("BAFT_DATA") or ROOT.parent / "shared" / "data")
    parser.add_argument("--data-dir", type=Path, default=default, help="benchmark files; default: $BAFT_DATA")
    parser.add_argument(
        "--joint-steps", type=int, default=100, metavar="N", help="most steps of LoReFT's joint map; default: 100"
    )
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    run = Run(args)
    for name in args.only:
        begin = time.perf_counter()
        found, figure = FIGURES[name](run)
        seconds = time.perf_counter() - begin
        settings = {
            "model": args.model,
            "baft": BAFT.to_dict(),
            "joint_steps": args.joint_steps,
            "seconds": round(seconds, 1),
        }
        write_json({"figure": name, "settings": settings, "found": found}, args.out / f"{name}.json")
        save(figure, args.out / f"{name}.png")
        print(f"{name}: {seconds:.0f} s")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
