"""``baft evaluate``: score an editing method on a benchmark."""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import ConfigError
from .console import OK, Output
from .options import MODEL_HELP, add_command, add_device, whole, whole_numbers


def add(commands: Any) -> None:
    """The options of ``baft evaluate``."""
    parser = add_command(
        commands,
        "evaluate",
        run,
        summary="score edits on a benchmark: reliability, generality, locality, portability",
        description="Applies a method to the edits of a benchmark and scores the probes of each record. The folder --out gets\n"
        "records.jsonl (one line per record, the same bytes in each run), timings.jsonl, run.json (what was run) and\n"
        "summary.json. The same command resumes an interrupted run. Several processes share the records.",
        example="  baft evaluate --task zsre --data ZsRE-test-all.json --method baft --limit 100 --out results/zsre-baft\n\n"
        "  several GPUs:  torchrun --nproc_per_node 4 -m baft_intervention.cli evaluate --device cuda --task zsre …",
    )
    what = parser.add_argument_group("what is evaluated")
    what.add_argument("--task", help="benchmark or format (zsre, counterfact, wikibio, …) if it is not recognised")
    what.add_argument("--data", required=True, metavar="PATH", help="the benchmark's file, or a hub id")
    what.add_argument("--method", required=True, metavar="M", help="a method's name, or a YAML file with its settings")
    what.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="change a setting of the method; repeatable"
    )
    what.add_argument("--model", default="smollm2-135m", help=f"{MODEL_HELP}; default: smollm2-135m")
    what.add_argument("--out", required=True, metavar="DIR", help="folder for the results")
    what.add_argument("--fresh", action="store_true", help="delete the files of an earlier run in --out first")
    how = parser.add_argument_group("how")
    how.add_argument(
        "--protocol",
        default="single",
        metavar="P",
        help="single, batched, sequential_immediate or sequential_final; default: single",
    )
    how.add_argument("--limit", type=whole(1), metavar="N", help="only the first N records")
    how.add_argument(
        "--seed", type=int, default=0, metavar="N", help="seed of the method, of the data's draws and of sampled texts"
    )
    how.add_argument(
        "--batch-size", type=whole(1), default=10, metavar="B", help="edits in a batch, for batched; default: 10"
    )
    how.add_argument(
        "--checkpoints",
        type=whole_numbers,
        default=(1, 10, 100, 1000),
        metavar="T,T",
        help="numbers of edits after which to score, for sequential_final; default: 1,10,100,1000",
    )
    how.add_argument("--skip-bad", action="store_true", help="skip malformed records and count them")
    how.add_argument(
        "--option", action="append", default=[], metavar="NAME=VALUE", help="an option of the data's format; repeatable"
    )
    how.add_argument("--unrelated", metavar="PATH", help="file of unrelated questions, a further probe group")
    how.add_argument(
        "--unrelated-per-record",
        type=whole(1),
        default=2,
        metavar="N",
        help="unrelated questions per record; default: 2",
    )
    how.add_argument(
        "--replies",
        type=whole(0),
        default=4,
        metavar="N",
        help="ConvSent: replies to score for each sentiment; 0 for all; default: 4",
    )
    text = parser.add_argument_group("generated text")
    text.add_argument("--no-answers", action="store_true", help="generate no answers (no generation_em)")
    text.add_argument(
        "--max-new-tokens", type=whole(1), default=64, metavar="N", help="longest generated answer; default: 64"
    )
    text.add_argument(
        "--fluency-tokens",
        type=whole(0),
        default=32,
        metavar="N",
        help="length of the sampled text for fluency; 0 for none; default: 32",
    )
    text.add_argument(
        "--fluency-every", type=whole(1), default=1, metavar="N", help="fluency of every N-th record only; default: 1"
    )
    machine = parser.add_argument_group("machine")
    add_device(machine)
    machine.add_argument("--threads", type=whole(1), metavar="N", help="processor threads")
    machine.add_argument(
        "--cache",
        metavar="DIR",
        help="cache folder for the unedited model's outputs, or none; default: the user's cache",
    )


def run(args: argparse.Namespace, out: Output) -> int:
    """Run an evaluation and show its summary."""
    import torch

    from ..evaluation.protocols import Generation, ProtocolSettings
    from ..evaluation.runner import evaluate
    from ..runtime.distributed import is_main, processes

    if args.threads:
        torch.set_num_threads(args.threads)
    generation = Generation(
        answers=not args.no_answers,
        max_new_tokens=args.max_new_tokens,
        fluency_tokens=args.fluency_tokens,
        fluency_every=args.fluency_every,
    )
    with processes():
        summary = evaluate(
            args.data,
            args.method,
            args.out,
            model=args.model,
            task=args.task,
            settings=_assignments(args.set, "--set"),
            protocol=ProtocolSettings(args.protocol, args.batch_size, args.checkpoints, args.seed, generation),
            limit=args.limit,
            skip_bad=args.skip_bad,
            options=_assignments(args.option, "--option"),
            unrelated=args.unrelated,
            unrelated_per_record=args.unrelated_per_record,
            replies=args.replies,
            device=args.device,
            dtype=args.dtype,
            cache=args.cache,
            fresh=args.fresh,
            progress=out.progress,
        )
        if is_main():
            _show(out, summary, args.out)
    return OK


def _show(out: Output, summary: Mapping[str, Any], place: str) -> None:
    rows = [(name, _number(m["mean"]), _interval(m), m["n"]) for name, m in summary["metrics"].items() if m["n"]]
    title = f"{summary['method']} on {summary['task']}, {summary['protocol']}, n = {summary['n']}"
    out.table(["metric", "mean", "95 % interval", "n"], rows, title=title)
    seconds = _number(summary["seconds_per_edit"])
    out.say(
        f"{seconds} s per edit, {summary['trained_parameters']} trained parameters, {summary['failed']} failed edits"
    )
    out.say(f"results in {place}")
    out.result(summary)


def _assignments(texts: Sequence[str], flag: str) -> dict[str, Any]:
    """``NAME=VALUE`` pairs, values read as YAML."""
    import yaml

    found = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name.isidentifier():
            raise ConfigError(f"{flag} {text!r} must be NAME=VALUE")
        if re.fullmatch(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+", value):  # YAML reads 5e-4 as text
            found[name] = float(value)
            continue
        try:
            found[name] = yaml.safe_load(value)
        except yaml.YAMLError:
            found[name] = value
    return found


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _interval(metric: Mapping[str, Any]) -> str:
    return "-" if metric["ci_low"] is None else f"{metric['ci_low']:.3g} to {metric['ci_high']:.3g}"
