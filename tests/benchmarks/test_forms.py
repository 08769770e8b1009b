"""The benchmark of forms: which facts it reads, what it asks, and that its numbers are those of the model."""

from __future__ import annotations

import argparse
import csv
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from baft_intervention.evaluation.edited import EditedModel
from benchmarks.test_benchmarks import script

FACT = {
    "subject": "France", "relation": "capital", "object": "Japan", "question": "What is the capital of France?",
    "paraphrased_question": "Which city governs France?", "locality_question": "Who lives in France?",
    "reversed_relation_question": "Which country has the capital Japan?",
}  # fmt: skip


@pytest.fixture(scope="module")
def forms() -> ModuleType:
    return script("forms")


def write(path: Path, *subjects: str) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(FACT))
        writer.writeheader()
        for subject in subjects:
            writer.writerow({k: v.replace("France", subject) for k, v in FACT.items()})


def test_each_part_reads_its_own_topics_and_one_fact_a_subject(forms: ModuleType, tmp_path: Path) -> None:
    write(tmp_path / "art_sculpture.csv", "Italy", "Italy", "Spain")  # a topic on which settings may be chosen
    write(tmp_path / "places_city.csv", "Peru", "Chad", "Iran")  # a test topic
    chosen = forms.read_facts(tmp_path, "validation", 10, 0)
    assert sorted(fact["subject"] for fact in chosen) == ["Italy", "Spain"]
    assert {fact["subject"] for fact in forms.read_facts(tmp_path, "test", 10, 0)} == {"Peru", "Chad", "Iran"}
    assert all(fact["subject"] not in fact["another"] for fact in chosen)
    (tmp_path / "places_city.csv").unlink()
    with pytest.raises(SystemExit, match="no topic of the test part"):
        forms.read_facts(tmp_path, "test", 10, 0)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        (" It is Osaka. Tokyo was.", True),
        ("It is Tokyo. Osaka is not.", False),
        ("osaka", True),
        ("Tokyo\nOsaka", False),
    ],
)
def test_the_first_sentence_alone_counts(forms: ModuleType, text: str, named: bool) -> None:
    assert forms.names(text, "Osaka") is named


class Moved(EditedModel):
    """Adds a constant to the logits of one token, everywhere, once a request was applied."""

    def apply(self, requests: Any) -> Any:
        token = self.tokenizer(" Japan", add_special_tokens=False)["input_ids"][0]

        def change(_module: Any, _args: Any, output: Any) -> Any:
            output.logits[..., token] += 100.0
            return output

        self.handle = self.model.register_forward_hook(change)
        return self.cost


def test_an_edit_that_says_its_target_everywhere_follows_all_and_stays_nowhere(
    forms: ModuleType, tiny_llama: Any, tokenizer: Any
) -> None:
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %} Answer:"
    edited, fact = Moved(tiny_llama, tokenizer), {**FACT, "another": "Who is Leo?"}
    probes = forms.probes_of(tokenizer, fact, "statement")
    assert probes["own form"] == "The capital of France is"
    assert probes["other form"] == FACT["question"]
    before = dict(zip(probes, forms.next_logits(edited, list(probes.values())), strict=True))
    untouched = forms.ask(edited, fact, "statement", before, False)
    assert all(untouched["stay"].values())
    assert all(untouched["bits"].values())
    edited.apply([forms.request_of(fact, "chat")])
    moved = forms.ask(edited, fact, "statement", before, True)
    edited.handle.remove()
    assert all(moved["follow"].values())
    assert not any(moved["stay"].values())
    assert all(moved["text"].values())
    lines = forms.table({"m": [{"form": "statement", **moved}]}, True)
    assert any("| follows: own form |" in line and "100 / 100" in line for line in lines)


def test_kept_results_are_not_run_again(forms: ModuleType, tmp_path: Path) -> None:
    kept = [{"question": FACT["question"], "form": form, "follow": {}, "stay": {}} for form in forms.FORMS]
    (tmp_path / "base.jsonl").write_text("".join(json.dumps(r) + "\n" for r in kept), encoding="utf-8")
    args = argparse.Namespace(out=tmp_path, model="no such model", text=False)
    assert list(forms.run("base", [FACT], args)) == kept


def test_every_row_of_the_table_is_asked(forms: ModuleType, tokenizer: Any) -> None:
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %} Answer:"
    assert set(forms.probes_of(tokenizer, {**FACT, "another": "?"}, "chat")) == {*forms.FOLLOW, *forms.STAY}
