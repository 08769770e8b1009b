"""How much faster the scorer is than one forward pass a probe, with the same values: the ratio, measured in one process.

    python benchmarks/speed_evaluation.py --limit 100

The slow way is what editing benchmarks usually do: every probe and every answer of it is one unpadded sequence, and the whole
model runs over it, all logits included. Both ways evaluate the same edited model (one LoReFT edit, kept on throughout) on
the probes of N records; the unedited model's answers, which both need for locality, are computed before and timed apart: they
are needed once a model and data set, not once a method. Runs alternate, record by record, so that a busy machine
slows both.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from baft_intervention.data import load_requests
from baft_intervention.errors import BaftError
from baft_intervention.evaluation.edited import EditedModel
from baft_intervention.evaluation.methods import load_method
from baft_intervention.evaluation.metrics import kl_divergence
from baft_intervention.evaluation.queries import Query
from baft_intervention.evaluation.scoring import QueryScore, Scorer
from baft_intervention.models.loading import load_model

ROOT = Path(__file__).resolve().parents[2]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, default=ROOT / "shared" / "data", metavar="DIR")
    parser.add_argument("--data", default="knowedit/ZsRE/ZsRE-test-all.json", metavar="PATH")
    parser.add_argument("--task", default="zsre")
    parser.add_argument("--limit", type=int, default=100, metavar="N", help="records; default: 100")
    parser.add_argument("--method", default="loreft", help="makes the one edit that is on while both ways are timed")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    try:
        unrelated = args.data_dir / "zsre/zsre_mend_eval.json"
        requests = load_requests(args.data_dir / args.data, args.task, limit=args.limit, unrelated=unrelated).requests
        model, tokenizer = load_model(args.model)
        _, method = load_method(args.method, Path(__file__).parent / "methods")
        found = measure(model, tokenizer, method, requests)
    except (BaftError, OSError) as error:
        print(f"speed_evaluation.py: error: {error}", file=sys.stderr)
        return 2
    if args.json:
        print(json.dumps(found, indent=1))
    else:
        for name, value in found.items():
            print(f"{name:>40}: {value:.4g}" if isinstance(value, float) else f"{name:>40}: {value}")
    return 0


def measure(model: Any, tokenizer: Any, method: Any, requests: Sequence[Any]) -> dict[str, Any]:
    """Times of both ways, their ratio, and the largest difference of any value."""
    scorer = Scorer(model, tokenizer)
    queries = [scorer.queries(r).queries for r in requests]
    begin = time.perf_counter()
    scorer.prepare(requests)
    prior_seconds = time.perf_counter() - begin
    begin = time.perf_counter()
    before = [[slow(EditedModel(model, tokenizer), q) for q in own if q.divergence] for own in queries]
    slow_prior_seconds = time.perf_counter() - begin
    edited = method.edit(model, tokenizer, requests[:1])
    scorer.score(edited, requests[:1])  # the scorer checks its shortcuts at first use
    fast_times, slow_times, difference, disagree, positions = [], [], 0.0, 0, 0
    for request, own, unedited in zip(requests, queries, before, strict=True):
        begin = time.perf_counter()
        [scores] = scorer.score(edited, [request])
        fast_times.append(time.perf_counter() - begin)
        begin = time.perf_counter()
        plain = [slow(edited, q) for q in own]
        slow_times.append(time.perf_counter() - begin)
        kept = iter(unedited)
        for score, log_probs in zip(scores, plain, strict=True):
            gap, moved = compare(score, log_probs, next(kept) if score.query.divergence else None)
            difference, disagree, positions = max(difference, gap), disagree + moved, positions + score.query.width
    edited.restore()
    ratios = [s / f for s, f in zip(slow_times, fast_times, strict=True)]
    return {
        "records": len(requests),
        "probes and answers": sum(map(len, queries)),
        "threads": torch.get_num_threads(),
        "one pass a probe, seconds": sum(slow_times),
        "scorer, seconds": sum(fast_times),
        "ratio": sum(slow_times) / sum(fast_times),
        "ratio, median record": statistics.median(ratios),
        "unedited model, one pass a probe, seconds": slow_prior_seconds,
        "unedited model, scorer, seconds": prior_seconds,
        "largest difference of a value": difference,
        "argmax tokens that differ": disagree,
        "argmax tokens": positions,
    }


@torch.no_grad()
def slow(edited: EditedModel, query: Query) -> torch.Tensor:
    """One sequence through the whole model: log-probabilities where the answer is predicted, ``(width, V)``."""
    ids = torch.tensor([[*query.prompt_ids, *query.target_ids]])
    with edited.prompts([len(query.prompt_ids)]):
        logits = edited.model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0]
    first = len(query.prompt_ids) - 1
    return logits[first : first + query.width].float().log_softmax(-1)


def compare(score: QueryScore, log_probs: torch.Tensor, before: torch.Tensor | None) -> tuple[float, int]:
    """Largest difference of log-probabilities and divergences, and how many argmax tokens differ."""
    wanted = [log_probs[j, t].item() for j, t in enumerate(score.query.target_ids)]
    gaps = [abs(a - b) for a, b in zip(score.log_probs, wanted, strict=True)]
    if before is not None:
        divergence = kl_divergence(before, log_probs).tolist()
        gaps += [abs(a - b) for a, b in zip(score.divergence, divergence, strict=True)]
    moved = sum(a != b for a, b in zip(score.predicted, log_probs.argmax(-1).tolist(), strict=True))
    return max(gaps, default=0.0), moved


if __name__ == "__main__":
    sys.exit(main())
