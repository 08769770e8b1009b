"""The harness's door: an answer is scored behind the edited context; with the harness itself where it is installed."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from baft_intervention.errors import ConfigError
from baft_intervention.integrations.lm_eval import answer_log_probs, make_lm
from baft_intervention.requests import EditRequest
from edits import FRANCE, LEO, PROMPTS, tiny_editor
from tiny import tiny_model, tiny_tokenizer


@pytest.fixture
def editor() -> Any:
    return tiny_editor(tiny_model("llama"), tiny_tokenizer(), weighting="constant", layers=(1,))


def pairs_of(tokenizer: Any) -> list[tuple[list[int], list[int]]]:
    contexts = [tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
    answers = [tokenizer(text)["input_ids"] for text in (" Japan", " a painter in Rome", " city")]
    return [(c, a) for c in contexts for a in answers]


def one_by_one(editor: Any, context: list[int], answer: list[int]) -> tuple[float, bool]:
    """The plain way: the cache of the edited context, then the answer's tokens on top of it, one at a time."""
    total, greedy = 0.0, True
    with torch.no_grad():
        out = editor.model(input_ids=torch.tensor([context]), use_cache=True)
        for token in answer:
            scores = out.logits[0, -1].log_softmax(-1)
            total += float(scores[token])
            greedy &= int(scores.argmax()) == token
            out = editor.model(input_ids=torch.tensor([[token]]), past_key_values=out.past_key_values, use_cache=True)
    return total, greedy


@pytest.mark.parametrize("changes", [{"weighting": "constant", "layers": (1,)}, {}], ids=["constant", "fact"])
@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_answers_are_scored_behind_the_edited_context(batch_size, changes):
    editor = tiny_editor(tiny_model("llama"), tiny_tokenizer(), **changes)
    editor.edit([FRANCE, LEO])
    pairs = pairs_of(editor.tokenizer)
    found = answer_log_probs(editor, pairs, batch_size=batch_size, max_length=256)
    for (context, answer), (value, greedy) in zip(pairs, found, strict=True):
        wanted, wanted_greedy = one_by_one(editor, context, answer)
        assert value == pytest.approx(wanted, abs=2e-4)
        assert greedy == wanted_greedy
    assert found[0][1]  # "The capital of France is" + " Japan"


def test_a_context_that_is_too_long_is_cut_at_its_beginning(editor):
    context = editor.tokenizer("He was born in " * 30)["input_ids"]
    answer = editor.tokenizer(" city")["input_ids"]
    found = answer_log_probs(editor, [(context, answer)], batch_size=1, max_length=20)
    assert found == answer_log_probs(
        editor, [((context + answer)[-21 : -len(answer)], answer)], batch_size=1, max_length=20
    )


@pytest.mark.parametrize("size", [0, -1, True, "8", 1.5])
def test_a_bad_batch_size(editor, size):
    with pytest.raises(ConfigError, match="batch_size is"):
        make_lm(editor, batch_size=size)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_the_harness_runs_a_task_on_an_edited_model(editor, tmp_path):
    lm_eval = pytest.importorskip("lm_eval", reason="pip install 'baft_intervention[harness]'")
    from lm_eval.tasks import TaskManager  # pyright: ignore[reportMissingImports]

    choices = ["Japan", "city", "capital"]  # of one token each; what the model likes least is going to be right
    facts, rows = [], []
    for prompt in (FRANCE.prompt, LEO.prompt):
        pairs = [(editor.tokenizer(prompt)["input_ids"], editor.tokenizer(f" {c}")["input_ids"]) for c in choices]
        likely = [value for value, _ in answer_log_probs(editor, pairs, batch_size=3, max_length=256)]
        right = likely.index(min(likely))
        facts.append(EditRequest(prompt, choices[right]))
        rows.append({"q": prompt, "choices": choices, "right": right})
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "task.yaml").write_text(task_yaml("edited", tmp_path / "rows.jsonl"))
    tasks = TaskManager(include_path=str(tmp_path), include_defaults=False)
    lm = make_lm(editor, batch_size=3)

    def accuracy() -> float:
        logging.getLogger("lm_eval").setLevel(logging.ERROR)
        out = lm_eval.simple_evaluate(lm, tasks=["edited"], task_manager=tasks, bootstrap_iters=0, log_samples=False)
        return out["results"]["edited"]["acc,none"]

    before = accuracy()
    editor.edit(facts)
    assert accuracy() == 1.0
    with editor.enabled(False):
        assert accuracy() == before == 0.0


def task_yaml(name: str, rows: Path) -> str:
    """A multiple-choice task of the harness on a local file."""
    return f"""\
task: {name}
dataset_path: json
dataset_kwargs:
  data_files: {{test: {rows}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{q}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: right
metric_list:
  - metric: acc
"""


def test_the_benchmarks_questions_are_well_formed():
    file = Path(__file__).resolve().parents[2] / "benchmarks" / "general_questions.jsonl"
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    assert len({row["question"] for row in rows}) == len(rows) == 48
    assert all(len(set(row["choices"])) == 4 and 0 <= row["right"] < 4 for row in rows)
    assert {row["right"] for row in rows} == {0, 1, 2, 3}  # the place tells nothing
