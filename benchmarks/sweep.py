"""Choose a method's settings on training and validation records, never on test records.

    python benchmarks/sweep.py --method ft-m --grid layer=0.5,0.7 --grid learning_rate=2e-4,5e-4 --n 10

Every combination edits the same n records of each part below, one at a time. A part that is test data is an error, and every
record that shares a prompt or a subject with a test file of the same benchmark is left out. The table shows the means of
reliability, generality, locality and unrelated locality over the parts that have them, and their plain mean. The settings in
benchmarks/methods have the highest mean of those that reach 98 % reliability; on a tie, the fewest steps.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from baft_intervention.data import load_requests, refuse_test_files
from baft_intervention.errors import BaftError
from baft_intervention.evaluation.baseline_outputs import BaselineCache, default_cache_folder
from baft_intervention.evaluation.methods import make_method
from baft_intervention.evaluation.metrics import mean
from baft_intervention.evaluation.record_metrics import record_metrics
from baft_intervention.evaluation.scoring import Scorer
from baft_intervention.models.loading import load_model
from baft_intervention.requests import EditRequest

PARTS = {
    "zsre": ("zsre/zsre_mend_eval.json", "zsre_mend"),
    "counterfact": ("counterfact/counterfact-val.json", "counterfact_flat"),
    "wiki_counterfact": ("knowedit/wiki_counterfact/train_cf.json", "wikidata_counterfact"),
    "wiki_recent": ("knowedit/wiki_recent/recent_train.json", "wikidata_recent"),
    "wikibio": ("knowedit/WikiBio/wikibio-train-all.json", "wikibio"),
}
# the test files whose prompts and subjects no part may share; one that is not there is passed over
TESTS = {
    "zsre": ("zsre/zsre_mend_edit.json", "knowedit/ZsRE/ZsRE-test-all.json"),
    "counterfact": ("counterfact/counterfact.json", "counterfact/counterfact-edit.json"),
    "wiki_counterfact": ("knowedit/wiki_counterfact/test_cf.json",),
    "wiki_recent": ("knowedit/wiki_recent/recent_test.json",),
    "wikibio": ("knowedit/WikiBio/wikibio-test-all.json",),
}
UNRELATED = "zsre/zsre_mend_eval.json"
SHOWN = ("reliability", "generality", "locality", "unrelated")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", required=True)
    parser.add_argument("--grid", action="append", default=[], metavar="NAME=V,V")
    parser.add_argument(
        "--parts", default="zsre,counterfact,wiki_counterfact,wiki_recent", help=f"of {', '.join(PARTS)}"
    )
    parser.add_argument("--n", type=int, default=10, help="records a part; default: 10")
    parser.add_argument("--seed", type=int, default=1, help="of the draw of records")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--data-dir", type=Path, default=Path(__file__).resolve().parents[2] / "shared" / "data")
    parser.add_argument("--threads", type=int)
    args = parser.parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    try:
        grid = [(name, [number(v) for v in values.split(",")]) for name, values in (g.split("=", 1) for g in args.grid)]
        parts = {name: load_part(args, name) for name in args.parts.split(",")}
        model, tokenizer = load_model(args.model)
        scorer = Scorer(model, tokenizer, cache=BaselineCache(default_cache_folder()))
        scorer.prepare(tqdm([r for part in parts.values() for r in part], desc="unedited model"))
        print("| settings | " + " | ".join(SHOWN) + " | mean | steps | s an edit |\n|---|" + "---:|" * (len(SHOWN) + 3))
        for values in itertools.product(*(v for _, v in grid)):
            settings = dict(zip((name for name, _ in grid), values, strict=True))
            print(row(settings, try_settings(args.method, settings, scorer, parts)), flush=True)
    except (BaftError, OSError, ValueError, KeyError) as error:
        print(f"sweep.py: error: {error}", file=sys.stderr)
        return 2
    return 0


def number(text: str) -> Any:
    """A value as YAML reads it; YAML takes 5e-4 for a text."""
    try:
        return float(text) if "e" in text.lower() else yaml.safe_load(text)
    except ValueError:
        return text


def load_part(args: argparse.Namespace, name: str) -> tuple[EditRequest, ...]:
    """``args.n`` records of a part, none of which shares a prompt or a subject with the benchmark's test files.

    Raises:
        DataError: the part is a test file, or holds too few records.
    """
    path, task = PARTS[name]
    unrelated = None if name == "zsre" else args.data_dir / UNRELATED
    refuse_test_files(path, UNRELATED, purpose="choosing settings")
    data = load_requests(args.data_dir / path, task, seed=args.seed)
    for test in TESTS[name]:
        if (args.data_dir / test).is_file():
            data = data.without(load_requests(args.data_dir / test))
    return load_requests(
        data.requests, limit=args.n, seed=args.seed, unrelated=unrelated, unrelated_per_record=2
    ).requests


def try_settings(
    method: str, settings: dict[str, Any], scorer: Scorer, parts: dict[str, Any]
) -> dict[str, float | None]:
    """Means over parts of the means over records, steps and seconds an edit."""
    edited = make_method(method, settings).attach(scorer.model, scorer.tokenizer)
    found: dict[str, list[float | None]] = {name: [] for name in (*SHOWN, "steps", "seconds")}
    try:
        for part in parts.values():
            own: dict[str, list[float | None]] = {name: [] for name in found}
            for request in part:
                edited.reset()
                begin = time.perf_counter()
                try:
                    own["steps"].append(edited.apply([request]).steps)
                except BaftError as error:
                    print(f"failed: {error}", file=sys.stderr)
                own["seconds"].append(time.perf_counter() - begin)
                metrics, _ = record_metrics(scorer.queries(request), scorer.score(edited, [request])[0])
                for name in SHOWN:
                    own[name].append(metrics.get(name))
            for name, values in own.items():
                found[name].append(mean(values))
    finally:
        edited.restore()
    return {name: mean(values) for name, values in found.items()}


def row(settings: dict[str, Any], found: dict[str, float | None]) -> str:
    scores = [found[name] for name in SHOWN]
    cells = ["–" if s is None else f"{100 * s:.1f}" for s in [*scores, mean(scores)]]
    text = ", ".join(f"{k} {v}" for k, v in settings.items()) or "defaults"
    return f"| {text} | " + " | ".join(cells) + f" | {found['steps'] or 0:.1f} | {found['seconds'] or 0:.2f} |"


if __name__ == "__main__":
    sys.exit(main())
