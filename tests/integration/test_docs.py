"""The documentation site builds without a warning, every public name is in it, and its examples run."""

from __future__ import annotations

import ast
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import baft_intervention
from baft_intervention.cli.main import main
from baft_intervention.gates import weighting_names

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"


def _page(name: str) -> str:
    return (DOCS / name).read_text(encoding="utf-8")


def _blocks(name: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", _page(name), flags=re.MULTILINE | re.DOTALL)


def _run(code: str, folder: Path) -> str:
    run = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    return run.stdout


@pytest.mark.slow
@pytest.mark.reft
@pytest.mark.timeout(600)
def test_the_site_builds_without_a_warning_and_has_every_public_name(tmp_path):
    for name in ("sphinx", "myst_nb", "furo", "sphinx_copybutton"):
        pytest.importorskip(name, reason="the site is built in the other environment: make docs")
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    found = re.search(r"^docs:.*\n\t\$\(VENV\)/bin/python (-m sphinx .*) build/docs$", makefile, flags=re.MULTILINE)
    assert found is not None
    options = shlex.split(found[1])
    assert "-W" in options
    command = [sys.executable, *options, str(tmp_path)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    public = (tmp_path / "reference" / "public.html").read_text(encoding="utf-8")
    names = set(baft_intervention.__all__) - {"__version__"}
    assert [name for name in names if f'id="baft_intervention.{name}"' not in public] == []
    pages = "".join(p.read_text(encoding="utf-8") for p in (tmp_path / "reference" / "modules").glob("*.html"))
    modules = {
        ".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for p in (ROOT / "baft_intervention").rglob("*.py")
        if p.name != "__main__.py" and p.parent.name != "baft_intervention"
    }
    assert [name for name in modules if f'id="module-{name}"' not in pages] == []
    assert len(list((tmp_path / "tutorials").glob("*.html"))) == len(list((ROOT / "tutorials").glob("*.ipynb")))


def test_every_public_name_has_a_docstring():
    names = set(baft_intervention.__all__) - {"__version__"}
    assert [name for name in names if not getattr(baft_intervention, name).__doc__] == []


def test_the_table_of_gates_is_complete():
    rows = re.findall(r"^\| (`.*?) \|", _page("concepts.md").split("## Gates")[1], flags=re.MULTILINE)
    named = {name for row in rows for name in re.findall(r"`(\w+)`", row)} - {"weighting"}  # the table's head
    shipped = {name for name in weighting_names() if name != "mine"}  # a test may have registered its own
    assert {"fact", "cosine", "linear", "mlp", "constant"} <= named <= shipped


def test_the_error_is_the_one_that_is_shown(tmp_path, monkeypatch, capsys):
    command, shown = re.search(r"\$ baft (.*)\n {4}(baft: error: .*)", _page("files.md")).groups()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "edits.jsonl").write_text('{"prompt": "a is", "target_new": "b"}\n{"prompt": "c is"}\n')
    assert main(shlex.split(command)) == 2
    assert capsys.readouterr().err.strip() == shown


def test_scripts_and_files_that_pages_name_exist():
    pages = [p for p in DOCS.rglob("*.md") if p.parent.name != "modules"]
    text = "\n".join(p.read_text(encoding="utf-8") for p in pages)
    scripts = set(re.findall(r"python (benchmarks/\w+\.py)", text))
    folders = set(re.findall(r"`(benchmarks/results/\w+)`", text))
    tests = set(re.findall(r"`(tests/[\w/]+\.py)`", text))
    assert len(scripts) > 8
    assert len(folders) > 8
    assert [path for path in scripts | folders | tests if not (ROOT / path).exists()] == []


def test_the_extensions_register(tmp_path):
    code = "\n".join(_blocks("howto/extend.md"))
    code += (
        "\nassert baft.BaftConfig(weighting='temperature', positions='last_two')"
        "\nprint(make_method('baft-mine').steps, baft.WeightingNetwork in TemperatureWeighting.__mro__)"
    )
    assert _run(code, tmp_path).split() == ["40", "True"]


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.usefixtures("smollm2")
def test_many_edits(tmp_path):
    again = (
        "\nwith baft.BaftEditor.open('edits') as editor:"
        "\n    print('again:', len(editor.edits), editor.generate(facts[1].prompt, max_new_tokens=4))"
    )
    (block,) = _blocks("howto/many-edits.md")
    ids, again = _run(block + again, tmp_path).split("again:")
    assert len(ast.literal_eval(ids.splitlines()[0])) == 2
    assert again.strip().startswith("1  Spanish")
    assert sorted(p.name for p in (tmp_path / "edits").iterdir()) == ["adapter.json", "adapter.safetensors"]


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.usefixtures("smollm2")
def test_chat(tmp_path):
    (block,) = _blocks("howto/chat.md")
    assert "Osaka" in _run(block, tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.usefixtures("smollm2")
def test_the_quickstart(tmp_path):
    first, second, _, _ = _blocks("quickstart.md")
    apart = "say = print\nprint = lambda *words: say('answer:', *words)\n"  # an answer may run over several lines
    answers = _run(apart + first + second, tmp_path).split("answer:")[1:]
    assert [answer.split()[0].strip(".,") for answer in answers] == ["Osaka", "yen", "Tokyo"]


@pytest.mark.slow
@pytest.mark.reft
@pytest.mark.timeout(900)
@pytest.mark.usefixtures("smollm2")
def test_the_quickstart_with_pyreft(tmp_path):
    assert "The capital of Japan is Osaka" in _run(_blocks("quickstart.md")[3], tmp_path)
