"""What many edits cost a model elsewhere: lm-evaluation-harness on a small local task, before and after 1, 10, 100, … edits.

    pip install '.[harness]'
    python benchmarks/general_ability.py --data PATH [--edits 1,10,100,1000] [--json FILE]

The task is ``general_questions.jsonl``: 48 everyday questions of four choices each (ours; nothing in them is edited), scored
by the likelihood of the answers, the edits at the end of each question. Also counted: how many of the 192 answers have exactly
the log-likelihood that they had before. Edits come from a file of training or validation records.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from baft_intervention import BaftConfig, BaftEditor
from baft_intervention.data import load_requests
from baft_intervention.errors import BaftError
from baft_intervention.integrations.lm_eval import make_lm
from baft_intervention.storage import library_versions

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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="file of edits (no test part)")
    parser.add_argument("--edits", default="1,10,100", help="numbers of edits after which is asked; default: 1,10,100")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--weighting", default=BaftConfig().weighting)
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    counts = sorted({int(n) for n in args.edits.split(",")})
    editor = BaftEditor.from_pretrained(args.model, BaftConfig(weighting=args.weighting))
    requests = list(load_requests(args.data, skip_bad=True).requests)
    rows = [{"edits": 0, **ask(editor)}]
    likelihoods = rows[0].pop("likelihoods")
    rows[0]["unmoved"] = len(likelihoods)
    for count in counts:
        begin = time.perf_counter()
        while len(editor.edits) < count and requests:
            part = [requests.pop(0) for _ in range(min(64, count - len(editor.edits), len(requests)))]
            for request in part if not edited(editor, part) else ():
                edited(editor, [request])  # one of them cannot be edited: the others one by one
        seconds = time.perf_counter() - begin
        row = {"edits": len(editor.edits), **ask(editor)}
        row["unmoved"] = sum(a == b for a, b in zip(row.pop("likelihoods"), likelihoods, strict=True))
        rows.append({**row, "seconds": round(seconds, 1)})
        print(rows[-1], file=sys.stderr)
    print("| edits | accuracy | answers of 192 whose likelihood is the same |\n|---:|---:|---:|")
    for row in rows:
        print(f"| {row['edits']} | {row['accuracy']:.3f} | {row['unmoved']} |")
    if args.json:
        facts = {
            "command": sys.argv[1:],
            "weighting": args.weighting,
            "data": args.data.name,
            "versions": library_versions(),
        }
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps({**facts, "rows": rows}, indent=1) + "\n", encoding="utf-8")
    return 0


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
