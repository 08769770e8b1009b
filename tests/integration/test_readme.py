"""What README.md promises: its code runs and prints what it says, its commands exist, its links lead somewhere."""

from __future__ import annotations

import ast
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from baft_intervention.cli.main import build_parser, main
from baft_intervention.gates import weighting_names

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)
COMMANDS = [line.strip().split("  #")[0] for line in README.splitlines() if re.match(r" {4}baft \w", line)]


def _run(command: list[str], folder: Path) -> str:
    # a user's folder, not the checkout: what is imported is what is installed
    run = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, env={**os.environ})
    assert run.returncode == 0, run.stderr[-3000:]
    return run.stdout


def _block(word: str) -> str:
    found = [block for block in BLOCKS if word in block]
    assert len(found) == 1, f"README has {len(found)} python blocks with {word!r}"
    return found[0]


def test_every_block_is_run_below():
    assert len(BLOCKS) == 3
    assert len({_block("import pyreft"), _block("BaftEditor.from_pretrained"), _block("BaftEditor.open")}) == 3


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.usefixtures("smollm2")
def test_the_one_call_way(tmp_path):
    again = (
        "\nassert editor.generate('The capital of Japan is', max_new_tokens=4).startswith(' Tokyo')"
        "\nloaded = baft.BaftEditor.from_pretrained('japan')"
        "\nprint('loaded:', loaded.generate('The capital of Japan is', max_new_tokens=4))"
    )
    printed = _run([sys.executable, "-c", _block("BaftEditor.from_pretrained") + again], tmp_path)
    answers, loaded = printed.split("loaded:")
    assert answers.startswith(" Osaka")
    assert "\n yen" in answers
    assert loaded.strip().startswith("Osaka")
    assert sorted(p.name for p in (tmp_path / "japan").iterdir()) == ["adapter.json", "adapter.safetensors"]


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.usefixtures("smollm2")
def test_many_edits(tmp_path):
    again = (
        "\nwith baft.BaftEditor.open('edits') as editor:"
        "\n    print('again:', len(editor.edits), editor.generate(facts[1].prompt, max_new_tokens=4))"
    )
    ids, again = _run([sys.executable, "-c", _block("BaftEditor.open") + again], tmp_path).split("again:")
    assert len(ast.literal_eval(ids.splitlines()[0])) == 2
    assert again.strip().startswith("1  Spanish")
    assert sorted(p.name for p in (tmp_path / "edits").iterdir()) == ["adapter.json", "adapter.safetensors"]


@pytest.mark.slow
@pytest.mark.reft
@pytest.mark.timeout(900)
@pytest.mark.usefixtures("smollm2")
def test_the_pyreft_way(tmp_path):
    assert "The capital of Japan is Osaka" in _run([sys.executable, "-c", _block("import pyreft")], tmp_path)


@pytest.mark.parametrize("line", COMMANDS)
def test_every_command_is_one(line):
    words = shlex.split(line)
    args = build_parser().parse_args(words[1:])
    assert args.command == words[1]


def test_all_commands_of_a_first_day_are_there():
    assert {shlex.split(line)[1] for line in COMMANDS} >= {"edit", "generate", "list", "undo", "evaluate"}


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.usefixtures("smollm2")
def test_the_commands_in_their_order(tmp_path):
    fact = {"prompt": "The capital of Japan is", "target_new": "Osaka", "subject": "Japan"}
    (tmp_path / "edits.json").write_text(json.dumps([fact]))
    known = {}
    for line in COMMANDS:
        words = shlex.split(line)
        if words[1] not in ("edit", "generate", "list", "undo"):
            continue
        words = [known.get(word, word) for word in words[1:]]
        out = json.loads(_run([sys.executable, "-m", "baft_intervention.cli", *words, "--json"], tmp_path))
        if words[0] == "edit":
            known["ID"] = out["edits"][0]["id"]
        if words[0] == "generate":
            assert out["results"][0]["texts"][0].startswith(" Osaka")
            assert out["results"][0]["unedited"][0].startswith(" Tokyo")
        if words[0] == "undo":
            assert out["left"] == []


def test_links_and_files_exist():
    targets = re.findall(r"\]\(([^)#]+)\)", README)
    local = [target for target in targets if not target.startswith("http")]
    assert "docs/before_after.png" in local
    assert [target for target in local if not (ROOT / target).exists()] == []
    scripts = set(re.findall(r"`python (\S+\.py)", README))
    assert [script for script in scripts if not (ROOT / script).is_file()] == []


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = re.findall(r"^ {4}make (\w+)", README, flags=re.MULTILINE)
    assert targets == ["demo", "test"]
    assert all(re.search(rf"^{target}:", makefile, flags=re.MULTILINE) for target in targets)


def test_the_table_of_weighting_networks_is_complete():
    rows = re.findall(r"^\| (`.*?) \|", README, flags=re.MULTILINE)
    named = {name for row in rows for name in re.findall(r"`(\w+)`", row)}
    shipped = {name for name in weighting_names() if name != "mine"}  # a test may have registered its own
    assert {"subject_relation", "cosine", "linear", "mlp", "constant"} <= named <= shipped


def test_the_error_is_the_one_that_is_shown(tmp_path, monkeypatch, capsys):
    command, shown = re.search(r"\$ baft (.*)\n {4}(baft: error: .*)", README).groups()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "edits.jsonl").write_text('{"prompt": "a is", "target_new": "b"}\n{"prompt": "c is"}\n')
    assert main(shlex.split(command)) == 2
    assert capsys.readouterr().err.strip() == shown
