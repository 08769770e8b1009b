"""Run a matrix of methods and benchmark tasks, cell by cell; finished cells are left alone, cut ones go on.

    python benchmarks/run.py --methods base,loreft,lora,ft-m,baft-linear --limit 100 --out benchmarks/results/smollm2 --jobs 2

A method is a file in benchmarks/methods, a task one in benchmarks/tasks (or a path to one's own). Each cell is a
`baft evaluate` in a process of its own, so its peak memory is its own, and a cell that fails does not end the others. The
same command again finishes what is missing. Afterwards: python benchmarks/report.py DIR.

Several GPUs, or machines, share the records of each cell out (docs/howto/gpus.md):

    python benchmarks/run.py --methods baft --device cuda --launch "torchrun --standalone --nproc_per_node 4" --out DIR
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
TASK_FIELDS = {
    "task",
    "data",
    "options",
    "unrelated",
    "unrelated_per_record",
    "replies",
    "answers",
    "fluency_tokens",
    "max_new_tokens",
}
FIVE = "zsre,wiki_counterfact,wiki_recent,wikibio,convsent"


@dataclass
class Cell:
    """One run of the matrix."""

    name: str
    folder: Path
    command: list[str]
    total: int
    process: subprocess.Popen[bytes] | None = None

    @property
    def lines(self) -> int:
        path = self.folder / "records.jsonl"
        return path.read_bytes().count(b"\n") if path.is_file() else 0


def main(argv: Sequence[str] | None = None) -> int:
    args = make_parser().parse_args(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the running cells are ended too, see run_cells
    try:
        cells = make_cells(args)
    except (OSError, ValueError, yaml.YAMLError) as error:
        print(f"run.py: error: {error}", file=sys.stderr)
        return 2
    args.out.mkdir(parents=True, exist_ok=True)
    if not args.dry_run:
        note_command(args.out / "command.txt", shown_command(argv))
    if args.dry_run:
        for cell in cells:
            print(shlex.join(cell.command))
        return 0
    failed = run_cells(cells, jobs=args.jobs, threads=args.threads, quiet=args.quiet)
    for cell in failed:
        print(
            f"run.py: error: cell {cell.name} failed; see {cell.folder.parent / (cell.name + '.log')}", file=sys.stderr
        )
    if failed == cells and all(c.process is not None and c.process.returncode == 2 for c in failed):
        return 2
    return 1 if failed else 0


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "--methods", default="base,loreft,lora,ft-m,baft-linear", metavar="M,M", help="names or YAML files"
    )
    parser.add_argument("--tasks", default=FIVE, metavar="T,T", help=f"names or YAML files; default: {FIVE}")
    parser.add_argument("--protocol", default="single", metavar="P,P", help="one or several; default: single")
    parser.add_argument("--limit", type=int, default=100, metavar="N", help="records a task; 0 for all; default: 100")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument(
        "--data-dir",
        type=Path,
        default=default_data(),
        metavar="DIR",
        help="folder of the benchmark files; default: $BAFT_DATA, else ../shared/data",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of the results, a folder a cell")
    parser.add_argument("--seed", default="0", metavar="N,N", help="one or several; default: 0")
    parser.add_argument("--batch-size", type=int, default=10)
    parser.add_argument("--checkpoints", default="1,10,100,1000")
    parser.add_argument(
        "--fluency-every", type=int, default=4, metavar="N", help="sampled text on every N-th record; default: 4"
    )
    parser.add_argument(
        "--fluency-tokens", type=int, default=32, metavar="N", help="its length; 0 for none; default: 32"
    )
    parser.add_argument("--skip-bad", action="store_true")
    parser.add_argument("--device", help="cpu (the default), cuda, cuda:1, ... or auto")
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16", "float16"))
    parser.add_argument(
        "--cache", metavar="DIR", help="folder of the unedited model's answers; default: the user's cache"
    )
    parser.add_argument(
        "--jobs", type=int, default=1, metavar="N", help="cells at once, each on cores/N threads; default: 1"
    )
    parser.add_argument("--threads", type=int, metavar="N", help="threads a cell; default: cores/jobs")
    parser.add_argument(
        "--launch", default="", metavar="WORDS", help="what starts the processes of a cell, e.g. 'torchrun ...'"
    )
    parser.add_argument("--fresh", action="store_true", help="run every cell again")
    parser.add_argument("--dry-run", action="store_true", help="show the commands only")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    return parser


def default_data() -> Path:
    return Path(os.environ.get("BAFT_DATA") or HERE.parent.parent / "shared" / "data")


def note_command(path: Path, command: str) -> None:
    """Keep the commands that filled a folder, one a line, each once."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    if command not in lines:
        path.write_text("\n".join([*lines, command]) + "\n", encoding="utf-8")


def shown_command(argv: Sequence[str] | None) -> str:
    words = list(sys.argv[1:] if argv is None else argv)
    for flag in ("--data-dir", "--cache"):  # where a machine keeps its files is no part of the result
        while flag in words:
            at = words.index(flag)
            del words[at : at + 2]
    return shlex.join(["python", "benchmarks/run.py", *words])


def make_cells(args: argparse.Namespace) -> list[Cell]:
    """All cells; the methods of one task stand apart, so that parallel cells do not compute the same answers twice."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("run.py starts its cells itself; run it as one process, with --launch 'torchrun ...'")
    if args.jobs < 1:
        raise ValueError(f"--jobs is {args.jobs}; it must be at least 1")
    threads = args.threads or max(1, (os.cpu_count() or 1) // args.jobs)
    tasks = {Path(name).stem: read_task(name) for name in args.tasks.split(",") if name}
    methods = [name for name in args.methods.split(",") if name]
    protocols = [p for p in args.protocol.split(",") if p]
    seeds = [int(s) for s in args.seed.split(",")]
    cells = []
    for seed in seeds:
        for protocol in protocols:
            for method in methods:
                for stem, task in tasks.items():
                    name = f"{stem}.{Path(method).stem}.{protocol}" + (f".seed{seed}" if len(seeds) > 1 else "")
                    cells.append(make_cell(args, name, task, method, protocol, seed, threads))
    return cells


def read_task(name: str) -> dict[str, Any]:
    path = Path(name) if name.endswith((".yaml", ".yml")) else HERE / "tasks" / f"{name}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in (HERE / "tasks").glob("*.yaml")))
        raise ValueError(f"unknown task {name!r}; known tasks: {known}; or give a YAML file")
    task = yaml.safe_load(path.read_text(encoding="utf-8"))
    if not isinstance(task, Mapping) or "data" not in task:
        raise ValueError(f"{path}: a task file needs 'data: PATH'")
    if unknown := sorted(set(task) - TASK_FIELDS):
        raise ValueError(f"{path}: unknown field {unknown[0]!r}; known fields: {', '.join(sorted(TASK_FIELDS))}")
    return dict(task)


def make_cell(
    args: argparse.Namespace, name: str, task: Mapping[str, Any], method: str, protocol: str, seed: int, threads: int
) -> Cell:
    data = args.data_dir / task["data"]
    if not data.is_file():
        raise ValueError(f"{data} does not exist; give the folder of the benchmark files by --data-dir or $BAFT_DATA")
    folder = args.out / name
    words = [
        "--data",
        str(data),
        "--method",
        method,
        "--model",
        args.model,
        "--out",
        str(folder),
        "--protocol",
        protocol,
    ]
    words += ["--task", task["task"]] if "task" in task else []
    words += ["--limit", str(args.limit)] if args.limit else []
    words += ["--seed", str(seed), "--batch-size", str(args.batch_size), "--checkpoints", args.checkpoints]
    words += [
        word for key, value in task.get("options", {}).items() for word in ("--option", f"{key}={json.dumps(value)}")
    ]
    if "unrelated" in task:
        words += ["--unrelated", str(args.data_dir / task["unrelated"])]
        words += ["--unrelated-per-record", str(task.get("unrelated_per_record", 2))]
    words += ["--replies", str(task["replies"])] if "replies" in task else []
    words += [] if task.get("answers", True) else ["--no-answers"]
    words += ["--max-new-tokens", str(task["max_new_tokens"])] if "max_new_tokens" in task else []
    words += [
        "--fluency-tokens",
        str(task.get("fluency_tokens", args.fluency_tokens)),
        "--fluency-every",
        str(args.fluency_every),
    ]
    words += ["--threads", str(threads), "--quiet"]
    for flag in ("device", "dtype", "cache"):
        if getattr(args, flag):
            words += [f"--{flag}", str(getattr(args, flag))]
    words += ["--skip-bad"] if args.skip_bad else []
    words += ["--fresh"] if args.fresh else []
    start = shlex.split(args.launch) or [sys.executable]
    command = [*start, "-m", "baft_intervention.cli", "evaluate", *words]
    return Cell(name, folder, command, args.limit or count_records(data))


def count_records(path: Path) -> int:
    """A guess for the progress bar only."""
    text = path.read_text(encoding="utf-8")
    try:
        return len(json.loads(text))
    except ValueError:
        return text.count("\n")


def run_cells(cells: Sequence[Cell], *, jobs: int, threads: int | None, quiet: bool) -> list[Cell]:
    """Run all cells, ``jobs`` at once; gives those that failed."""
    threads = threads or max(1, (os.cpu_count() or 1) // jobs)
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(HERE.parent), os.environ.get("PYTHONPATH")]))
    waiting, running, failed = list(cells), [], []
    done = {cell.name: cell.lines for cell in cells}
    bar = tqdm(
        total=sum(c.total for c in cells), initial=sum(done.values()), unit="record", disable=quiet, dynamic_ncols=True
    )
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                cell = waiting.pop(0)
                cell.folder.parent.mkdir(parents=True, exist_ok=True)
                with open(cell.folder.parent / f"{cell.name}.log", "wb") as log:
                    cell.process = subprocess.Popen(cell.command, stdout=log, stderr=subprocess.STDOUT, env=environment)
                running.append(cell)
            time.sleep(0.5)
            for cell in list(running):
                lines = cell.lines
                bar.update(lines - done[cell.name])
                done[cell.name] = lines
                if cell.process is None or cell.process.poll() is None:
                    continue
                running.remove(cell)
                log = cell.folder.parent / f"{cell.name}.log"
                if cell.process.returncode:
                    failed.append(cell)
                    tqdm.write(f"{cell.name}: exit code {cell.process.returncode}: {last_line(log)}", file=sys.stderr)
                else:
                    log.unlink()
            bar.set_description(", ".join(c.name for c in running)[:60])
    finally:
        bar.close()
        for cell in running:  # interrupted: each cell goes on from here next time
            if cell.process is not None and cell.process.poll() is None:
                cell.process.terminate()
                cell.process.wait()
    return failed


def last_line(path: Path) -> str:
    lines = [line for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return lines[-1] if lines else "no output"


if __name__ == "__main__":
    sys.exit(main())
