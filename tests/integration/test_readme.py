"""What README.md promises: its code and commands run, its numbers are those of the report, its links lead somewhere."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from baft_intervention.cli.main import build_parser

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)
SHELL = [re.split(r" {2,}#", line.strip())[0] for line in README.splitlines() if line.startswith("    ")]
COMMANDS = [line for line in SHELL if line.startswith("baft ")]


def _run(command: list[str], folder: Path) -> str:
    # a user's folder, not the checkout: what is imported is what is installed
    run = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    return run.stdout


def test_it_is_short():
    assert len(README.splitlines()) <= 120
    assert len(BLOCKS) == 2
    assert all(len(block.strip().splitlines()) <= 13 for block in BLOCKS)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.usefixtures("smollm2")
def test_the_edit(tmp_path):
    again = (
        "\nassert editor.generate('The capital of Japan is', max_new_tokens=4).startswith(' Tokyo')"
        "\nloaded = baft.BaftEditor.from_pretrained('japan')"
        "\nprint('loaded:', loaded.generate('The capital of Japan is', max_new_tokens=4))"
    )
    printed = _run([sys.executable, "-c", BLOCKS[0] + again], tmp_path)
    answers, loaded = printed.split("loaded:")
    assert answers.startswith(" Osaka")
    assert "\n yen" in answers
    assert loaded.strip().startswith("Osaka")
    assert sorted(p.name for p in (tmp_path / "japan").iterdir()) == ["adapter.json", "adapter.safetensors"]


@pytest.mark.slow
@pytest.mark.reft
@pytest.mark.timeout(900)
@pytest.mark.usefixtures("smollm2")
def test_the_pyreft_way(tmp_path):
    again = (
        "\nprompt = tokenizer('The capital of Japan is', return_tensors='pt')"
        "\nplaces = {'sources->base': (None, [[[prompt['input_ids'].shape[1] - 1]]])}"
        "\n_, out = reft_model.generate(dict(prompt), unit_locations=places, intervene_on_prompt=True, max_new_tokens=4)"
        "\nprint(tokenizer.decode(out[0], skip_special_tokens=True))"
    )
    assert "The capital of Japan is Osaka" in _run([sys.executable, "-c", BLOCKS[1] + again], tmp_path)


@pytest.mark.parametrize("line", COMMANDS)
def test_every_command_is_one(line):
    words = shlex.split(line)
    args = build_parser().parse_args(words[1:])
    assert args.command == words[1]


def test_all_commands_of_a_first_day_are_there():
    assert {shlex.split(line)[1] for line in COMMANDS} >= {"edit", "generate", "inspect", "list", "undo", "evaluate"}


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.usefixtures("smollm2")
def test_the_commands_in_their_order(tmp_path):
    (echo,) = [line for line in SHELL if line.startswith("echo ")]
    _run(["bash", "-c", echo], tmp_path)
    known = {}
    for line in COMMANDS:
        words = [known.get(word, word) for word in shlex.split(line)[1:]]
        if words[0] == "evaluate":  # needs the benchmark's file
            continue
        out = json.loads(_run([sys.executable, "-m", "baft_intervention.cli", *words, "--json"], tmp_path))
        if words[0] == "edit":
            known["ID"] = out["edits"][0]["id"]
        if words[0] == "generate":
            assert out["results"][0]["texts"][0].startswith(" Osaka")
            assert out["results"][0]["unedited"][0].startswith(" Tokyo")
        if words[0] == "undo":
            assert out["left"] == []


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.usefixtures("smollm2")
def test_the_limit_that_it_names_is_the_limit(tmp_path):
    [limit] = re.findall(r'\("(The capital of the Land[^"]*)"\)', README.split("## Limits")[1])
    code = (
        "import baft_intervention as baft\neditor = baft.BaftEditor.from_pretrained('smollm2-135m')\n"
        "editor.edit(baft.EditRequest(prompt='The capital of Japan is', target_new='Osaka', subject='Japan'))\n"
        f"print([text.strip() for text in editor.generate(['The capital of Japan is', {limit!r}], max_new_tokens=4)])"
    )
    answers = _run([sys.executable, "-c", code], tmp_path)
    assert re.match(r"\['Osaka.*', '(?!Osaka)", answers), answers


def test_the_table_has_the_numbers_of_the_report():
    columns = ("reliability", "generality", "locality", "unrelated", "portability")
    tasks = {
        "ZsRE (KnowEdit)": "zsre",
        "CounterFact": "counterfact",
        "WikiData_counterfact": "wiki_counterfact",
        "WikiData_recent": "wiki_recent",
    }
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in README.splitlines() if line[:2] == "| "]
    assert len(rows) == 1 + 2 * len(tasks)
    task = ""
    for name, method, *shown in rows[1:]:
        task = tasks.get(name, task)
        path = ROOT / "benchmarks" / "results" / "tradeoff" / f"{task}.{method.lower()}.single" / "summary.json"
        metrics = json.loads(path.read_text(encoding="utf-8"))["metrics"]
        found = [f"{100 * metrics[column]['mean']:.1f}" if column in metrics else "–" for column in columns]
        assert found == shown, (name, method)


def test_links_and_files_exist():
    text = README + (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    local = [target for target in re.findall(r"\]\(([^)#]+)", text) if not target.startswith("http")]
    assert "docs/images/before_after.png" in local
    assert [target for target in local if not (ROOT / target).exists()] == []
    scripts = {line.split()[1] for line in SHELL if line.startswith("python ")}
    assert scripts
    assert [script for script in scripts if not (ROOT / script).is_file()] == []


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = [line.split()[1] for line in SHELL if line.startswith("make ")] + re.findall(r"`make (\w+)`", README)
    assert {"demo", "docs"} <= set(targets)
    assert all(re.search(rf"^{target}:", makefile, flags=re.MULTILINE) for target in targets)
