"""What the benchmarks of edited facts have in common: options, and results that an interrupted run resumes from."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from baft_intervention import load_model
from baft_intervention.evaluation.edited import EditedModel
from baft_intervention.evaluation.methods import load_method

HERE = Path(__file__).resolve().parent


def make_parser(description: str | None, data: str) -> argparse.ArgumentParser:
    """The options of all of them; ``data`` is the folder that is read in ``--data-dir``."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, default=HERE.parents[1] / "shared" / "data", help=f"holds {data}/")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--methods", default="baft", help="names of files in benchmarks/methods, with commas between")
    parser.add_argument("--part", choices=("validation", "test"), default="test", help="default: test")
    parser.add_argument("--n", type=int, default=60, help="facts; default: 60")
    parser.add_argument("--seed", type=int, default=0, help="of the draw of facts; default: 0")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, required=True)
    return parser


def read_options(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The parsed options, with ``out`` a folder of its own for each part, number of facts and seed."""
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.out = args.out / f"{args.part}-{args.n}-{args.seed}"
    args.out.mkdir(parents=True, exist_ok=True)
    return args


def measured(
    method: str,
    facts: Sequence[Mapping[str, Any]],
    key: Sequence[str],
    measure: Callable[[EditedModel, Mapping[str, Any]], Mapping[str, Any]],
    args: argparse.Namespace,
) -> Iterator[dict[str, Any]]:
    """Results of one method, kept ones first.

    Args:
        method: name of a file in ``benchmarks/methods``.
        facts: what to measure.
        key: the fields that identify a fact; they stand in its result too.
        measure: makes the edit on the unedited model and measures it.
        args: of :func:`read_options`.
    """
    kept = args.out / f"{method}.jsonl"
    done = [json.loads(line) for line in kept.read_text(encoding="utf-8").splitlines()] if kept.is_file() else []
    yield from done
    finished = {tuple(result[name] for name in key) for result in done}
    todo = [fact for fact in facts if tuple(fact[name] for name in key) not in finished]
    if not todo:
        return
    model, tokenizer = load_model(args.model)
    _, settings = load_method(method, HERE / "methods")
    edited = settings.attach(model, tokenizer)
    for fact in tqdm(todo, desc=method, disable=None):
        edited.reset()
        result = {name: fact[name] for name in key} | dict(measure(edited, fact))
        with kept.open("a", encoding="utf-8") as file:
            file.write(json.dumps(result, ensure_ascii=False) + "\n")
        yield result
    edited.restore()


def report(text: Sequence[str], path: Path) -> None:
    """Write and print a table."""
    path.write_text("\n".join([*text, ""]), encoding="utf-8")
    print("\n".join(text))
