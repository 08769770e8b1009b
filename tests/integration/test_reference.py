"""The reference is built from the docstrings without a warning, and every public name is in it."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest

import baft_intervention

pytest.importorskip("pdoc", reason="the reference is built in the other environment: make docs")
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def script() -> Any:
    spec = importlib.util.spec_from_file_location("reference", ROOT / "docs" / "reference.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_tables_and_code_become_markdown(script):
    table = "==  ===\na   b\n==  ===\nc   d\n==  ==="
    assert (
        script.to_markdown(f"Text.\n\n{table}\n\nSo::\n\n    code")
        == f"Text.\n\n```text\n{table}\n```\n\nSo:\n\n    code"
    )
    without_head = "==  ===\na   b\nc   d\n==  ==="
    assert script.to_markdown(without_head) == f"```text\n{without_head}\n```"


@pytest.mark.slow
@pytest.mark.reft
def test_every_public_name_is_in_it(script, tmp_path):
    script.build(tmp_path)  # a warning is an error
    pages = {
        ".".join(p.relative_to(tmp_path).with_suffix("").parts): p.read_text("utf-8") for p in tmp_path.rglob("*.html")
    }
    package = ROOT / "baft_intervention"
    modules = {
        ".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for p in package.rglob("*.py")
    }
    assert modules <= set(pages)
    front = pages["baft_intervention"]
    missing = [name for name in baft_intervention.__all__ if name != "__version__" and f'id="{name}"' not in front]
    assert missing == []
    undocumented = [
        name
        for name in baft_intervention.__all__
        if name != "__version__" and not getattr(baft_intervention, name).__doc__
    ]
    assert undocumented == []
    for name, page in pages.items():
        text = re.sub(r"<pre>.*?</pre>|<code>.*?</code>", "", page, flags=re.DOTALL)
        assert not re.search(r"<p>=+ |:(?:class|func|meth|mod):`", text), f"{name}: reStructuredText was left"
