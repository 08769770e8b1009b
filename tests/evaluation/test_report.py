"""Reports from hand-made summaries: what stands in which table, and what does not."""

import csv
import io
import json

import pytest

from baft_intervention.errors import DataError
from baft_intervention.evaluation.records import dump_line
from baft_intervention.evaluation.report import markdown, read_summaries, table_csv, write_report
from baft_intervention.evaluation.summary import make_summary

RUN = {
    "label": "lora", "method": "lora", "settings": {"rank": 8}, "task": "zsre", "protocol": "single", "seed": 0, "model": "tiny",
    "data": "d.json", "data_sha256": "ab" * 32, "fingerprint": "cd" * 32, "versions": {"torch": "2"},
}  # fmt: skip
MACHINE = {"processor": "abacus", "cores": 2, "threads": 1, "gpu": None}


def line(index, metrics, error=None, checkpoint=None):
    return {
        "index": index, "id": str(index), "checkpoint": checkpoint, "metrics": metrics, "probes": [], "generated": {},
        "error": error, "steps": 4, "final_loss": 0.5, "trained_parameters": 10, "adapter_bytes": 40,
    }  # fmt: skip


def write_cell(folder, lines, times=(), **run):
    folder.mkdir(parents=True)
    (folder / "records.jsonl").write_bytes(b"".join(dump_line(x) for x in lines))
    (folder / "timings.jsonl").write_bytes(b"".join(dump_line(x) for x in times))
    summary = make_summary(RUN | run, folder, machine=MACHINE)
    (folder / "summary.json").write_text(json.dumps(summary))
    return summary


LINES = [
    line(0, {"reliability": 1.0, "locality": 0.5, "portability": None, "unrelated": 1.0, "perplexity": 2.0}),
    line(1, {"reliability": 0.5, "locality": 1.0, "portability": 0.25, "unrelated": 1.0, "perplexity": 8.0}),
    line(2, {"reliability": 0.0, "locality": 0.0, "portability": None, "unrelated": 1.0}, error="EditError: nan"),
]
TIMES = [
    {"setup_seconds": 3.0},
    {"edit_seconds": 1.0, "edits": 1, "again": False},
    {"edit_seconds": 9.0, "edits": 1, "again": True},
    {"edit_seconds": 2.0, "edits": 1, "again": False},
    {"score_seconds": 0.5, "generate_seconds": 0.25, "records": 2},
    {"prior_seconds": 6.0, "records": 3},
    {"peak_memory_mib": 100.0},
    {"peak_memory_mib": 90.0},
]


def test_summary_by_hand(tmp_path):
    s = write_cell(tmp_path / "a", LINES, TIMES)
    assert s["reliability"] == pytest.approx(0.5)
    assert s["portability"] == 0.25
    assert s["metrics"]["portability"] == {"mean": 0.25, "n": 1, "ci_low": None, "ci_high": None}
    assert s["generality"] is None
    assert s["fluency"] is None
    assert s["metrics"]["perplexity"]["mean"] == pytest.approx(4.0)
    assert (s["n"], s["failed"], s["errors"]) == (3, 1, {"EditError": 1})
    assert s["seconds_per_edit"] == 1.5  # an edit that is applied again when a run goes on does not count
    assert s["costs"]["score_seconds_per_record"] == 0.25
    assert s["costs"]["prior_seconds_per_record"] == 2.0
    assert s["peak_memory_mib"] == 100.0
    assert s["trained_parameters"] == 10


def test_summary_of_a_sequence_is_that_of_the_last_checkpoint(tmp_path):
    lines = [
        line(0, {"reliability": 1.0}, checkpoint=1),
        line(0, {"reliability": 0.5}, checkpoint=2),
        line(1, {"reliability": 0.0}, checkpoint=2),
    ]
    s = write_cell(tmp_path / "a", lines, protocol="sequential_final")
    assert (s["n"], s["reliability"]) == (2, 0.25)
    assert s["checkpoints"]["1"]["reliability"]["mean"] == 1.0
    text = markdown([s])
    assert "| zsre | lora | 1 | 100.0 |" in text
    assert "| zsre | lora | 2 | 25.0 [" in text


def test_no_record_is_an_error(tmp_path):
    (tmp_path / "records.jsonl").write_bytes(b"")
    with pytest.raises(DataError, match="holds no record"):
        make_summary(RUN, tmp_path)


def test_markdown_has_one_table_a_family(tmp_path):
    write_cell(tmp_path / "a", LINES, TIMES)
    text = markdown(read_summaries(tmp_path), command="python run.py", note="A note.")
    assert "python run.py" in text
    assert "A note." in text
    assert "abacus, 2 cores" in text
    assert "`abababababab`" in text
    sections = {part.splitlines()[0]: part for part in text.split("## ")[1:]}
    assert set(sections) == {"Token accuracy, teacher-forced", "Locality", "Text quality", "Cost", "Failed edits"}
    assert "reliability" not in sections["Locality"]
    assert "unrelated" not in sections["Token accuracy, teacher-forced"]
    assert "| zsre | lora | 50.0 [0.0, 100.0] | 25.0 (n = 1) |" in sections["Token accuracy, teacher-forced"]
    assert "4.000 [2.000, 8.000] (n = 2)" in sections["Text quality"]
    assert "1 (EditError: 1)" in sections["Failed edits"]
    assert "nan" not in text.lower().replace("ednan", "")
    assert "None" not in text


def test_groups_are_shown_where_there_are_several(tmp_path):
    metrics = {
        "portability": 0.5,
        "portability/Reasoning": 0.0,
        "portability/Subject_Aliasing": 1.0,
        "locality/Forgetfulness": 1.0,
    }
    write_cell(tmp_path / "a", [line(0, metrics)])
    text = markdown(read_summaries(tmp_path))
    assert "## By group" in text
    assert "portability/Reasoning | portability/Subject_Aliasing" in text
    assert "locality/Forgetfulness" not in text  # the one group is the whole


def test_csv_has_a_line_a_metric(tmp_path):
    write_cell(tmp_path / "a", LINES, TIMES)
    rows = list(csv.DictReader(io.StringIO(table_csv(read_summaries(tmp_path)))))
    by_name = {r["metric"]: r for r in rows}
    assert by_name["reliability"]["mean"] == "0.5"
    assert by_name["portability"]["n"] == "1"
    assert by_name["portability"]["ci_low"] == ""
    assert by_name["seconds_per_edit"]["mean"] == "1.5"
    assert {r["task"] for r in rows} == {"zsre"}


def test_report_writes_three_files_and_a_picture(tmp_path):
    write_cell(tmp_path / "a", LINES)
    write_cell(tmp_path / "b", LINES[:2], label="base")
    write_cell(tmp_path / "c", [line(0, {"reliability": 1.0, "locality": None})], label="base", task="wikibio")
    paths = write_report(tmp_path, command="x")
    assert sorted(p.name for p in paths.values()) == ["report.csv", "report.md", "report.png"]
    assert paths["png"].read_bytes().startswith(b"\x89PNG")
    assert "![generality against locality](report.png)" in paths["md"].read_text()


@pytest.mark.parametrize("text", ["", "[]", '{"method": "x"}'])
def test_a_damaged_summary_is_told(tmp_path, text):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "summary.json").write_text(text)
    with pytest.raises(DataError, match="run that cell again"):
        read_summaries(tmp_path)


def test_an_empty_folder_is_told(tmp_path):
    with pytest.raises(DataError, match="no summary.json below"):
        read_summaries(tmp_path)
