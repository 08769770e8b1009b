"""The matrix, its report, the speed measurement and the sweep, on tiny models; every shipped task and method file."""

import argparse
import importlib.util
import json
import sys
from pathlib import Path

import pytest
import yaml

from baft_intervention.data import load_requests, refuse_test_files, split_of
from baft_intervention.evaluation.methods import make_method
from evaluation.helpers import FACTS, make_requests
from tiny import tiny_model, tiny_tokenizer

HERE = Path(__file__).resolve().parents[2] / "benchmarks"


def script(name):
    spec = importlib.util.spec_from_file_location(f"benchmarks_{name}", HERE / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("place")
    tiny_model().save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    facts = [
        {
            "prompt": p,
            "target_new": t,
            "rephrase": [f"So: {p}"],
            "locality": [{"prompt": "He works as", "answers": ["Leo"]}],
        }
        for p, t, *_ in FACTS
    ]
    (folder / "facts.json").write_text(json.dumps(facts))
    (folder / "mine.yaml").write_text("task: own\ndata: facts.json\nfluency_tokens: 0\n")
    return folder


def matrix(place, out, *more):
    return [
        "--methods", "base,icl", "--tasks", str(place / "mine.yaml"), "--limit", "2", "--data-dir", str(place), "--out", str(out),
        "--model", str(place / "model"), "--cache", "none", "--quiet", "--jobs", "2", *more,
    ]  # fmt: skip


@pytest.mark.slow
@pytest.mark.timeout(900)  # several processes, each of which imports torch
def test_matrix_runs_skips_finishes_and_reports(place, tmp_path, capsys):
    run, report = script("run"), script("report")
    out = tmp_path / "out"
    assert run.main(matrix(place, out)) == 0
    cells = [out / "mine.base.single", out / "mine.icl.single"]
    stamps = [(c / "summary.json").stat().st_mtime_ns for c in cells]
    (cells[1] / "summary.json").unlink()  # as if that cell had been cut before its end
    # a cell that fails is named, and the others are run
    assert run.main(matrix(place, out, "--methods", "base,icl,lorra")) == 1
    error = capsys.readouterr().err
    assert "mine.lorra.single" in error
    assert "did you mean 'lora'" in error
    assert (cells[0] / "summary.json").stat().st_mtime_ns == stamps[0]
    assert (cells[1] / "summary.json").is_file()
    assert [p.name for p in out.glob("*.log")] == ["mine.lorra.single.log"]
    command = (out / "command.txt").read_text()
    assert "--data-dir" not in command  # where a machine keeps its files is no part of the result
    assert "--cache" not in command
    assert report.main([str(out)]) == 0
    text = (out / "report.md").read_text()
    assert "| own | icl |" in text
    assert "python benchmarks/run.py" in text


def test_dry_run_shows_the_commands(place, tmp_path, capsys):
    assert (
        script("run").main(
            matrix(place, tmp_path / "out", "--dry-run", "--protocol", "single,batched", "--seed", "0,1")
        )
        == 0
    )
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 8
    assert "--protocol batched" in lines[2]
    assert "mine.icl.batched.seed1" in lines[-1]
    assert not (tmp_path / "out" / "command.txt").exists()


def test_cells_are_started_as_launch_says(place, tmp_path, capsys, monkeypatch):
    launch = ["--launch", "torchrun --standalone --nproc_per_node 2", "--dry-run"]
    assert script("run").main(matrix(place, tmp_path / "out", *launch)) == 0
    for line in capsys.readouterr().out.splitlines():
        assert line.startswith("torchrun --standalone --nproc_per_node 2 -m baft_intervention.cli evaluate ")
    monkeypatch.setenv("WORLD_SIZE", "2")  # as if run.py itself had been started so
    assert script("run").main(matrix(place, tmp_path / "out", "--dry-run")) == 2
    assert "run it as one process, with --launch" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--tasks", "zsrre"], "unknown task 'zsrre'; known tasks: "),
        (["--data-dir", "/nowhere"], "give the folder of the benchmark files"),
        (["--jobs", "0"], "--jobs is 0"),
    ],
)
def test_matrix_tells_bad_input(place, tmp_path, capsys, more, message):
    assert script("run").main(matrix(place, tmp_path, *more)) == 2
    assert message in capsys.readouterr().err


def test_a_task_file_with_an_unknown_field_is_told(place, tmp_path, capsys):
    path = tmp_path / "bad.yaml"
    path.write_text("data: facts.json\nlimmit: 3\n")
    assert script("run").main(matrix(place, tmp_path, "--tasks", str(path))) == 2
    assert "unknown field 'limmit'" in capsys.readouterr().err


def test_report_of_an_empty_folder_is_told(tmp_path, capsys):
    assert script("report").main([str(tmp_path)]) == 2
    assert "no summary.json" in capsys.readouterr().err


@pytest.mark.parametrize("path", sorted((HERE / "tasks").glob("*.yaml")), ids=lambda p: p.stem)
def test_every_shipped_task_reads_its_file(path, data_dir):
    task = script("run").read_task(path.stem)
    unrelated = data_dir / task["unrelated"] if "unrelated" in task else None
    if not (data_dir / task["data"]).is_file():
        pytest.skip(f"{task['data']} is not in {data_dir}")
    data = load_requests(
        data_dir / task["data"], task.get("task"), limit=2, unrelated=unrelated, **task.get("options", {})
    )
    assert len(data) >= 2
    assert unrelated is None or all(r.probes_of("unrelated") for r in data.requests)


@pytest.mark.parametrize("path", sorted((HERE / "methods").glob("*.yaml")), ids=lambda p: p.stem)
def test_every_shipped_method_says_what_it_is(path):
    data = yaml.safe_load(path.read_text())
    method = make_method(data["method"], data.get("settings"))
    assert type(method).__doc__
    assert path.read_text().startswith("#")  # how its settings were chosen


def test_speed_measurement_finds_equal_values():
    model, tokenizer = tiny_model(), tiny_tokenizer()
    method = make_method("ft-m", {"layer": 2, "steps": 2})
    found = script("speed_evaluation").measure(model, tokenizer, method, make_requests(3))
    assert found["argmax tokens that differ"] == 0
    assert found["largest difference of a value"] < 1e-3
    assert found["records"] == 3
    assert found["ratio"] > 0


def test_sweep_prints_a_row_a_combination(tmp_path, capsys, monkeypatch):
    sweep = script("sweep")
    record = {
        "prompt": "He works as",
        "target_new": "Leo",
        "rephrase": ["He is"],
        "unrelated": [{"prompt": "Who?", "answers": ["Leo"]}],
    }
    (tmp_path / "facts.json").write_text(json.dumps([record, record | {"prompt": "He was"}]))
    monkeypatch.setattr(sweep, "PARTS", {"zsre": ("facts.json", "own")})
    monkeypatch.setattr(sweep, "load_model", lambda name: (tiny_model(), tiny_tokenizer()))
    monkeypatch.setenv("BAFT_CACHE", str(tmp_path / "cache"))
    argv = [
        "--method",
        "ft-m",
        "--grid",
        "layer=1,2",
        "--grid",
        "learning_rate=1e-3",
        "--parts",
        "zsre",
        "--data-dir",
        str(tmp_path),
        "--n",
        "2",
    ]
    assert sweep.main(argv) == 0
    rows = [x for x in capsys.readouterr().out.splitlines() if x.startswith("| layer")]
    assert len(rows) == 2
    assert "learning_rate 0.001" in rows[0]
    assert sweep.main(["--method", "lorra", "--data-dir", str(tmp_path), "--parts", "zsre"]) == 2


def facts_file(path, subjects):
    path.parent.mkdir(parents=True, exist_ok=True)
    facts = [{"prompt": f"{s} works as", "target_new": "Leo", "subject": s} for s in subjects]
    path.write_text(json.dumps(facts))


def test_a_sweep_on_a_test_file_fails(tmp_path, capsys, monkeypatch):
    sweep = script("sweep")
    facts_file(tmp_path / "counterfact-edit.json", "ABC")
    monkeypatch.setattr(sweep, "PARTS", {"counterfact": ("counterfact-edit.json", "own")})
    monkeypatch.setattr(sweep, "load_model", lambda name: pytest.fail("the model is loaded"))
    assert sweep.main(["--method", "ft-m", "--parts", "counterfact", "--data-dir", str(tmp_path)]) == 2
    assert "counterfact-edit.json is test data and must not be used for choosing settings" in capsys.readouterr().err


def test_a_sweep_leaves_out_what_the_test_files_share(tmp_path, monkeypatch):
    sweep = script("sweep")
    facts_file(tmp_path / "train.json", "ABCD")
    facts_file(tmp_path / "test.json", ["B", "X", "d"])  # subjects are compared without case
    monkeypatch.setattr(sweep, "PARTS", {"zsre": ("train.json", "own")})
    monkeypatch.setattr(sweep, "TESTS", {"zsre": ("test.json", "absent.json")})
    args = argparse.Namespace(data_dir=tmp_path, n=10, seed=1)
    assert [r.subject for r in sweep.load_part(args, "zsre")] == ["A", "C"]


def test_no_part_of_a_search_is_a_test_file():
    sweep = script("sweep")
    refuse_test_files(path for path, _ in sweep.PARTS.values())
    assert {split_of(path) for paths in sweep.TESTS.values() for path in paths} == {"test"}
    assert set(sweep.TESTS) == set(sweep.PARTS)
