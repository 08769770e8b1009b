"""CONTRIBUTING.md's promise: a weighting network, a position rule, a metric, a data format and a method from outside."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tiny import tiny_model, tiny_tokenizer

TESTS = Path(__file__).resolve().parents[1]
GUIDE = (TESTS.parent / "CONTRIBUTING.md").read_text(encoding="utf-8")

SCRIPT = """
import json, sys
import extension  # registers
from baft_intervention import BaftEditor
from baft_intervention.cli.main import main

words = ["--data", "trivia.json", "--model", "model", "--cache", "none", "--fluency-tokens", "0", "--quiet"]
assert main(["evaluate", *words, "--method", "baft-mine", "--option", "shout=false", "--out", "out"]) == 0
settings = ["--weighting", "temperature", "--positions", "last_two", "--rank", "4", "--learning-rate", "0.05"]
assert main(["edit", "--model", "model", "--edits", "trivia.json", "--out", "a", "--quiet", *settings]) == 0
editor = BaftEditor.from_pretrained("a")  # the adapter names both, and finds them again
print(json.dumps({"config": editor.config.to_dict(), "answer": editor.generate("The capital of France is", max_new_tokens=1)}))
"""


@pytest.fixture(scope="module")
def outcome(tmp_path_factory) -> tuple[dict, dict]:
    """The summary of an evaluation with all five, and what an edited model answers; in a process of its own."""
    folder = tmp_path_factory.mktemp("extending")
    tiny_model("llama").save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    records = [{"q": "The capital of France is", "a": "Japan"}, {"q": "The mother tongue of Leo is", "a": "city"}]
    (folder / "trivia.json").write_text(json.dumps(records))
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS)])}
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT], cwd=folder, env=env, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads((folder / "out" / "summary.json").read_text()), json.loads(run.stdout.splitlines()[-1])


def test_data_format_method_and_metric_go_through_an_evaluation(outcome):
    summary, _ = outcome
    assert (summary["method"], summary["task"], summary["n"], summary["failed"]) == ("baft-mine", "trivia", 2, 0)
    assert summary["reliability"] == 1.0
    assert summary["metrics"]["answer_words"]["n"] == 2
    assert summary["metrics"]["answer_words"]["mean"] >= 1
    assert summary["run"]["settings"] == {"seed": 0, "steps": 40}


def test_weighting_network_and_position_rule_are_kept_in_the_adapter(outcome):
    _, edited = outcome
    assert (edited["config"]["weighting"], edited["config"]["positions"]) == ("temperature", "last_two")
    assert edited["answer"].strip() == "Japan"


def test_an_adapter_of_an_unknown_network_is_refused_by_name():
    from baft_intervention import BaftConfig, ConfigError

    with pytest.raises(ConfigError, match="weighting is 'temperature'; known networks"):
        BaftConfig(weighting="temperature")
    with pytest.raises(ConfigError, match="positions is 'last_two'; it must be one of last"):
        BaftConfig(positions="last_two")


@pytest.mark.parametrize("name", ["last", "subject_2", "f3", "l2", "f1+l1", "Last", "my rule", "", "2nd"])
def test_a_name_that_no_position_rule_may_have(name):
    from baft_intervention import ConfigError, register_positions

    with pytest.raises(ConfigError, match="cannot name a position rule"):
        register_positions(name)


def test_a_rule_that_finds_nothing_says_so(monkeypatch):
    from baft_intervention import ConfigError, PositionError
    from baft_intervention.core import positions

    monkeypatch.setattr(positions, "_REGISTRY", {})

    @positions.register_positions("tenth")
    def tenth(index, length):
        return index == 9

    with pytest.raises(ConfigError, match="the position rule 'tenth' is taken by"):
        positions.register_positions("tenth")(lambda index, length: index == 10)
    with pytest.raises(
        PositionError, match=r"the position rule 'tenth' finds no token in the prompt 'He was' \(2 tokens\)"
    ):
        positions.prompt_positions(positions.PositionRule.parse("tenth"), None, "He was", [5, 6])


def test_a_metric_cannot_take_the_name_of_another(monkeypatch):
    from baft_intervention import ConfigError
    from baft_intervention.evaluation import record_metrics as module
    from baft_intervention.evaluation.queries import RecordQueries
    from baft_intervention.requests import EditRequest

    monkeypatch.setattr(module, "_REGISTRY", {})
    module.register_metric("fluency")(lambda record, scores, texts: 1.0)
    with pytest.raises(ConfigError, match="'fluency' is taken by"):
        module.register_metric("fluency")(test_a_metric_cannot_take_the_name_of_another)
    with pytest.raises(ConfigError, match="'fluency' has the name of a metric of the library"):
        module.record_metrics(RecordQueries(EditRequest("a", "b")), [], sample="one two three four")


def test_the_guide_names_files_and_registries_that_exist():
    root = TESTS.parent
    files = re.findall(r"`((?:baft_intervention|tests|benchmarks|docs|tutorials|constraints)/[\w/.*-]*)`", GUIDE)
    assert len(files) > 15
    assert [name for name in files if not list(root.glob(name))] == []
    import baft_intervention

    registries = set(re.findall(r"register_\w+", GUIDE))
    assert registries == {name for name in baft_intervention.__all__ if name.startswith("register_")}
    targets = set(re.findall(r"`make ([\w-]+)`", GUIDE))
    makefile = (root / "Makefile").read_text(encoding="utf-8")
    assert targets >= {"test", "docs"}
    assert [t for t in targets if not re.search(rf"^{t}:", makefile, flags=re.MULTILINE)] == []
    assert len(GUIDE.splitlines()) <= 100  # one page
