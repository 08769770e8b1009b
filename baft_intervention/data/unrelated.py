"""Questions that have nothing to do with any edit: does the edited model still answer them as before?

Locality on the same subject misses what an edit changes elsewhere. The usual unrelated texts are Natural-Questions
prompts, which ``zsre_mend_eval.json`` has as ``loc``/``loc_ans``. Any JSON, JSON Lines, CSV or plain text file (one
question per line) works too; use one now and then, since a locality penalty trained on questions works best on questions.

**Disjoint from training.** A method trained on unrelated text must not be tested on the same text. :func:`split_pool` cuts
a pool into a part for training and a part for testing; ``exclude`` leaves out text that training brings itself. Prompts are
compared without case, punctuation and the prefix "nq question:".

**One pool per run.** All requests of a run share one small pool, because the model must answer each distinct prompt once
before the edits. The k-th request gets the k-th slice of it (:func:`attach_unrelated`).

The choice depends on the seed and the hash of each prompt, not on the file's order: a larger pool contains a smaller one of
the same seed, and a question added to the file displaces at most one.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from ..errors import DataError
from ..requests import EditRequest, Probe
from .files import SUFFIXES, RawRecord, Table, decode, read_file, rows_of_values, sha256_of_rows
from .record import Record, shown
from .zsre_mend import plain_question

GROUP = "nq"
# the fields of question and answer; MEND's first, since its records also have a prompt
_FIELDS = (("loc", "loc_ans"), ("question", "answers"), ("question", "answer"), ("question", "ground_truth"))
_FIELDS += (("prompt", "answers"), ("prompt", "answer"), ("prompt", "ground_truth"), ("text", ""))

Texts = str | Path | Iterable[str | Mapping[str, object] | Probe]


def normalised(prompt: str) -> str:
    """A prompt's words in lower case, without "nq question:"; equal for two prompts that are the same question."""
    return " ".join(re.findall(r"\w+", plain_question(prompt).casefold()))


def read_pool(source: Texts, *, group: str = GROUP) -> tuple[Probe, ...]:
    """All distinct questions of a file or list, as ``unrelated`` probes in the source's order.

    Args:
        source: a path (JSON, JSON Lines, CSV; any other suffix is plain text, one question per line), or a list of
            texts, of objects with ``loc``/``loc_ans``, ``question``/``answer`` or ``prompt``/``answers``, or of probes.
        group: the probes' group.

    Raises:
        DataError: the file cannot be read, or a row has no question.
    """
    return _pool(pool_table(source), group)


def pool_table(source: Texts) -> Table:
    """The rows of a pool, see :func:`read_pool`."""
    if isinstance(source, (str, Path)):
        path = Path(source)
        return read_file(path) if path.suffix.lower() in SUFFIXES or path.is_dir() else _read_lines(path)
    values = [probe.to_dict() if isinstance(probe, Probe) else probe for probe in source]
    return Table("<texts>", "<texts>", rows_of_values(values), sha256=sha256_of_rows(values))


def _pool(table: Table, group: str) -> tuple[Probe, ...]:
    if table.document is not None:
        raise DataError(f"{table.name}: the top level is one object; a pool is a list of questions, or JSON Lines")
    siblings = [row.value for row in table.rows]
    found: dict[str, Probe] = {}
    for position, row in enumerate(table.rows):
        if isinstance(row.value, str):
            row = replace(row, value={"text": row.value})
        record = Record.of_row(table, row, position, siblings, notes=Counter())
        fields = next((pair for pair in _FIELDS if record.has(pair[0]) and (not pair[1] or record.has(pair[1]))), None)
        fields = fields or next(((question, "") for question, _ in _FIELDS if record.has(question)), None)
        if fields is None:
            raise DataError(
                f"{record.place}: no question found; give 'question' and 'answer', 'loc' and 'loc_ans', or plain texts; "
                f"got {shown(record.data)}"
            )
        prompt = plain_question(record.text(fields[0]))
        if not normalised(prompt):
            raise record.error(fields[0], f"has no words: {prompt!r}")
        answers = record.answers(fields[1]) if fields[1] else ()
        for probe in record.probe(prompt, "unrelated", answers, group=group):
            found.setdefault(normalised(prompt), probe)
    return tuple(found.values())


def _read_lines(path: Path) -> Table:
    name = str(path)
    try:
        raw = path.read_bytes()
    except (OSError, ValueError) as error:
        raise DataError(f"{name}: cannot be read ({error}); give a file of questions") from None
    lines = decode(raw, name).split("\n")
    rows = tuple(RawRecord(line.strip(), f"line {i}") for i, line in enumerate(lines, 1) if line.strip())
    if not rows:
        raise DataError(f"{name} is empty; give one question a line")
    return Table(name, path.name, rows, sha256=hashlib.sha256(raw).hexdigest(), path=name)


def _ranked(pool: Iterable[Probe], seed: int) -> list[Probe]:
    def rank(probe: Probe) -> bytes:
        return hashlib.sha256(f"{seed}\0{normalised(probe.prompt)}".encode("utf-8", "surrogatepass")).digest()

    return sorted(pool, key=rank)


def unrelated_probes(
    source: Texts, n: int | None = None, *, exclude: Iterable[str] = (), seed: int = 0, group: str = GROUP
) -> tuple[Probe, ...]:
    """``n`` questions of a pool, chosen by the seed, none of them in ``exclude``.

    Args:
        source: see :func:`read_pool`.
        n: how many; None for all that are left.
        exclude: prompts that training has used, or that the edits themselves ask.
        seed: draws the choice and the order.
        group: the probes' group.

    Raises:
        DataError: fewer than ``n`` questions are left.
    """
    return choose_questions(pool_table(source), n, exclude, seed, group)


def choose_questions(table: Table, n: int | None, exclude: Iterable[str], seed: int, group: str) -> tuple[Probe, ...]:
    """:func:`unrelated_probes` of a pool that is already read."""
    pool = _pool(table, group)
    used = {normalised(prompt) for prompt in exclude}
    left = _ranked((probe for probe in pool if normalised(probe.prompt) not in used), seed)
    if n is None:
        return tuple(left)
    if n < 0 or n > len(left):
        raise DataError(
            f"{table.name}: {n} unrelated questions wanted, but {len(left)} left of {len(pool)} distinct ones "
            f"({len(pool) - len(left)} excluded); take fewer or give a larger file"
        )
    return tuple(left[:n])


def split_pool(
    source: Texts, train: int, ask: int, *, exclude: Iterable[str] = (), seed: int = 0, group: str = GROUP
) -> tuple[tuple[str, ...], tuple[Probe, ...]]:
    """Disjoint parts of one pool: ``(texts to train on, probes to ask)``.

    The probes do not depend on ``train``: they are ``unrelated_probes(source, ask)`` with the same seed.
    """
    chosen = unrelated_probes(source, train + ask, exclude=exclude, seed=seed, group=group)
    return tuple(probe.prompt for probe in chosen[ask:]), chosen[:ask]


def attach_unrelated(
    requests: Sequence[EditRequest], pool: Sequence[Probe], per_record: int
) -> tuple[EditRequest, ...]:
    """The requests with ``per_record`` probes of the pool each: the k-th request gets the k-th slice, cyclically.

    Raises:
        DataError: the pool is smaller than one slice.
    """
    if per_record < 0 or (per_record and per_record > len(pool)):
        raise DataError(f"{per_record} unrelated probes wanted for each record, but the pool has {len(pool)}")
    found = []
    for k, request in enumerate(requests):
        slice_ = (pool[(k * per_record + j) % len(pool)] for j in range(per_record))
        found.append(replace(request, probes=(*request.probes, *slice_)))
    return tuple(found)
