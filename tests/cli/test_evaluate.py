"""``baft evaluate``: files, exit codes, messages, and runs that the operating system kills."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from baft_intervention.cli.main import main
from baft_intervention.errors import StoreError
from baft_intervention.storage.locking import FolderLock
from evaluation.helpers import FACTS
from tiny import tiny_model, tiny_tokenizer

ROOT = Path(__file__).resolve().parents[2]
SHORT_KEYS = [
    *("method", "task", "protocol", "n", "reliability", "generality", "locality", "unrelated", "portability"),
    *("generation_em", "fluency", "seconds_per_edit", "trained_parameters", "peak_memory_mib"),
]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a tiny model, data in KnowEdit's form and unrelated questions."""
    folder = tmp_path_factory.mktemp("place")
    tiny_model().save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    records = [
        {
            "subject": subject or "He",
            "prompt": prompt,
            "target_new": target,
            "ground_truth": list(true) or ["nobody"],
            "rephrase_prompt": f"So: {prompt}",
            "portability": {"Reasoning": [{"prompt": f"And {prompt}", "ground_truth": [target]}]},
            "locality": {"Relation_Specificity": [{"prompt": "The capital of France is", "ground_truth": ["Paris"]}]},
        }
        for prompt, target, subject, true in FACTS
    ]
    (folder / "data.json").write_text(json.dumps(records))
    questions = [
        {"prompt": f"what is the name of {name}", "answer": "French"} for name in ("leo", "paris", "london", "rome")
    ]
    (folder / "unrelated.json").write_text(json.dumps(questions))
    return folder


def command(words):
    """``baft evaluate`` in this process."""
    return main(["evaluate", *words])


def words(place, out, *more, method="ft-m"):
    settings = ["--set", "layer=2", "--set", "steps=3"] if method == "ft-m" else []
    return [
        "--data", str(place / "data.json"), "--model", str(place / "model"), "--method", method, "--out", str(out),
        "--cache", "none", "--fluency-tokens", "6", "--quiet", *settings, *more,
    ]  # fmt: skip


def test_a_run_writes_its_files_and_summary(place, tmp_path, capsys):
    out = tmp_path / "out"
    unrelated = ["--unrelated", str(place / "unrelated.json"), "--unrelated-per-record", "1"]
    assert command(words(place, out, "--task", "zsre", "--limit", "4", "--json", *unrelated)) == 0
    shown = json.loads(capsys.readouterr().out)
    assert sorted(p.name for p in out.iterdir()) == ["records.jsonl", "run.json", "summary.json", "timings.jsonl"]
    summary = json.loads((out / "summary.json").read_text())
    assert shown == summary
    assert list(summary)[: len(SHORT_KEYS)] == SHORT_KEYS
    assert (summary["method"], summary["task"], summary["protocol"], summary["n"]) == ("ft-m", "zsre", "single", 4)
    assert all(summary[k] is not None for k in SHORT_KEYS if k != "fluency")
    assert summary["failed"] == 0
    assert summary["metrics"]["reliability"]["n"] == 4
    assert summary["metrics"]["unrelated"]["mean"] == summary["unrelated"]
    run = summary["run"]
    assert run["settings"]["layer"] == 2
    assert len(run["data_sha256"]) == len(run["fingerprint"]) == 64
    assert run["data"] == "data.json"
    assert run["model"] == "model"
    assert run["versions"]["torch"]
    assert str(place) not in json.dumps(summary)  # results are the same wherever the files lie
    costs = summary["costs"]
    assert costs["seconds_per_edit"] > 0
    assert costs["score_seconds_per_record"] > 0
    assert costs["adapter_bytes"] == 4 * costs["trained_parameters"]
    assert summary["machine"]["threads"] >= 1


def test_a_finished_run_is_left_alone_and_fresh_runs_it_again(place, tmp_path):
    out = tmp_path / "out"
    more = ["--limit", "2", "--no-answers"]
    assert command(words(place, out, *more)) == 0
    stamp = (out / "summary.json").stat().st_mtime_ns
    records = (out / "records.jsonl").read_bytes()
    assert command(words(place, out, *more)) == 0
    assert (out / "summary.json").stat().st_mtime_ns == stamp
    assert command(words(place, out, *more, "--fresh")) == 0
    assert (out / "summary.json").stat().st_mtime_ns != stamp
    assert (out / "records.jsonl").read_bytes() == records


def test_sequential_runs_have_a_table_for_each_checkpoint(place, tmp_path):
    out = tmp_path / "out"
    assert command(words(place, out, "--protocol", "sequential_final", "--checkpoints", "1,3", "--no-answers")) == 0
    summary = json.loads((out / "summary.json").read_text())
    assert list(summary["checkpoints"]) == ["1", "3", "6"]
    assert summary["n"] == 6
    assert summary["reliability"] == summary["checkpoints"]["6"]["reliability"]["mean"]


def test_base_and_icl_have_no_cost(place, tmp_path, capsys):
    for method in ("base", "icl"):
        out = tmp_path / method
        assert command(words(place, out, "--limit", "1", method=method)) == 0
        assert json.loads((out / "summary.json").read_text())["trained_parameters"] == 0
    assert "reliability" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--data", "nothing.json"], "nothing.json"),
        (["--task", "zsrre"], "unknown task 'zsrre'"),
        (["--method", "lorra"], "did you mean 'lora'"),
        (["--method", "nothing.yaml"], "nothing.yaml"),
        (["--set", "rang=1"], "has no setting 'rang'"),
        (["--set", "rank"], "must be NAME=VALUE"),
        (["--protocol", "serial"], "must be one of single"),
        (["--option", "nothing=1"], "no option 'nothing'"),
        (["--model", "./nothing"], "nothing"),
    ],
)
def test_bad_input_ends_with_2_and_says_why(place, tmp_path, capsys, more, message):
    argv = words(place, tmp_path / "out", method="base")
    for flag, value in zip(more[::2], more[1::2], strict=True):
        if flag in argv and flag not in ("--set", "--option"):
            argv[argv.index(flag) + 1] = value
        else:
            argv += [flag, value]
    assert command(argv) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("baft: error: ")
    assert "Traceback" not in error
    assert not (tmp_path / "out" / "records.jsonl").exists()


def test_a_malformed_record_is_told_or_skipped(place, tmp_path, capsys):
    records = json.loads((place / "data.json").read_text())
    records[1]["target_new"] = ""
    path = tmp_path / "bad.json"
    path.write_text(json.dumps(records))
    argv = words(place, tmp_path / "out", "--no-answers", method="base")
    argv[argv.index("--data") + 1] = str(path)
    assert command(argv) == 2
    assert "record 1" in capsys.readouterr().err
    assert command([*argv, "--skip-bad"]) == 0
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert (summary["n"], summary["run"]["skipped"]) == (5, 1)


def test_results_of_other_settings_are_not_mixed(place, tmp_path, capsys):
    out = tmp_path / "out"
    assert command(words(place, out, "--limit", "1", method="base")) == 0
    assert command(words(place, out, "--limit", "2", method="base")) == 2
    assert "belongs to another run: options was" in capsys.readouterr().err
    (out / "summary.json").unlink()
    assert command(words(place, out, "--limit", "2", method="base")) == 2
    assert "give another --out, or --fresh" in capsys.readouterr().err


def test_fresh_does_not_delete_what_it_did_not_write(place, tmp_path, capsys):
    (tmp_path / "thesis.tex").write_text("years of work")
    assert command(words(place, tmp_path, "--fresh", method="base")) == 2
    assert "thesis.tex" in capsys.readouterr().err
    assert (tmp_path / "thesis.tex").exists()


def test_fresh_deletes_nothing_while_another_process_writes(place, tmp_path, capsys):
    out = tmp_path / "out"
    assert command(words(place, out, "--limit", "1", "--no-answers", method="base")) == 0
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    hold = (
        "import sys; from pathlib import Path; from baft_intervention.storage.locking import FolderLock\n"
        "lock = FolderLock(Path(sys.argv[1]), 'lock'); print('locked', flush=True); sys.stdin.read()"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        [sys.executable, "-c", hold, out], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as writer:
        assert writer.stdout.readline() == b"locked\n"
        assert command(words(place, out, "--limit", "1", "--no-answers", "--fresh", method="base")) == 2
        assert f"is open for writing in process {writer.pid}" in capsys.readouterr().err
        assert {p.name: p.read_bytes() for p in out.iterdir() if p.name != "lock"} == before
        writer.stdin.close()
    assert command(words(place, out, "--limit", "1", "--no-answers", "--fresh", method="base")) == 0
    assert "lock" not in {p.name for p in out.iterdir()}


def test_the_lock_is_removed_before_it_is_released(place, tmp_path, monkeypatch):
    """Removed after, it could be the lock of a process that took it in between."""
    real, held = os.unlink, []

    def unlink(path, **options):
        if str(path).endswith("lock"):
            with pytest.raises(StoreError, match="is open for writing"):
                FolderLock(tmp_path / "out", "lock")
            held.append(path)
        return real(path, **options)

    monkeypatch.setattr(os, "unlink", unlink)
    assert command(words(place, tmp_path / "out", "--limit", "1", "--no-answers", method="base")) == 0
    assert len(held) == 1


def test_out_that_is_a_file(place, tmp_path, capsys):
    (tmp_path / "out").write_text("")
    assert command(words(place, tmp_path / "out", method="base")) == 2
    assert "is a file" in capsys.readouterr().err


def test_numbers_that_are_none_are_told_by_the_parser(place, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        command(words(place, tmp_path, "--limit", "0"))
    assert stop.value.code == 2
    assert "'0' must be a whole number of at least 1" in capsys.readouterr().err


def test_numbers_with_an_exponent_are_numbers(place, tmp_path):
    out = tmp_path / "out"
    assert command(words(place, out, "--limit", "1", "--no-answers", "--set", "learning_rate=1e-3")) == 0
    assert json.loads((out / "run.json").read_text())["settings"]["learning_rate"] == 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("kills", [(2,), pytest.param((1, 2, 4), marks=pytest.mark.long)], ids=["once", "three times"])
def test_a_run_that_the_system_kills_gives_the_same_file(place, tmp_path, kills):
    """SIGKILL at random moments, in a process of its own; the same command again resumes."""
    rng = random.Random(5)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}

    def start(out):
        more = words(place, out, "--protocol", "sequential_immediate", "--threads", "1")
        argv = [sys.executable, "-m", "baft_intervention.cli", "evaluate", *more]
        return subprocess.Popen(argv, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)

    process = start(tmp_path / "whole")
    assert process.wait(200) == 0, process.stderr.read().decode()
    whole = (tmp_path / "whole" / "records.jsonl").read_bytes()
    out = tmp_path / "cut"
    path = out / "records.jsonl"
    killed = 0
    for lines in kills:
        process = start(out)
        while process.poll() is None:
            if path.is_file() and path.read_bytes().count(b"\n") >= lines:
                time.sleep(rng.random() * 0.02)
                process.send_signal(signal.SIGKILL)
                break
            time.sleep(0.002)
        killed += process.wait(200) == -signal.SIGKILL
    assert killed >= max(1, len(kills) - 1)  # the last may have been quicker
    process = start(out)
    assert process.wait(200) == 0, process.stderr.read().decode()
    assert path.read_bytes() == whole
