"""Progress bars: drawn on a terminal with an honest total, silent elsewhere."""

from __future__ import annotations

import io
import sys

import pytest

from baft_intervention import progress
from baft_intervention.training.bank import get_bank
from tiny import tiny_model, tiny_tokenizer


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("stream", "hidden", "shown"), [(Terminal, "", True), (Terminal, "1", False), (io.StringIO, "", False)]
)
def test_a_bar_is_drawn_on_a_terminal_only(monkeypatch, stream, hidden, shown):
    monkeypatch.setattr(sys, "stderr", stream())
    monkeypatch.setenv(progress.HIDE, hidden)
    with progress.progress_bar(3, "reading", "text") as bar:
        bar.update(3)
    assert ("reading: " in sys.stderr.getvalue()) is shown


def test_the_total_of_the_bank_is_reached(monkeypatch):
    bars = []
    real = progress.progress_bar
    monkeypatch.setattr("baft_intervention.training.bank.progress_bar", lambda *a: bars.append(real(*a)) or bars[-1])
    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.delenv(progress.HIDE, raising=False)
    texts = ["The capital of France is Paris.", "He was born in London."]
    get_bank(tiny_model(), tiny_tokenizer(), (1,), texts=texts, cache=False)
    (bar,) = bars
    assert bar.n == bar.total == len(texts)
