"""The notebooks on streams of edits, the pyreft way and own facts: run from top to bottom, they show what they are to show."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")

TUTORIALS = Path(__file__).resolve().parents[2] / "tutorials"
CONTINUAL = TUTORIALS / "03_continual.ipynb"
PYREFT, OWN_FACTS = TUTORIALS / "04_pyreft.ipynb", TUTORIALS / "05_own_facts.ipynb"


def _texts(notebook: Any) -> list[str]:
    """What each code cell prints, and each table as its Markdown source."""
    found = []
    for cell in notebook.cells:
        if cell.cell_type == "code":
            found.append("".join(o.text for o in cell.outputs if o.output_type == "stream"))
            found += [o.data["text/markdown"] for o in cell.outputs if "text/markdown" in o.get("data", {})]
    return found


def _table(texts: list[str], head: str) -> list[list[str]]:
    (table,) = (text for text in texts if text.startswith(head))
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]


def _check_pyreft(notebook: Any) -> None:
    texts = _texts(notebook)
    text = "\n".join(texts)
    assert "positions: [[3, 4], [3, 4], [3, 4]]" in text  # the rule of its own, on three layers
    steps, loss = re.search(r"stopped after (\d+) steps, loss ([\d.]+)", text).groups()  # pyright: ignore
    assert int(steps) < 40  # by the callback
    assert float(loss) <= 0.05
    rows = _table(texts, "| | prompt | base model | intervened |")
    assert [row[3].split(" ")[0].rstrip(".,") for row in rows if row[0] == "edit"] == ["Osaka", "Lyon"]
    assert [row[2] == row[3] for row in rows if row[0] == "unrelated"] == [True]
    assert "the same logits as pyreft's, bit for bit: True" in text
    parts = {blocks.strip(): float(p) for blocks, p in re.findall(r"^blocks ([\d, ]+?) +([\d.]+)$", text, re.MULTILINE)}
    assert len(parts) == 7
    assert parts["18, 22, 26"] > 0.9
    assert "back again: True" in text


def _check_own_facts(notebook: Any) -> None:
    texts = _texts(notebook)
    text = "\n".join(texts)
    assert "slip.csv, line 2: field 'subjekt' is unknown; did you mean 'subject'?" in text
    assert "<|im_start|>assistant" in text
    assert text.count("reached: True") == 5
    rows = _table(texts, "| | question | before | after | |")
    marks = {kind: [row[4] for row in rows if row[0] == kind] for kind in ("edit", "rephrase", "neighbour")}
    assert marks["edit"] == ["follows"] * 5
    assert len(marks["rephrase"]) == 6
    assert marks["rephrase"].count("follows") >= 5
    assert len(marks["neighbour"]) == 9
    assert marks["neighbour"].count("stays") >= 7
    for _, _, before, after, mark in rows:
        assert mark in ("follows", "MISSED") or (mark == "stays") == (before == after)
    assert "characters of template" in text
    assert "without the editor: Amara Okafor" in text


def _check_continual(notebook: Any) -> None:
    text = "\n".join(_texts(notebook))
    shares = {
        name: re.findall(r"(\d+) edits: (\d+)% hold, (\d+)% stay", line)
        for name, line in re.findall(r"^(BaFT|LoReFT) (.*)$", text, re.MULTILINE)
    }
    assert [int(n) for n, _, _ in shares["BaFT"]] == [1, 2, 4, 8, 12]
    assert all(int(hold) >= 90 and stay == "100" for _, hold, stay in shares["BaFT"])
    assert int(shares["LoReFT"][-1][1]) < 90  # what one map over another does to the earlier ones
    assert "corrected: Kyoto" in text
    assert "edits with that prompt: ['japan-corrected']" in text
    assert "undone, and as if it had never been: True" in text
    assert "all that was committed before is there: True" in text
    assert "refused: 1 prompt has two answers" in text
    assert "added: ('kenya',) | conflicts: 1" in text
    assert "Japan: Kyoto" in text


CHECKS: dict[Path, Callable[[Any], None]] = {
    CONTINUAL: _check_continual,
    PYREFT: _check_pyreft,
    OWN_FACTS: _check_own_facts,
}


@pytest.mark.parametrize("path", CHECKS, ids=lambda path: path.stem)
def test_as_committed(path):
    notebook = nbformat.read(path, as_version=4)
    CHECKS[path](notebook)
    pictures = [
        o for c in notebook.cells if c.cell_type == "code" for o in c.outputs if "image/png" in o.get("data", {})
    ]
    assert len(pictures) == 1


@pytest.mark.long
@pytest.mark.reft
@pytest.mark.timeout(900)
@pytest.mark.usefixtures("smollm2")
@pytest.mark.parametrize("path", CHECKS, ids=lambda path: path.stem)
def test_run_again(path, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")  # of the kernel: other tests may want the cores
    monkeypatch.delenv("MPLBACKEND", raising=False)  # the notebook's own, which puts pictures into it
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    resources = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(notebook, timeout=600, kernel_name="python3", resources=resources).execute()
    CHECKS[path](notebook)
    assert (
        sum("image/png" in o.get("data", {}) for c in notebook.cells if c.cell_type == "code" for o in c.outputs) == 1
    )
