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
    assert QUICKSTART in notebooks
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


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.usefixtures("smollm2")
def test_the_quickstart_runs_and_shows_it_again(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")  # of the kernel: other tests may want the cores
    monkeypatch.delenv("MPLBACKEND", raising=False)  # the notebook's own, which puts pictures into it
    notebook = nbformat.read(QUICKSTART, as_version=4)
    committed = _outputs(notebook)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    client = nbclient.NotebookClient(
        notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    )
    client.execute()
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
