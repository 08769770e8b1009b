"""What many edits cost a model elsewhere: lm-evaluation-harness on a small local task, before and after 1, 10, 100, … edits.

    pip install '.[harness]'
    python benchmarks/general_ability.py --data FILE --keep DIR [--edits 1,10,100,1000] [--json FILE]
    python benchmarks/general_ability.py --adapter DIR [--edits 1,10,100,1000] [--json FILE]

The task is ``general_questions.jsonl``: 48 everyday questions of four choices each (ours; nothing in them is edited), scored
by the likelihood of the answers, the edits at the end of each question. Also counted: how many of the 192 answers have exactly
the log-likelihood that they had before.

``--data`` is a file of training or validation records, which are edited; ``--keep`` keeps the edits in a folder as they are made.
``--adapter`` asks with edits that were made elsewhere, and trains nothing: after N edits means with the first N of them. Rows
that ``--json`` holds already, of the same edits, are not asked again, so a run that was cut off goes on where it was.
``benchmarks/report.py RESULTS`` shows the files of ``RESULTS/general_ability/`` and ``general_ability/RESULTS.*.json``.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from baft_intervention import BaftConfig, BaftEditor
from baft_intervention.data import load_requests
from baft_intervention.environment import library_versions
from baft_intervention.errors import BaftError
from baft_intervention.integrations.lm_eval import make_lm

HERE = Path(__file__).resolve().parent
TASK = """\
task: general_questions
dataset_path: json
dataset_kwargs:
  data_files: {{test: {file}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: right
metric_list:
  - metric: acc
"""


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--data", type=Path, help="file of records to edit (no test part)")
    source.add_argument("--adapter", type=Path, metavar="DIR", help="edits that are there already")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="keep the edits of --data here, and go on with them")
    parser.add_argument("--edits", default="1,10,100", help="numbers of edits after which is asked; default: 1,10,100")
    parser.add_argument("--model", default="smollm2-135m", help="base model of --data's edits")
    parser.add_argument("--weighting", default=BaftConfig().weighting, help="of --data's edits")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args(argv)
    counts = sorted({int(n) for n in args.edits.split(",")})
    try:
        if args.adapter:
            editor = BaftEditor.from_pretrained(args.adapter)
        else:
            settings = BaftConfig(weighting=args.weighting)
            opened = BaftEditor.open(args.keep, args.model, settings) if args.keep else None
            editor = opened or BaftEditor.from_pretrained(args.model, settings)
            train(editor, list(load_requests(args.data, skip_bad=True).requests), counts[-1])
            editor.close()  # what follows is not to be kept
        facts = {
            "method": f"baft, {editor.config.weighting}", "weighting": editor.config.weighting, "model": editor.model_name,
            "data": (args.data or args.adapter).name, "edits_sha256": digest_of(editor),
        }  # fmt: skip
        rows = measure(editor, counts, args.json, facts)
    except BaftError as error:
        print(f"general_ability.py: error: {error}", file=sys.stderr)
        return 2
    print("| edits | accuracy | answers of 192 whose likelihood is the same |\n|---:|---:|---:|")
    for row in rows:
        print(f"| {row['edits']} | {row['accuracy']:.3f} | {row['unmoved']} |")
    return 0


def train(editor: BaftEditor, requests: list[Any], count: int) -> None:
    """Edit until there are so many edits, or no requests; those whose prompts are edited already are passed over."""
    there = {request.prompt for edit in editor.edits for request in edit.requests}
    requests = [request for request in requests if request.prompt not in there]
    while len(editor.edits) < count and requests:
        part = [requests.pop(0) for _ in range(min(64, count - len(editor.edits), len(requests)))]
        for request in part if not edited(editor, part) else ():
            edited(editor, [request])  # one of them cannot be edited: the others one by one


def digest_of(editor: BaftEditor) -> str:
    """Which edits these are: the first of them, so that a run with more of the same goes on with the same file."""
    first = [(r.prompt, r.target_new) for edit in editor.edits[:1] for r in edit.requests]
    return hashlib.sha256(json.dumps([editor.config.to_dict(), first]).encode()).hexdigest()


def measure(
    editor: BaftEditor, counts: Sequence[int], file: Path | None, facts: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """A row before any edit and after each number of them, written to ``file`` as soon as it is there."""
    edits, rows = editor.edits, done_rows(file, facts)
    for count in [n for n in counts if n > len(edits)]:
        print(f"there are {len(edits)} edits, not {count}: left out", file=sys.stderr)
    wanted = [0, *(n for n in counts if 0 < n <= len(edits))]
    likelihoods: list[float] = []
    try:
        for count in wanted if any(n not in rows for n in wanted) else ():
            if count in rows and count:
                continue
            editor.adapter.set_edits(edits[:count])
            row = {"edits": count, **ask(editor)}
            found = row.pop("likelihoods")
            likelihoods = likelihoods or found  # the first is without edits
            row["unmoved"] = sum(a == b for a, b in zip(found, likelihoods, strict=True))
            rows[count] = row
            print(row, file=sys.stderr)
            if file:
                write(file, {**facts, "versions": library_versions(), "rows": [rows[n] for n in sorted(rows)]})
    finally:
        editor.adapter.set_edits(edits)
    return [rows[n] for n in sorted(rows)]


def done_rows(file: Path | None, facts: Mapping[str, Any]) -> dict[int, dict[str, Any]]:
    """Rows of a file that an earlier run with the same edits wrote; none where it is another's, which is replaced."""
    if file is None or not file.is_file():
        return {}
    data = json.loads(file.read_text(encoding="utf-8"))
    same = all(data.get(name) == facts[name] for name in ("model", "weighting", "edits_sha256"))
    return {row["edits"]: row for row in data["rows"]} if same else {}


def write(file: Path, data: Mapping[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    beside = file.with_name(file.name + ".new")
    beside.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    beside.replace(file)


def edited(editor: BaftEditor, requests: list[Any]) -> bool:
    try:
        editor.edit(requests)
    except BaftError as error:
        if len(requests) == 1:
            print(f"left out: {error}", file=sys.stderr)
        return False
    return True


def ask(editor: BaftEditor) -> dict[str, Any]:
    """The harness's accuracy, and every answer's log-likelihood."""
    from lm_eval import simple_evaluate  # pyright: ignore[reportMissingImports]
    from lm_eval.tasks import TaskManager  # pyright: ignore[reportMissingImports]

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "task.yaml").write_text(TASK.format(file=HERE / "general_questions.jsonl"), encoding="utf-8")
        tasks = TaskManager(include_path=folder, include_defaults=False)
        lm = make_lm(editor, batch_size=32)
        out: Any = simple_evaluate(lm, tasks=["general_questions"], task_manager=tasks, bootstrap_iters=0)
    samples = sorted(out["samples"]["general_questions"], key=lambda sample: sample["doc_id"])
    likelihoods = [answer[0][0] for sample in samples for answer in sample["resps"]]
    return {"accuracy": out["results"]["general_questions"]["acc,none"], "likelihoods": likelihoods}


if __name__ == "__main__":
    sys.exit(main())
