"""The command line: what a person sees, what a machine reads, and that a failing command writes nothing."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from baft_intervention import __version__
from baft_intervention.cli import console
from baft_intervention.cli import main as cli
from baft_intervention.editor.editor import BaftEditor
from tiny import tiny_model, tiny_tokenizer

FRANCE = {"prompt": "The capital of France is", "target_new": "Japan", "subject": "France", "id": "france"}
LEO = {"prompt": "The mother tongue of Leo is", "target_new": "city", "subject": "Leo", "id": "leo"}


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A folder with a tiny model, settings for it, and files of edits."""
    home = tmp_path_factory.mktemp("cli")
    tiny_model("llama").save_pretrained(home / "model")
    tiny_tokenizer().save_pretrained(home / "model")
    (home / "config.yaml").write_text("rank: 4\nlearning_rate: 0.05\nsteps: 40\n")
    (home / "edits.json").write_text(json.dumps([FRANCE, LEO]))
    (home / "one.jsonl").write_text(json.dumps(FRANCE) + "\n")
    return home


@pytest.fixture(autouse=True)
def place(home, tmp_path, monkeypatch) -> Path:
    """Each test runs in a folder of its own; the bank is made once for the module."""
    monkeypatch.setenv("BAFT_CACHE", str(home / "cache"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


class Run:
    """One command's outcome."""

    def __init__(self, code: int, out: str, err: str):
        self.code, self.out, self.err = code, out, err

    @property
    def json(self) -> Any:
        return json.loads(self.out)


@pytest.fixture
def baft(capsys):
    """Runs a command in this process."""

    def run(*argv: object) -> Run:
        capsys.readouterr()
        try:
            code = cli.main([str(a) for a in argv])
        except SystemExit as stop:  # argparse
            code = int(stop.code or 0)
        return Run(code, *capsys.readouterr())

    return run


@pytest.fixture
def edit(baft, home):
    """``baft edit`` of the tiny model, with more arguments."""
    return lambda *more: baft("edit", "--model", home / "model", "--config", home / "config.yaml", *more)


@pytest.fixture
def adapter(edit, home, place) -> Path:
    assert edit("--edits", home / "edits.json", "--out", "adapter", "--quiet").code == 0
    return place / "adapter"


# ------------------------------------------------------------------------------------------ help


def test_help_is_quick_and_says_what_the_codes_mean():
    script = (
        "import sys; from baft_intervention.cli.main import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "print([name for name in ('torch', 'transformers', 'rich', 'numpy') if name in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert run.stdout.splitlines()[-1] == "[]"
    for command in cli.COMMANDS:
        assert f"    {command} " in run.stdout
    for code in ("0 ", "1 ", "2 ", "130 "):
        assert f"  {code}" in run.stdout


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_each_command_teaches_with_an_example(baft, command):
    run = baft(command, "--help")
    assert run.code == 0
    example = run.out.split("example:")[1]
    assert f"baft {command}" in example
    assert "exit codes:" in example
    assert "--json" in run.out


def test_no_command_shows_the_help_and_is_bad_input(baft):
    run = baft()
    assert (run.code, run.out) == (2, "")
    assert "start here:" in run.err


def test_version(baft):
    assert baft("--version").out.strip() == f"baft {__version__}"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["edti"], "invalid choice: 'edti'"),
        (["edit"], "required: --edits"),
        (
            ["edit", "--edits", "e.json", "--layers", "two"],
            "'two' must be block numbers separated by commas, e.g. 20,25",
        ),
        (["generate", "--max-new-tokens", "0"], "'0' must be a whole number of at least 1"),
        (["generate", "--temperature", "-1"], "must be a number above 0"),
        (["generate", "--top-p", "1.5"], "must be a number above 0, at most 1"),
    ],
)
def test_usage_errors(baft, argv, message):
    run = baft(*argv)
    assert (run.code, run.out) == (2, "")
    assert message in run.err


# ------------------------------------------------------------------------------------------ the round trip


def test_edit_list_generate_undo(baft, edit, home, place):
    run = edit("--edits", home / "edits.json", "--out", "adapter")
    assert run.code == 0
    assert FRANCE["prompt"] in run.out
    assert "2 edits in" in run.out
    assert "2 in adapter" in run.out

    run = baft("list", "--adapter", "adapter")
    assert run.code == 0
    assert "france" in run.out
    assert "2 edits of" in run.out

    run = baft("generate", "--adapter", "adapter", "--prompt", FRANCE["prompt"], "--prompt", "He was", "--compare")
    assert run.code == 0
    france, he = (next(line for line in run.out.splitlines() if p in line) for p in (FRANCE["prompt"], "He was"))
    assert "Japan" in france
    assert france.rstrip().endswith("changed")
    assert he.rstrip().endswith("same")

    run = baft("undo", "--adapter", "adapter", "france")
    assert run.code == 0
    assert "1 undone, 1 left in adapter" in run.out
    assert "france" not in baft("list", "--adapter", "adapter").out
    assert baft("generate", "--adapter", "adapter", "--prompt", FRANCE["prompt"], "--compare", "--json").json[
        "results"
    ][0]["same"]
    assert sorted(p.name for p in place.iterdir()) == ["adapter"]


def test_json_is_all_that_stdout_gets(baft, edit, home):
    run = edit("--edits", home / "edits.json", "--out", "adapter", "--json")
    assert run.code == 0
    assert [e["id"] for e in run.json["edits"]] == ["france", "leo"]
    assert all(e["reached"] for e in run.json["edits"])
    assert run.json["settings"]["rank"] == 4
    answer = run.json["answers"][0]
    assert answer["after"].strip().startswith("Japan")
    assert not answer["before"].strip().startswith("Japan")

    listed = baft("list", "--adapter", "adapter", "--json").json
    assert [e["id"] for e in listed["edits"]] == ["france", "leo"]
    asked = baft(
        "generate", "--adapter", "adapter", "--prompt", FRANCE["prompt"], "--max-new-tokens", 12, "--json"
    ).json
    assert asked["results"] == [{"prompt": FRANCE["prompt"], "texts": [answer["after"]]}]
    undone = baft("undo", "--adapter", "adapter", "--all", "--json").json
    assert ([e["id"] for e in undone["undone"]], undone["left"]) == (["france", "leo"], [])
    checked = baft("validate", home / "edits.json", "--json").json
    assert checked["ok"] is True
    assert checked["records"] == 2


def test_the_command_line_writes_the_bytes_that_the_library_writes(adapter, home, place):
    from baft_intervention import BaftConfig, load_requests

    editor = BaftEditor.from_pretrained(home / "model", BaftConfig.from_file(home / "config.yaml"))
    editor.edit(load_requests(home / "edits.json").requests)
    editor.save_pretrained(place / "library")
    assert (adapter / "adapter.safetensors").read_bytes() == (place / "library" / "adapter.safetensors").read_bytes()


def test_options_come_before_the_file_of_settings(edit, home):
    options = ("--rank", 2, "--layers", "-1,1", "--weighting", "constant", "--steps", 7)
    options += ("--learning-rate", 0.5, "--seed", 3)
    run = edit("--edits", home / "one.jsonl", "--out", "a", *options, "--positions", "prompt", "--json")
    assert run.code in (0, 1)
    found = run.json["settings"]
    assert (found["rank"], found["layers"], found["weighting"], found["steps"]) == (2, [-1, 1], "constant", 7)
    assert (found["learning_rate"], found["seed"], found["positions"]) == (0.5, 3, "prompt")


def test_an_adapter_is_continued_in_place_or_elsewhere(baft, edit, home, place):
    assert edit("--edits", home / "one.jsonl", "--out", "a").code == 0
    (place / "leo.csv").write_text("prompt,target_new,id\nThe mother tongue of Leo is,city,leo\n")
    run = baft("edit", "--adapter", "a", "--edits", "leo.csv", "--out", "b", "--json")
    assert (run.code, run.json["edits_in_adapter"], run.json["adapter"]) == (0, 2, "b")
    assert baft("edit", "--adapter", "a", "--edits", "leo.csv", "--steps", 60).code == 0
    for name in ("a", "b"):
        assert [e["id"] for e in baft("list", "--adapter", name, "--json").json["edits"]] == ["france", "leo"]
    run = baft("edit", "--adapter", "a", "--edits", "leo.csv", "--rank", 3)
    assert run.code == 2
    assert "--rank does not fit a, whose edits were made with rank = 4" in run.err
    assert baft("edit", "--adapter", "a", "--edits", "leo.csv", "--config", home / "config.yaml").code == 2


def test_a_base_model_that_was_moved_is_named_with_model(baft, adapter, home, place):
    tiny_model("llama").save_pretrained(place / "moved")
    tiny_tokenizer().save_pretrained(place / "moved")
    run = baft("generate", "--adapter", adapter, "--model", place / "moved", "--prompt", FRANCE["prompt"], "--json")
    assert run.json["results"][0]["texts"][0].strip().startswith("Japan")
    tiny_model("llama", seed=1).save_pretrained(place / "other")
    tiny_tokenizer().save_pretrained(place / "other")
    run = baft("generate", "--adapter", adapter, "--model", place / "other", "--prompt", FRANCE["prompt"])
    assert run.code == 2
    assert "weights differ" in run.err


# ------------------------------------------------------------------------------------------ many edits, several folders


@pytest.fixture
def osaka(edit, place) -> Path:
    """Another adapter: another answer to one prompt, the same to another, and one of its own."""
    own = {"prompt": "The Eiffel Tower is located in", "target_new": "capital", "id": "france"}
    lines = [json.dumps({**FRANCE, "target_new": "city", "id": "other"}), json.dumps(LEO), json.dumps(own)]
    (place / "osaka.jsonl").write_text("\n".join(lines))
    assert edit("--edits", "osaka.jsonl", "--out", "osaka", "--quiet").code == 0
    return place / "osaka"


def test_list_finds_among_many(baft, adapter):
    for text, found in (("japan", ["france"]), ("LEO", ["leo"]), ("the ", ["france", "leo"]), ("rome", [])):
        run = baft("list", "--adapter", adapter, "--find", text, "--json")
        assert [e["id"] for e in run.json["edits"]] == found
        assert run.json["edits_in_adapter"] == 2
    assert "1 of 2 edits of" in baft("list", "--adapter", adapter, "--find", "leo").out


def test_merge_tells_conflicts_and_keeps_whose_it_is_told(baft, adapter, osaka, place):
    before = {p.name: p.read_bytes() for p in adapter.iterdir()}
    run = baft("merge", "--adapter", adapter, osaka)
    assert (run.code, run.out) == (2, "")
    assert "1 prompt has two answers, e.g. 'The capital of France is': ours 'Japan', theirs 'city'" in run.err
    assert {p.name: p.read_bytes() for p in adapter.iterdir()} == before
    for whose, answer, listed in (
        ("ours", "Japan", ["france", "leo", "france-2"]),
        ("theirs", "city", ["leo", "other", "france"]),
    ):
        run = baft("merge", "--adapter", adapter, osaka, "--out", whose, "--on-conflict", whose, "--json")
        assert run.code == 0
        assert (len(run.json["added"]), run.json["same"], len(run.json["conflicts"])) == (
            len(listed) - 2 + (whose == "theirs"),
            ["leo"],
            1,
        )
        assert [e["id"] for e in baft("list", "--adapter", whose, "--json").json["edits"]] == listed
        asked = baft("generate", "--adapter", whose, "--prompt", FRANCE["prompt"], "--max-new-tokens", 1, "--json")
        assert asked.json["results"][0]["texts"][0].strip() == answer
        assert sorted(p.name for p in (place / whose).iterdir()) == ["adapter.json", "adapter.safetensors"]
    assert {p.name: p.read_bytes() for p in adapter.iterdir()} == before
    run = baft("merge", "--adapter", adapter, osaka, "--on-conflict", "theirs")
    assert run.code == 0
    assert "2 edits added, 1 already there, 1 conflicts; 3 in" in run.out
    assert "already holds an adapter" in baft("merge", "--adapter", adapter, osaka, "--out", "ours").err


def test_finished_edits_are_on_the_disk_whatever_comes_after(baft, edit, home, place, monkeypatch):
    def fail(*_args, **_kwargs):
        raise RuntimeError("the machine burns")

    monkeypatch.setattr(BaftEditor, "compact", fail)
    run = edit("--edits", home / "edits.json", "--out", "a")
    assert run.code == 1
    assert "the machine burns" in run.err
    assert [e["id"] for e in baft("list", "--adapter", "a", "--json").json["edits"]] == ["france", "leo"]
    monkeypatch.undo()
    monkeypatch.chdir(place)
    assert baft("undo", "--adapter", "a", "leo").code == 0
    assert [e["id"] for e in baft("list", "--adapter", "a", "--json").json["edits"]] == ["france"]


def test_a_folder_that_is_being_written_to_is_bad_input_that_names_the_writer(baft, adapter, home):
    import os

    from baft_intervention.storage.working_store import Store

    with Store(adapter):
        for argv in (
            ["undo", "--adapter", adapter, "leo"],
            ["edit", "--adapter", adapter, "--edits", home / "one.jsonl"],
        ):
            run = baft(*argv)
            assert run.code == 2
            assert f"is open for writing in process {os.getpid()}" in run.err
        assert baft("list", "--adapter", adapter).code == 0
    assert baft("undo", "--adapter", adapter, "leo").code == 0


def test_recover_copies_what_is_whole(baft, edit, home, place, monkeypatch):
    monkeypatch.setattr(BaftEditor, "compact", lambda _self: None)
    assert edit("--edits", home / "edits.json", "--out", "a").code == 0
    log = place / "a" / "adapter.log"
    data = bytearray(log.read_bytes())
    data[-100] ^= 1
    log.write_bytes(bytes(data))
    run = baft("list", "--adapter", "a")
    assert run.code == 2
    assert "record 2, from byte" in run.err
    assert "baft recover --adapter a --out NEW" in run.err
    assert baft("edit", "--adapter", "a", "--edits", home / "one.jsonl").code == 2
    run = baft("recover", "--adapter", "a", "--out", "b")
    assert run.code == 0
    assert "1 intact edits are in b; a is unchanged" in run.out
    assert "the changes it held are lost" in run.err
    assert log.read_bytes() == bytes(data)
    assert [e["id"] for e in baft("list", "--adapter", "b", "--json").json["edits"]] == ["france"]
    asked = baft("generate", "--adapter", "b", "--prompt", FRANCE["prompt"], "--max-new-tokens", 1, "--json")
    assert asked.json["results"][0]["texts"][0].strip() == "Japan"
    assert baft("recover", "--adapter", "a", "--out", "b").code == 2


# ------------------------------------------------------------------------------------------ asking


def test_prompts_come_from_a_file_and_from_standard_input(baft, adapter, place, monkeypatch):
    (place / "prompts.txt").write_bytes("\ufeffHe was\r\n\r\nThe capital of France is\n".encode())
    from_file = baft("generate", "--adapter", adapter, "--prompts", "prompts.txt", "--json").json["results"]
    assert [result["prompt"] for result in from_file] == ["He was", "The capital of France is"]
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"He was\nThe capital of France is\n")))
    assert baft("generate", "--adapter", adapter, "--json").json["results"] == from_file


def test_sampling_is_seeded_and_counts_answers(baft, home):
    command = ("generate", "--model", home / "model", "--prompt", "He was", "--sample", "--count", 3, "--json")
    texts = [baft(*command, "--seed", seed).json["results"][0]["texts"] for seed in (0, 0, 1)]
    assert texts[0] == texts[1] != texts[2]
    assert len(texts[0]) == 3
    assert len(set(texts[0])) > 1
    cold = baft(*command, "--temperature", "0.0001").json["results"][0]["texts"]
    assert len(set(cold)) == 1
    narrow = baft(*command, "--top-p", "0.000001").json["results"][0]["texts"]
    assert narrow == cold
    beams = baft("generate", "--model", home / "model", "--prompt", "He was", "--beams", 3, "--count", 2, "--json")
    assert len(beams.json["results"][0]["texts"]) == 2


def test_what_a_model_writes_cannot_reach_the_terminal(capsys):
    console.Output().table(("a", ""), [("[red]x[/red]\n\n\x1b[2Jy :smile:", "ok")], mark=1)
    out = capsys.readouterr().out
    assert "[red]x[/red]⏎�[2Jy :smile:" in out
    assert "\x1b" not in out


# ------------------------------------------------------------------------------------------ errors

BAD_FILES = {
    "no-json.json": ('[{"prompt": "a is"', 'no-json.json, line 1, column 19: not valid JSON'),
    "cut.jsonl": (json.dumps(FRANCE) + '\n{"prompt": "a is", "target_new"\n', "cut.jsonl, line 2: column 32: not valid JSON"),
    "missing.jsonl": (json.dumps(FRANCE) + '\n\n{"prompt": "a is"}\n', "missing.jsonl, line 3: field 'target_new' is missing"),
    "empty.jsonl": ('{"prompt": "a is", "target_new": " "}\n', "empty.jsonl, line 1: field 'target_new'"),
    "number.json": ('[{"prompt": "a is", "target_new": {"a": 1}}]', "number.json, record 0: field 'target_new'"),
    "word.json": ('[{"prompt": "a is", "target_new": "b", "sbject": "a"}]', "record 0: field 'sbject' is unknown"),
    "cells.csv": ("prompt,target_new\na is,b\nc is,d,e\n", "cells.csv, line 3: 3 cells, but 2 columns"),
    "nothing.json": ("", "nothing.json is empty"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_malformed_file_is_told_with_line_and_field_and_nothing_is_written(edit, place, name):
    text, message = BAD_FILES[name]
    (place / name).write_text(text)
    run = edit("--edits", name, "--out", "adapter")
    assert (run.code, run.out) == (2, "")
    assert message in run.err
    assert run.err.count("\n") == 1  # one readable line
    assert [p.name for p in place.iterdir()] == [name]


ERRORS = {
    "no file": (["--edits", "nowhere.json", "--out", "a"], "nowhere.json: no such file"),
    "no out": (["--edits", "{home}/edits.json"], "give --out DIR"),
    "layer": (["--edits", "{home}/edits.json", "--out", "a", "--layers", "9"], "layers has 9; this model has blocks 0 to 3"),
    "rank": (["--edits", "{home}/edits.json", "--out", "a", "--rank", "33"], "rank is 33, but the model's hidden size is 32"),
    "no rank": (["--edits", "{home}/edits.json", "--out", "a", "--rank", "0"], "rank is 0; it must be"),
    "weighting": (["--edits", "{home}/edits.json", "--out", "a", "--weighting", "magic"], "weighting is 'magic'; known networks:"),
    "positions": (["--edits", "{home}/edits.json", "--out", "a", "--positions", "first"], "positions is 'first'; it must be"),
    "out is a file": (["--edits", "{home}/edits.json", "--out", "{home}/edits.json"], "is a file; give the name of a folder"),
    "out is not empty": (["--edits", "{home}/edits.json", "--out", "{home}"], "is not empty and holds no adapter"),
    "device": (["--edits", "{home}/edits.json", "--out", "a", "--device", "toaster"], "device 'toaster' is unknown"),
    "adapter": (["--edits", "{home}/edits.json", "--adapter", "a"], "there is no adapter folder a"),
}  # fmt: skip


@pytest.mark.parametrize("name", ERRORS)
def test_bad_input_is_one_line_and_code_2_and_nothing_is_written(baft, home, place, name):
    argv, message = ERRORS[name]
    argv = [part.format(home=home) for part in argv]
    run = baft("edit", "--model", home / "model", *argv)
    assert (run.code, run.out) == (2, "")
    assert run.err.startswith("baft: error: ")
    assert message in run.err
    assert run.err.count("\n") == 1
    assert list(place.iterdir()) == []


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["generate", "--prompt", "x"], "give --adapter DIR (an edited model) or --model M"),
        (["generate", "--adapter", "nowhere", "--prompt", "x"], "there is no adapter folder nowhere"),
        (["generate", "--model", "./nowhere", "--prompt", "x"], "is not a folder and cannot be a hub id"),
        (["generate", "--model", "{home}/model", "--prompt", " "], "a prompt is empty"),
        (["generate", "--model", "{home}/model", "--prompt", "\udc80"], "is not UTF-8 text"),
        (["generate", "--model", "{home}/model", "--prompts", "none.txt"], "none.txt: cannot be read: No such file"),
        (["generate", "--model", "{home}/model", "--prompt", "x", "--compare"], "it needs --adapter"),
        (["generate", "--model", "{home}/model", "--prompt", "x", "--top-p", "0.5"], "give --sample with them"),
        (["generate", "--model", "{home}/model", "--prompt", "x", "--count", "2"], "need --sample, or --beams"),
        (["list", "--adapter", "{home}/model"], "has no adapter.json"),
        (["undo", "--adapter", "a"], "give the ids of the edits to undo"),
        (["validate", "nowhere.json"], ""),
    ],
)
def test_bad_input_of_other_commands(baft, home, argv, message):
    run = baft(*(part.format(home=home) for part in argv))
    assert run.code == 2
    assert message in run.err
    assert "Traceback" not in run.err


def test_undo_of_an_unknown_id_names_the_known_and_leaves_the_adapter(baft, adapter):
    before = {p.name: p.read_bytes() for p in adapter.iterdir()}
    run = baft("undo", "--adapter", adapter, "france", "paris")
    assert run.code == 2
    assert "there is no edit 'paris'; edits: france, leo" in run.err
    assert {p.name: p.read_bytes() for p in adapter.iterdir()} == before


def test_an_adapter_is_not_overwritten_unless_asked(edit, adapter, home):
    before = {p.name: p.read_bytes() for p in adapter.iterdir()}
    run = edit("--edits", home / "one.jsonl", "--out", adapter)
    assert run.code == 2
    assert f"--adapter {adapter} to add to it, or --overwrite to replace it" in run.err
    assert {p.name: p.read_bytes() for p in adapter.iterdir()} == before
    run = edit("--edits", home / "one.jsonl", "--out", adapter, "--overwrite", "--json")
    assert (run.code, run.json["edits_in_adapter"]) == (0, 1)


def test_an_error_is_json_too_where_asked_and_a_traceback_where_asked(edit):
    run = edit("--edits", "nowhere.json", "--out", "a", "--json")
    assert run.json["exit_code"] == run.code == 2
    assert run.json["type"] == "DataError"
    assert "nowhere.json: no such file" in run.json["error"]
    run = edit("--edits", "nowhere.json", "--out", "a", "--debug")
    assert run.code == 2
    assert "Traceback" in run.err
    assert run.err.splitlines()[-1].startswith("baft: error: nowhere.json")


def test_skip_bad_leaves_out_what_cannot_be_used_and_says_which(edit, place):
    lines = [
        json.dumps(FRANCE),
        '{"prompt": "a is"}',
        json.dumps({**FRANCE, "id": "again"}),
        json.dumps({**LEO, "subject": "Ann"}),
    ]
    (place / "mixed.jsonl").write_text("\n".join(lines))
    run = edit("--edits", "mixed.jsonl", "--out", "a", "--skip-bad", "--json", "--steps", 5)
    assert run.code in (0, 1)
    assert [e["id"] for e in run.json["edits"]] == ["france"]
    skipped = run.json["skipped"]
    assert [
        ("line 2" in skipped[0]),
        ("an earlier request" in skipped[1]),
        ("'Ann' is not in the prompt" in skipped[2]),
    ] == [True] * 3
    assert all(text in run.err for text in skipped)
    (place / "all-bad.jsonl").write_text(json.dumps({**LEO, "subject": "Ann"}))
    run = edit("--edits", "all-bad.jsonl", "--out", "b", "--positions", "subject", "--skip-bad")
    assert run.code == 2
    assert not (place / "b").exists()


def test_validate_says_where_and_is_code_2(baft, home, place):
    (place / "bad.jsonl").write_text(json.dumps(FRANCE) + '\n{"prompt": "a is"}\n')
    run = baft("validate", "bad.jsonl", home / "edits.json")
    assert run.code == 2
    assert "bad.jsonl, line 2: field 'target_new' is missing" in run.out


# ------------------------------------------------------------------------------------------ failures


def test_an_edit_that_cannot_be_trained_is_code_1_and_writes_nothing(baft, home, place):
    import torch
    from safetensors.torch import load_file, save_file

    for file in (home / "model").iterdir():
        (place / "poisoned").mkdir(exist_ok=True)
        (place / "poisoned" / file.name).write_bytes(file.read_bytes())
    weights = {n: t.clone() for n, t in load_file(place / "poisoned" / "model.safetensors").items()}
    weights["model.norm.weight"][0] = torch.nan
    save_file(weights, place / "poisoned" / "model.safetensors", metadata={"format": "pt"})
    argv = (
        "--model",
        place / "poisoned",
        "--edits",
        home / "edits.json",
        "--out",
        "a",
        "--weighting",
        "constant",
        "--show",
        0,
    )
    run = baft("edit", *argv)
    assert (run.code, run.out) == (1, "")
    assert "edit 'france' ('The capital of France is'): the loss is nan at step 0; nothing was changed" in run.err
    assert not (place / "a").exists()


def test_an_edit_that_misses_its_target_is_code_1_and_says_so(edit, home):
    run = edit("--edits", home / "edits.json", "--out", "a", "--steps", 1, "--learning-rate", "1e-6")
    assert run.code == 1
    assert "missed" in run.out
    assert "2 edits do not give the whole target yet; raise --steps or --rank" in run.out


def test_an_interrupt_saves_the_finished_edits_and_is_code_130(baft, edit, home, place, monkeypatch):
    real = BaftEditor.edit

    def interrupted(self, requests, **options):
        real(self, requests[:1], **options)
        raise KeyboardInterrupt

    monkeypatch.setattr(BaftEditor, "edit", interrupted)
    run = edit("--edits", home / "edits.json", "--out", "a")
    assert run.code == 130
    assert "interrupted: 1 of 2 edits are finished and saved in a" in run.err
    assert [e["id"] for e in baft("list", "--adapter", "a", "--json").json["edits"]] == ["france"]

    def at_once(self, requests, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(BaftEditor, "edit", at_once)
    run = edit("--edits", home / "edits.json", "--out", "b")
    assert run.code == 130
    assert "nothing was written" in run.err
    assert not (place / "b").exists()


def test_what_nobody_foresaw_is_one_line_and_code_1(baft, adapter, monkeypatch):
    def fail(*_args, **_kwargs):
        raise RuntimeError("CUDA out of memory")

    monkeypatch.setattr(BaftEditor, "generate", fail)
    run = baft("generate", "--adapter", adapter, "--prompt", "x")
    assert run.code == 1
    assert "unexpected RuntimeError: CUDA out of memory (run again with --debug for the traceback)" in run.err
    assert "Traceback" not in run.err


def test_a_full_disk_is_code_1(edit, home, monkeypatch):
    import os

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    run = edit("--edits", home / "one.jsonl", "--out", "a", "--show", 0)
    assert run.code == 1
    assert "cannot be written to a" in run.err


@pytest.mark.slow
def test_as_a_program(home, adapter):
    """The real process: pure JSON on stdout, its exit code, and a reader that goes away."""
    command = [sys.executable, "-m", "baft_intervention.cli"]
    run = subprocess.run(
        [*command, "generate", "--adapter", str(adapter), "--prompt", FRANCE["prompt"], "--json"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0
    assert json.loads(run.stdout)["results"][0]["texts"][0].strip().startswith("Japan")
    assert subprocess.run([*command, "list", "--adapter", "no"], capture_output=True, check=False).returncode == 2
    with subprocess.Popen(
        [*command, "list", "--adapter", str(adapter), "--json"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        process.stdout.close()
        assert b"Traceback" not in process.stderr.read()


def test_changes_in_place_are_appended_and_leave_the_snapshot_alone(baft, adapter, osaka, place):
    log, files = adapter / "adapter.log", [adapter / name for name in ("adapter.safetensors", "adapter.json")]

    def snapshot() -> list[tuple[int, int]]:
        return [(stat.st_ino, stat.st_mtime_ns) for stat in (file.stat() for file in files)]

    (place / "rome.csv").write_text("prompt,target_new,id\nThe capital of Italy is,city,italy\n")
    before, sizes = snapshot(), [0]
    for command in (
        ("edit", "--edits", "rome.csv"),
        ("merge", osaka, "--on-conflict", "theirs"),
        ("undo", "italy"),
    ):
        assert baft(command[0], "--adapter", adapter, *command[1:]).code == 0
        assert snapshot() == before, command
        assert log.stat().st_size > sizes[-1], command
        sizes.append(log.stat().st_size)
    assert [e["id"] for e in baft("list", "--adapter", adapter, "--json").json["edits"]] == ["leo", "other", "france"]


def test_settings_changed_in_place_are_kept(baft, adapter, home):
    assert baft("edit", "--adapter", adapter, "--edits", home / "one.jsonl", "--steps", 61).code == 0
    assert baft("list", "--adapter", adapter, "--json").json["settings"]["steps"] == 61
