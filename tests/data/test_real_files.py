"""Every benchmark file loads whole, with the number of records that its README states."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from baft_intervention.data import LoadedData, load_requests, unrelated_probes, validate

# file: (task, format, records); the counts are those of the data's README
FILES = {
    "knowedit/ZsRE/ZsRE-test-all.json": ("zsre", "knowedit", 1000),
    "knowedit/wiki_counterfact/test_cf.json": ("wikidata_counterfact", "knowedit", 600),
    "knowedit/wiki_counterfact/train_cf.json": ("wikidata_counterfact", "knowedit", 1428),
    "knowedit/wiki_recent/recent_test.json": ("wikidata_recent", "knowedit", 900),
    "knowedit/wiki_recent/recent_train.json": ("wikidata_recent", "knowedit", 570),
    "knowedit/WikiBio/wikibio-test-all.json": ("wikibio", "wikibio", 206),
    "knowedit/WikiBio/wikibio-train-all.json": ("wikibio", "wikibio", 464),
    "knowedit/convsent/blender_test.json": ("convsent", "convsent", 600),
    "knowedit/convsent/blender_val.json": ("convsent", "convsent", 400),
    "knowedit/Sanitation/trivia_qa_test.json": ("sanitation", "sanitation", 80),
    "counterfact/counterfact.json": ("counterfact", "counterfact", 731),
    "counterfact/counterfact-edit.json": ("counterfact", "counterfact_flat", 3000),
    "counterfact/counterfact-val.json": ("counterfact", "counterfact_flat", 1755),
    "counterfact/counterfact-train.json": ("counterfact", "counterfact_flat", 4000),
    "zsre/zsre_mend_edit.json": ("zsre", "zsre_mend", 852),
    "zsre/zsre_mend_eval.json": ("zsre", "zsre_mend", 2000),
    "wise/hallucination-edit.json": ("hallucination", "wise", 600),
    "wise/temporal-edit.json": ("temporal", "wise", 75),
    "mquake/MQuAKE-hard.json": ("mquake", "mquake", 300),
    "wikibigedit/wikibigedit_3k.json": ("wikibigedit", "wikibigedit", 1500),
    "qaedit/QAEdit_inter_1k.json": ("qaedit", "qaedit", 500),
    "hallueditbench/art_sculpture.csv": ("hallueditbench", "hallueditbench", 100),
    "hallueditbench/business_corporation.csv": ("hallueditbench", "hallueditbench", 100),
    "hallueditbench/entertainment_anime.csv": ("hallueditbench", "hallueditbench", 100),
    "hallueditbench/entertainment_song.csv": ("hallueditbench", "hallueditbench", 100),
    "hallueditbench/event_history.csv": ("hallueditbench", "hallueditbench", 74),
    "hallueditbench/geography_forest.csv": ("hallueditbench", "hallueditbench", 100),
    "hallueditbench/geography_volcano.csv": ("hallueditbench", "hallueditbench", 100),
    "hallueditbench/health_medication.csv": ("hallueditbench", "hallueditbench", 25),
    "hallueditbench/human_athlete.csv": ("hallueditbench", "hallueditbench", 100),
    "hallueditbench/human_scientist.csv": ("hallueditbench", "hallueditbench", 99),
    "hallueditbench/places_city.csv": ("hallueditbench", "hallueditbench", 100),
    "hallueditbench/places_landmark.csv": ("hallueditbench", "hallueditbench", 100),
    "hallueditbench/technology_programming_language.csv": ("hallueditbench", "hallueditbench", 100),
    "portability/counterfact_subject_replace.json": ("counterfact", "counterfact", 110),
    "portability/zsre_subject_replace.json": ("zsre", "zsre_mend", 150),
    "portability/zsre_inverse_relation.json": ("zsre", "zsre_mend", 190),
    "known_1000.json": ("known", "known", 1209),
}


@pytest.fixture(params=FILES)
def name(request: pytest.FixtureRequest, data_dir: Path) -> str:
    if not (data_dir / request.param).is_file():
        pytest.skip(f"{request.param} is not in {data_dir}")
    return request.param


def test_every_record_loads(data_dir: Path, name: str) -> None:
    task, fmt, records = FILES[name]
    data = load_requests(data_dir / name)
    assert (data.task, data.format, data.records, data.bad) == (task, fmt, records, ())
    assert len({r.id for r in data.requests}) == len(data.requests)
    for request in data.requests:
        assert request.prompt == request.prompt.strip()
        assert request.target_new == request.target_new.strip()
        for probe in request.probes:
            assert probe.answers or probe.kind in ("locality", "unrelated")
            assert all(answer.strip() for answer in (*probe.answers, *probe.contrast))
            assert not set(probe.answers) & set(probe.contrast)


def test_the_task_may_be_named(data_dir: Path, name: str) -> None:
    task, _, _ = FILES[name]
    assert load_requests(data_dir / name, task, limit=1).task == task


def test_validation_of_the_whole_folder(data_dir: Path) -> None:
    report = validate(data_dir)
    assert report.ok
    found = {
        Path(file.path).relative_to(data_dir).as_posix(): (file.task, file.format, file.records)
        for file in report.files
    }
    assert found.items() <= FILES.items()


@pytest.mark.parametrize(
    ("name", "probes"),
    [
        ("knowedit/Sanitation/trivia_qa_test.json", {"unrelated/trivia_qa": 453}),
        ("zsre/zsre_mend_edit.json", {"portability/one_hop": 852, "rephrase/rephrase": 852, "unrelated/nq": 852}),
        (
            "counterfact/counterfact.json",
            {"locality/neighborhood": 7310, "portability/one_hop": 731, "rephrase/paraphrase": 1462},
        ),
        ("mquake/MQuAKE-hard.json", {"portability/multi_hop": 900, "rephrase/single_hop": 1200}),
        ("wise/temporal-edit.json", {"rephrase/ood": 75, "unrelated/web": 75}),
        ("wikibigedit/wikibigedit_3k.json", {"locality/near_subject": 1500, "rephrase/rephrase": 1500}),
        ("qaedit/QAEdit_inter_1k.json", {"rephrase/rephrase": 500, "unrelated/nq": 2500}),
        ("portability/zsre_inverse_relation.json", {"portability/inverse": 190, "rephrase/rephrase": 190}),
        ("portability/zsre_subject_replace.json", {"portability/subject_alias": 150, "rephrase/rephrase": 150}),
        (
            "portability/counterfact_subject_replace.json",
            {"locality/neighborhood": 1100, "portability/subject_alias": 110, "rephrase/paraphrase": 220},
        ),
        (
            "hallueditbench/event_history.csv",
            {"locality/same_subject": 74}
            | {f"portability/{name}": 74 for name in ("2hop", "3hop", "4hop", "5hop", "6hop", "reversed")}
            | {f"rephrase/{name}": 74 for name in ("multiple_choice", "no", "paraphrase", "yes")},
        ),
        (
            "knowedit/wiki_counterfact/test_cf.json",
            {
                "locality/Forgetfulness": 329,
                "locality/Relation_Specificity": 3810,
                "portability/Logical_Generalization": 320,  # 332 in the file, 12 of them without an answer
                "portability/Reasoning": 1523,  # 1,527 in the file, 4 without
                "portability/Subject_Aliasing": 1680,
            },
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_probe_counts(data_dir: Path, name: str, probes: dict[str, int]) -> None:
    if not (data_dir / name).is_file():
        pytest.skip(f"{name} is not in {data_dir}")
    assert load_requests(data_dir / name).probe_counts() == probes


def test_both_targets_of_mend(data_dir: Path) -> None:
    path = data_dir / "zsre/zsre_mend_edit.json"
    alt, answers = load_requests(path), load_requests(path, target="answers")
    assert sum(a.target_new == b.target_new for a, b in zip(alt.requests, answers.requests, strict=True)) < 100
    assert (alt.options["target"], answers.options["target"]) == ("alt", "answers")


def test_convsent_directions_are_balanced(data_dir: Path) -> None:
    data = load_requests(data_dir / "knowedit/convsent/blender_test.json", seed=0)
    positive = load_requests(data_dir / "knowedit/convsent/blender_test.json", direction="positive")
    same = sum(a.target_new == b.target_new for a, b in zip(data.requests, positive.requests, strict=True))
    assert 250 < same < 350


def test_mquake_cases_have_four_edits(data_dir: Path) -> None:
    data = load_requests(data_dir / "mquake/MQuAKE-hard.json", limit=20, seed=1)
    assert Counter(map(len, data.cases)) == {4: 20}


def test_unrelated_pool_of_natural_questions(data_dir: Path) -> None:
    path = data_dir / "zsre/zsre_mend_eval.json"
    everything = unrelated_probes(path)
    assert len(everything) == 1610
    assert all(p.answers and not p.prompt.lower().startswith("nq question") for p in everything)
    data = load_requests(
        data_dir / "knowedit/wiki_recent/recent_test.json", limit=200, unrelated=path, unrelated_per_record=3
    )
    asked = {p.prompt for r in data.requests for p in r.probes_of("unrelated")}
    assert len(asked) == 256


def subjects(data: LoadedData) -> set[str | None]:
    return {request.subject for request in data.requests}


def test_tuning_records_disjoint_from_test_records(data_dir: Path) -> None:
    tuning = load_requests(data_dir / "zsre/zsre_mend_eval.json")
    test = load_requests(data_dir / "zsre/zsre_mend_edit.json")
    left = tuning.without(test)
    assert len(subjects(tuning) & subjects(test)) == 45
    assert not subjects(left) & subjects(test)
    assert 45 <= len(tuning) - len(left) < 100


@pytest.mark.parametrize(
    ("tuning", "tests"),
    [
        ("zsre/zsre_mend_eval.json", ["knowedit/ZsRE/ZsRE-test-all.json"]),
        ("counterfact/counterfact-val.json", ["counterfact/counterfact.json", "counterfact/counterfact-edit.json"]),
        ("counterfact/counterfact-train.json", ["counterfact/counterfact.json", "counterfact/counterfact-edit.json"]),
    ],
)
def test_cleaned_files_share_nothing_with_the_test_files(data_dir: Path, tuning: str, tests: list[str]) -> None:
    if missing := [name for name in (tuning, *tests) if not (data_dir / name).is_file()]:
        pytest.skip(f"{missing[0]} is not in {data_dir}")
    data = load_requests(data_dir / tuning)
    for name in tests:
        assert len(data.without(load_requests(data_dir / name))) == len(data)
