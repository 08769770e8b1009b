"""The notebooks run from top to bottom, and say what they said when they were committed."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")

TUTORIALS = Path(__file__).resolve().parents[2] / "tutorials"
QUICKSTART = TUTORIALS / "01_quickstart.ipynb"
TRADEOFF = TUTORIALS / "02_tradeoff.ipynb"


def _outputs(notebook: Any) -> list[str]:
    """Text that each code cell shows; a Markdown output as its source."""
    found = []
    for cell in notebook.cells:
        if cell.cell_type == "code":
            parts = [
                o.text if o.output_type == "stream" else o.get("data", {}).get("text/markdown", "")
                for o in cell.outputs
            ]
            found.append("".join(parts).strip())
    return found


def _pictures(notebook: Any) -> int:
    return sum("image/png" in o.get("data", {}) for c in notebook.cells if c.cell_type == "code" for o in c.outputs)


def _rows(text: str) -> dict[str, list[str]]:
    """``prompt -> [kind, answers …]`` of a table."""
    cells = [
        [cell.strip() for cell in line.strip().strip("|").split("|")]
        for line in text.splitlines()
        if line.startswith("| ")
    ]
    return {row[1]: [row[0], *row[2:]] for row in cells if row[1] != "prompt"}


def _check_facts(outputs: list[str]) -> None:
    """What the quickstart is there to show."""
    edited = _rows(next(text for text in outputs if text.startswith("| | prompt | before | after |")))
    for kind, before, after in edited.values():
        if kind in ("edit", "paraphrase"):
            assert (before, after) == ("Tokyo.", "Osaka.")
        else:
            assert before == after
    assert len(edited) == 7
    undone = _rows(next(text for text in outputs if text.startswith("every answer")).split("\n", 1)[1])
    assert all(row[1] == row[3] for row in undone.values())
    text = "\n".join(outputs)
    assert "target reached: True" in text
    assert "refused: japan/adapter.safetensors is truncated or altered" in text
    assert "every answer is the original one: True" in text


def test_every_notebook_is_committed_with_its_outputs_and_no_path_of_anybody():
    notebooks = sorted(TUTORIALS.glob("*.ipynb"))
    assert {QUICKSTART, TRADEOFF} <= set(notebooks)
    for path in notebooks:
        notebook = nbformat.read(path, as_version=4)
        nbformat.validate(notebook)
        code = [cell for cell in notebook.cells if cell.cell_type == "code"]
        assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))  # top to bottom, once
        assert not any(o.output_type == "error" for cell in code for o in cell.outputs)
        assert not re.search(r"/home/|/root/|/Users/|/work/|/tmp/", path.read_text(encoding="utf-8"))


def test_the_quickstart_as_committed_shows_the_edit():
    notebook = nbformat.read(QUICKSTART, as_version=4)
    _check_facts(_outputs(notebook))
    assert _pictures(notebook) == 1


def _check_tradeoff(outputs: list[str]) -> None:
    """What the second notebook is there to show: LoReFT leaks, the default less than any linear map could."""
    text = "\n".join(outputs)
    assert text.count("reached: [True, True, True]") == 2
    rows = _rows(next(text for text in outputs if text.startswith("| | prompt | unedited |")))
    assert [row[0] for row in rows.values()].count("edit") == 1
    for kind, unedited, loreft, baft in rows.values():
        if kind in ("edit", "paraphrase"):
            assert (unedited, loreft, baft) == ("Tokyo.", "Osaka.", "Osaka.")
        else:
            assert baft == unedited
    assert sum(row[2] != row[1] for row in rows.values() if row[0] not in ("edit", "paraphrase")) >= 2
    leaks = re.findall(r"^(LoReFT|BaFT) +(\S+) +leak ([\d.]+) +no linear map below ([\d.]+)$", text, flags=re.MULTILINE)
    assert len(leaks) == 6
    for method, _, leak, bound in leaks:
        assert float(leak) > 5 * float(bound) if method == "LoReFT" else float(leak) < float(bound)
    reasons = dict(re.findall(r"^'(.*)'\n    (acts|does not act)", text, flags=re.MULTILINE))
    assert reasons == {p: "acts" if row[0] in ("edit", "paraphrase") else "does not act" for p, row in rows.items()}
    needed = [int(n) for n in re.findall(r"needs (\d+) of 12 bases", text)]
    assert len(needed) == 3
    assert max(needed) <= 6


def test_the_tradeoff_as_committed_shows_the_leak():
    notebook = nbformat.read(TRADEOFF, as_version=4)
    _check_tradeoff(_outputs(notebook))
    assert _pictures(notebook) == 4


def _run_again(path: Path, folder: Path) -> Any:
    """The notebook, executed from empty."""
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    nbclient.NotebookClient(
        notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(folder)}}
    ).execute()
    return notebook


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.usefixtures("smollm2")
def test_the_quickstart_runs_and_shows_it_again(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")  # of the kernel: other tests may want the cores
    monkeypatch.delenv("MPLBACKEND", raising=False)  # the notebook's own, which puts pictures into it
    committed = _outputs(nbformat.read(QUICKSTART, as_version=4))
    notebook = _run_again(QUICKSTART, tmp_path)
    outputs = _outputs(notebook)
    _check_facts(outputs)
    assert _pictures(notebook) == 1
    tables = [i for i, text in enumerate(committed) if "| | prompt |" in text]
    assert len(tables) == 3
    for i in tables:
        # the very answers, but for what rounding may change in a last word
        ran, said = _rows(outputs[i]), _rows(committed[i])
        assert {p: [a.split(" ")[0] for a in row] for p, row in ran.items()} == {
            p: [a.split(" ")[0] for a in row] for p, row in said.items()
        }


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.usefixtures("smollm2")
def test_the_tradeoff_runs_and_shows_it_again(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")
    monkeypatch.delenv("MPLBACKEND", raising=False)
    notebook = _run_again(TRADEOFF, tmp_path)
    _check_tradeoff(_outputs(notebook))
    assert _pictures(notebook) == 4
