"""Which files are test data, so that no settings are tuned on them.

Settings chosen on the reported records make every number too good, and a result file does not show it. Code that searches
for settings calls :func:`refuse_test_files` first.

A file's split follows from its name in the table below, in any folder; else from a word in the name
(``my_facts_test.json`` is test). Other files have no split.

Decisions:
    * CounterFact as ROME publishes it has one part, on which all papers report: test. EasyEdit's ``counterfact-edit.json``
      holds some of the same records: test. ``counterfact-train.json`` and ``counterfact-val.json`` are for tuning.
    * ``zsre_mend_edit.json`` is WISE's and EasyEdit's test part. ``zsre_mend_eval.json`` is MEND's validation part, but ROME
      and MEMIT *report* on it, so do not tune on it what you compare with them. It shares questions and subjects with
      the test files: remove those with :meth:`LoadedData.without`.
    * HalluEditBench has topics instead of parts: the first six of these 13 in alphabetical order are validation, the
      others test.
    * WikiBigEdit, QAEdit and EasyEdit's portability files have one part each: test.
    * ``known_1000.json`` is not an editing benchmark: train.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

from ..errors import DataError

Split = Literal["train", "validation", "test"]

FILES: dict[str, Split] = {
    # KnowEdit
    "zsre-test-all.json": "test",
    "test_cf.json": "test",
    "train_cf.json": "train",
    "recent_test.json": "test",
    "recent_train.json": "train",
    "wikibio-test-all.json": "test",
    "wikibio-train-all.json": "train",
    "blender_test.json": "test",
    "blender_val.json": "validation",
    "blender_train.json": "train",
    "trivia_qa_test.json": "test",
    "trivia_qa_train.json": "train",
    # CounterFact
    "counterfact.json": "test",
    "multi_counterfact.json": "test",
    "counterfact-edit.json": "test",
    "counterfact-val.json": "validation",
    "counterfact-train.json": "train",
    # ZsRE in MEND's form
    "zsre_mend_edit.json": "test",
    "zsre_mend_eval.json": "validation",
    "zsre_mend_train.json": "train",
    "zsre_mend_train_10000.json": "train",
    # WISE
    "hallucination-edit.json": "test",
    "hallucination-train.json": "train",
    "temporal-edit.json": "test",
    "temporal-train.json": "train",
    # MQuAKE
    "mquake-cf.json": "test",
    "mquake-cf-3k.json": "test",
    "mquake-cf-3k-v2.json": "test",
    "mquake-t.json": "test",
    "mquake-hard.json": "test",
    "mquake-remastered.json": "test",
    # one part each
    "wikibigedit.json": "test",
    "wikibigedit_3k.json": "test",
    "qaedit.json": "test",
    "qaedit_inter_1k.json": "test",
    "counterfact_subject_replace.json": "test",
    "zsre_subject_replace.json": "test",
    "zsre_inverse_relation.json": "test",
    # HalluEditBench, one file for each topic
    "art_sculpture.csv": "validation",
    "business_corporation.csv": "validation",
    "entertainment_anime.csv": "validation",
    "entertainment_song.csv": "validation",
    "event_history.csv": "validation",
    "geography_forest.csv": "validation",
    "geography_volcano.csv": "test",
    "health_medication.csv": "test",
    "human_athlete.csv": "test",
    "human_scientist.csv": "test",
    "places_city.csv": "test",
    "places_landmark.csv": "test",
    "technology_programming_language.csv": "test",
    # ROME
    "known_1000.json": "train",
}

_WORDS: dict[str, Split] = {
    "test": "test",
    "train": "train",
    "training": "train",
    "val": "validation",
    "valid": "validation",
    "validation": "validation",
    "dev": "validation",
}


def split_of(path: str | Path) -> Split | None:
    """The split of a file, or None if its name does not say. A name with several splits counts as ``test`` if it says so."""
    name = Path(path).name.lower()
    if name in FILES:
        return FILES[name]
    found: set[Split] = {_WORDS[word] for word in re.split(r"[^a-z]+", name.rsplit(".", 1)[0]) if word in _WORDS}
    if "test" in found:
        return "test"
    return found.pop() if len(found) == 1 else None


def refuse_test_files(*paths: str | Path | Iterable[str | Path], purpose: str = "choosing settings") -> None:
    """Check that none of the files is test data.

    Raises:
        DataError: one is; the message lists training and validation files.
    """
    flat = [p for item in paths for p in ([item] if isinstance(item, (str, Path)) else item)]
    for path in flat:
        if split_of(path) == "test":
            others = ", ".join(name for name, split in FILES.items() if split != "test")
            raise DataError(
                f"{path} is test data and must not be used for {purpose}; take a training or validation file ({others})"
            )
