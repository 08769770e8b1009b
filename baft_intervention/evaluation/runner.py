"""Score an editing method on a benchmark: edits its records one after another and asks the probes of each.

Writes into --out: records.jsonl (one line a record, byte for byte the same at each run), timings.jsonl, run.json
(what was run) and summary.json. A run that was cut goes on where it stood when the same command is given again.

  baft evaluate --task zsre --data ZsRE-test-all.json --method baft --limit 100 --out results/zsre-baft

Several processes share the records out and write the same files (docs/distributed.md):

  torchrun --nproc_per_node 4 -m baft_intervention.cli evaluate --device cuda --task zsre ...
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import re
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import BaftError, ConfigError, EditError

logger = logging.getLogger(__name__)

METHOD_FOLDER = Path(__file__).resolve().parents[2] / "benchmarks" / "methods"  # of a checkout; absent in a wheel
_FILES = ("records.jsonl", "timings.jsonl", "run.json", "summary.json", "lock")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``baft evaluate``."""
    what = parser.add_argument_group("what is evaluated")
    what.add_argument(
        "--task", help="benchmark or format (zsre, counterfact, wikibio, ...); recognised by the data if left out"
    )
    what.add_argument("--data", required=True, metavar="PATH", help="its file, or a hub id")
    what.add_argument("--method", required=True, metavar="M", help="a method's name, or a YAML file with its settings")
    what.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="change a setting of the method; repeatable"
    )
    what.add_argument(
        "--model", default="smollm2-135m", help="smollm2-135m, a folder, or a hub id; default: smollm2-135m"
    )
    what.add_argument("--out", required=True, metavar="DIR", help="folder of the results")
    how = parser.add_argument_group("how")
    how.add_argument(
        "--protocol", default="single", metavar="P",
        help="single, batched, sequential_immediate or sequential_final; default: single",
    )  # fmt: skip
    how.add_argument("--limit", type=_positive, metavar="N", help="only the first N records")
    how.add_argument(
        "--seed", type=int, default=0, metavar="N", help="of the method, the data's choices and sampled texts"
    )
    how.add_argument(
        "--batch-size", type=_positive, default=10, metavar="B", help="edits at once, for batched; default: 10"
    )
    how.add_argument(
        "--checkpoints",
        type=_numbers,
        default=(1, 10, 100, 1000),
        metavar="T,T",
        help="for sequential_final; default: 1,10,100,1000",
    )
    how.add_argument("--skip-bad", action="store_true", help="leave malformed records out and count them")
    how.add_argument(
        "--option", action="append", default=[], metavar="NAME=VALUE", help="an option of the data's format; repeatable"
    )
    how.add_argument("--unrelated", metavar="PATH", help="file of unrelated questions, a further probe group")
    how.add_argument("--unrelated-per-record", type=_positive, default=2, metavar="N", help="default: 2")
    how.add_argument(
        "--replies", type=_count, default=4, metavar="N", help="ConvSent: replies scored a side, 0 for all; default: 4"
    )
    text = parser.add_argument_group("generated text")
    text.add_argument("--no-answers", action="store_true", help="generate no answers (no generation_em)")
    text.add_argument(
        "--max-new-tokens", type=_positive, default=64, metavar="N", help="longest generated answer; default: 64"
    )
    text.add_argument(
        "--fluency-tokens",
        type=_count,
        default=32,
        metavar="N",
        help="sampled text for fluency; 0 for none; default: 32",
    )
    text.add_argument(
        "--fluency-every", type=_positive, default=1, metavar="N", help="on every N-th record only; default: 1"
    )
    where = parser.add_argument_group("where")
    where.add_argument("--device", help="cpu (the default), cuda, cuda:1, ..., auto, or spread over all")
    where.add_argument(
        "--dtype", choices=("auto", "float32", "bfloat16", "float16"), help="of the model; default: as saved"
    )
    where.add_argument("--threads", type=_positive, metavar="N", help="processor threads")
    where.add_argument(
        "--cache",
        metavar="DIR",
        help="folder of the unedited model's answers; none for no folder; default: the user's cache",
    )
    where.add_argument("--fresh", action="store_true", help="throw away what --out holds of an earlier run")
    where.add_argument("--json", action="store_true", help="the summary as JSON on stdout")
    where.add_argument("--quiet", action="store_true", help="no progress bar and no notes")


def main(args: argparse.Namespace) -> int:
    """Run an evaluation; 0 when it is done.

    Raises:
        BaftError: bad input, or an operation that failed; the caller makes exit codes of them.
    """
    from ..runtime.distributed import processes

    with processes():
        return _main(args)


def _main(args: argparse.Namespace) -> int:
    from ..cli.console import Output
    from ..runtime import distributed

    out = Output(as_json=args.json, quiet=args.quiet)
    summary = evaluate(args, progress=out.progress)
    if not distributed.is_main():
        return 0
    if args.json:
        out.result(summary)
        return 0
    rows = [(name, _number(m["mean"]), _interval(m), m["n"]) for name, m in summary["metrics"].items() if m["n"]]
    title = f"{summary['method']} on {summary['task']}, {summary['protocol']}, n = {summary['n']}"
    out.table(["metric", "mean", "95 % interval", "n"], rows, title=title)
    seconds = _number(summary["seconds_per_edit"])
    out.say(
        f"{seconds} s an edit, {summary['trained_parameters']} trained parameters, {summary['failed']} failed edits"
    )
    out.say(f"results in {args.out}")
    return 0


def evaluate(args: argparse.Namespace, *, progress: bool = False) -> dict[str, Any]:
    """What :func:`main` does, but for what it shows; gives the summary."""
    from ..data import load_requests
    from ..data.registry import canonical_task
    from ..runtime import distributed
    from .methods import load_method, make_method
    from .protocols import Generation, Plan
    from .summary import library_versions, machine_facts, make_summary

    generation = Generation(
        answers=not args.no_answers, max_new_tokens=args.max_new_tokens,
        fluency_tokens=args.fluency_tokens, fluency_every=args.fluency_every,
    )  # fmt: skip
    plan = Plan(args.protocol, args.batch_size, tuple(args.checkpoints), args.seed, generation)
    label, method = load_method(args.method, METHOD_FOLDER)
    changed = {"seed": args.seed} | _assignments(args.set, "--set")
    method = make_method(method.name, _plain(method) | changed)
    folder = distributed.from_main(lambda: _folder(args.out, fresh=args.fresh))
    data = load_requests(
        args.data, args.task, limit=args.limit, seed=args.seed or None, skip_bad=args.skip_bad,
        unrelated=args.unrelated, unrelated_per_record=args.unrelated_per_record, **_assignments(args.option, "--option"),
    )  # fmt: skip
    # a format that was asked for by name is told apart from the task's other formats
    task = data.format if args.task and canonical_task(args.task) == data.format else data.task
    if args.threads:
        import torch

        torch.set_num_threads(args.threads)
    run: dict[str, Any] = {
        "label": label, "method": method.name, "settings": method.settings(), "task": task, "format": data.format,
        "data": Path(data.path).name if data.path else "", "data_sha256": data.sha256, "options": _named(data.options),
        "skipped": data.bad_count, "records": len(data.requests), "protocol": plan.protocol, "batch_size": plan.batch_size,
        "checkpoints": list(plan.checkpoints), "seed": args.seed, "replies": args.replies,
        "generation": vars(plan.generation), "model": Path(args.model).name or args.model, "dtype": args.dtype,
    }  # fmt: skip
    if plan.protocol != "batched":
        del run["batch_size"]
    if plan.protocol != "sequential_final":
        del run["checkpoints"]
    run["versions"] = library_versions()
    finished = distributed.from_main(lambda: _finished(folder, run))
    if finished is not None:
        logger.info("%s is finished; give --fresh to run it again", folder)
        return finished
    with _only_writer(folder):
        run = _run(args, method, data.requests, plan, run, folder, progress)
        machine = machine_facts() | {"processes": distributed.world_size()}

        def summarised() -> dict[str, Any]:
            summary = make_summary(run, folder, machine=machine)
            _write(folder / "summary.json", summary)
            return summary

        summary = distributed.from_main(summarised)
    if distributed.is_main():
        (folder / "lock").unlink(missing_ok=True)
    return summary


def _run(args, method, requests, plan, run, folder, progress) -> dict[str, Any]:
    from ..models.loading import load_model, model_fingerprint
    from ..runtime import distributed
    from .baseline_outputs import BaselineCache, default_cache_folder
    from .protocols import run_protocol
    from .records import dump_line
    from .scoring import Scorer
    from .summary import peak_memory_mib

    model, tokenizer = load_model(args.model, device=args.device, dtype=args.dtype)
    fingerprints = distributed.gather(lambda: model_fingerprint(model))
    run = run | {"fingerprint": fingerprints[0]}
    if len(set(fingerprints)) > 1:
        other = next(k for k, found in enumerate(fingerprints) if found != fingerprints[0])
        raise ConfigError(f"--model {args.model!r} is another model on rank {other} than on rank 0; give all the same")

    def begun() -> None:
        _same_run(folder / "run.json", run)
        _write(folder / "run.json", run)

    distributed.from_main(begun)
    cache = None if args.cache == "none" else Path(args.cache) if args.cache else default_cache_folder()
    scorer = Scorer(model, tokenizer, cache=BaselineCache(cache), replies=args.replies, fingerprint=run["fingerprint"])
    run_protocol(scorer, method, requests, plan, folder, progress=progress)
    peaks = distributed.gather(peak_memory_mib)

    def noted() -> None:
        with open(folder / "timings.jsonl", "ab") as file:
            file.write(dump_line({"peak_memory_mib": max(peaks)}))

    distributed.from_main(noted)
    return run


@contextlib.contextmanager
def _only_writer(folder: Path) -> Iterator[None]:
    """Keep a second run out of the folder: two would write the same records twice. The lock goes with the process."""
    from filelock import FileLock, Timeout

    from ..runtime import distributed

    with contextlib.ExitStack() as held:

        def locked() -> None:
            folder.mkdir(parents=True, exist_ok=True)
            try:
                held.enter_context(FileLock(folder / "lock", timeout=0))
            except Timeout:
                raise ConfigError(
                    f"another run writes to {str(folder)!r}; wait for it, or give another --out"
                ) from None

        distributed.from_main(locked)
        yield


def _folder(out: str, *, fresh: bool) -> Path:
    folder = Path(out)
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"--out {out!r} is a file; give a folder")
    if fresh and folder.is_dir():
        strange = [p.name for p in folder.iterdir() if p.name not in _FILES]
        if strange:
            raise ConfigError(f"--fresh: {out!r} holds {strange[0]!r}, which no evaluation wrote; give another --out")
        shutil.rmtree(folder)
    return folder


def _finished(folder: Path, run: Mapping[str, Any]) -> dict[str, Any] | None:
    """The summary that is there already, if it is of this run."""
    path = folder / "summary.json"
    if not path.is_file():
        return None
    summary = _read(path)
    _compare(path, summary.get("run", {}), run)
    return summary


def _same_run(path: Path, run: Mapping[str, Any]) -> None:
    if path.is_file():
        _compare(path, _read(path), run)


def _compare(path: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    now = json.loads(json.dumps(now))
    for name, value in now.items():
        if before.get(name) != value:
            raise ConfigError(
                f"{path} is of another run: {name} was {_brief(before.get(name))} and is {_brief(value)} now; give another "
                "--out, or --fresh to throw it away"
            )


def _brief(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 160 else text[:157] + "..."


def _read(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read: {error}; give another --out, or --fresh") from None
    return data if isinstance(data, dict) else {}


def _write(path: Path, data: Mapping[str, Any]) -> None:
    from .records import write_json

    try:
        write_json(path, data)
    except OSError as error:
        raise EditError(f"{path} cannot be written: {error.strerror or error}") from error


def _plain(method: Any) -> dict[str, Any]:
    import dataclasses

    return {f.name: getattr(method, f.name) for f in dataclasses.fields(method)}


def _named(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options with paths cut to file names: results are to be the same wherever the data lies."""
    named = dict(options)
    if isinstance(named.get("unrelated"), str):
        named["unrelated"] = Path(named["unrelated"]).name
    return json.loads(json.dumps(named))


def _assignments(texts: Sequence[str], flag: str) -> dict[str, Any]:
    """``NAME=VALUE`` pairs, values read as YAML."""
    import yaml

    found = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name.isidentifier():
            raise ConfigError(f"{flag} {text!r} must be NAME=VALUE")
        try:
            found[name] = (
                float(value) if re.fullmatch(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+", value) else yaml.safe_load(value)
            )
        except yaml.YAMLError:  # YAML reads 5e-4 as text, hence the number above
            found[name] = value
    return found


def _positive(text: str) -> int:
    return _whole(text, 1)


def _count(text: str) -> int:
    return _whole(text, 0)


def _whole(text: str, low: int) -> int:
    if not text.isdecimal() or int(text) < low:
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number of at least {low}")
    return int(text)


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(_positive(part) for part in text.split(","))


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _interval(metric: Mapping[str, Any]) -> str:
    return "-" if metric["ci_low"] is None else f"{metric['ci_low']:.3g} to {metric['ci_high']:.3g}"


def command(argv: Sequence[str] | None = None) -> int:
    """``python -m baft_intervention.evaluation.runner``, with the exit codes of ``baft evaluate``."""
    import os

    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    from ..cli.console import set_up_logging

    parser = argparse.ArgumentParser(
        prog="baft evaluate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(parser)
    args = parser.parse_args(argv)
    set_up_logging(quiet=args.quiet, debug=False)
    try:
        return main(args)
    except BaftError as error:
        sys.stderr.write(f"baft: error: {' '.join(str(error).split())}\n")
        return 1 if isinstance(error, EditError) else 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(command())
