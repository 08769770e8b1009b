"""From a request to the fewest rows of token ids that score it.

A request and its probes become :class:`Question`\\ s; each question's answers become :class:`Query`\\ s (one prompt and
one answer, encoded apart); queries become :class:`TokenRow`\\ s, the sequences that go through the model. The last answer token
is never an input, and a query whose input is the beginning of another's shares its row: all one-token answers to a
prompt cost one row. :func:`pack` sorts rows into right-padded batches.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..errors import RequestError
from ..models.tokenization import encode_pair, encode_prompt
from ..requests import EditRequest
from .metrics import lead_tokens

REPLY_GROUPS = ("sentiment", "other_topic")  # ConvSent's groups: several of their answers are scored
_BATCH_OVERHEAD = 24  # cost of one more batch, in tokens (measured: 30 ms against 2.1 ms per token on one core)


@dataclass(frozen=True)
class Question:
    """A probe, or the edit itself (kind ``edit``), with the queries that score it.

    Args:
        wanted: indices of the queries of its answers; without answers, of the bare prompt.
        against: indices of the queries of its contrasts.
    """

    kind: str
    group: str
    prompt: str
    answers: tuple[str, ...]
    wanted: tuple[int, ...]
    against: tuple[int, ...]


@dataclass(frozen=True)
class Query:
    """A prompt and one answer; with empty ``target_ids``, only the next token after the prompt is predicted.

    Args:
        lead: number of white-space tokens at the beginning of the answer, which accuracies leave out.
        divergence: whether to compare the whole distribution with the unedited model's.
    """

    prompt: str
    prompt_ids: tuple[int, ...]
    target_ids: tuple[int, ...]
    lead: int
    divergence: bool

    @property
    def width(self) -> int:
        """Number of predictions to read."""
        return max(1, len(self.target_ids))


@dataclass
class TokenRow:
    """A sequence for the model; predictions are read at ``len(prompt) - 1 + j`` for ``j < width``."""

    prompt_length: int
    ids: tuple[int, ...]
    width: int


@dataclass
class RecordQueries:
    """All questions about one request, and their queries."""

    request: EditRequest
    questions: list[Question] = field(default_factory=list)
    queries: list[Query] = field(default_factory=list)


def make_record_queries(
    request: EditRequest, tokenizer: Any, *, replies: int = 4, contrasts: int = 1, context: int | None = None
) -> RecordQueries:
    """The questions about a request and their queries.

    Args:
        request: the edit and its probes.
        tokenizer: the model's tokenizer; it encodes prompt and answer apart.
        replies: how many answers and contrasts to score in ConvSent's groups, evenly spaced; 0 for all. Other groups
            score the first answer (as EasyEdit scores ``ground_truth[0][0]``).
        contrasts: how many contrasts to score in other groups; 0 for all.
        context: the longest sequence that the model can read.

    Raises:
        RequestError: a sequence is longer than ``context``, or the tokenizer gives no tokens for a text.
    """
    record = RecordQueries(request)
    index: dict[tuple[Any, ...], int] = {}

    def query(prompt: str, target: str | None, divergence: bool) -> int:
        key = (prompt, target, divergence)
        if key not in index:
            index[key] = len(record.queries)
            record.queries.append(make_query(tokenizer, prompt, target, divergence, context, request.where))
        return index[key]

    def add(kind: str, group: str, prompt: str, answers: tuple[str, ...], contrast: tuple[str, ...]) -> None:
        still = kind in ("locality", "unrelated")
        few = replies if group in REPLY_GROUPS else 1
        chosen = spaced(answers, few)
        wanted = [query(prompt, a, still) for a in chosen] or ([query(prompt, None, True)] if still else [])
        many = replies if group in REPLY_GROUPS else contrasts
        against = [query(prompt, c, False) for c in spaced(contrast, many)] if wanted else []
        record.questions.append(Question(kind, group, prompt, answers, tuple(wanted), tuple(against)))

    sentiment = any(p.group == "sentiment" for p in request.probes)
    add("edit", "", request.prompt, (request.target_new,), () if sentiment else request.target_true)
    for probe in request.probes:
        answers = probe.answers or ((request.target_new,) if probe.kind == "rephrase" else ())
        add(probe.kind, probe.group, probe.prompt, answers, probe.contrast)
    return record


def make_query(
    tokenizer: Any, prompt: str, target: str | None, divergence: bool, context: int | None = None, source: str = ""
) -> Query:
    """Encode one prompt and answer."""
    if target is None:
        prompt_ids, target_ids, lead = encode_prompt(tokenizer, prompt), [], 0
    else:
        prompt_ids, target_ids = encode_pair(tokenizer, prompt, target)
        lead = lead_tokens([tokenizer.decode([i]) for i in target_ids])
    if context and len(prompt_ids) + len(target_ids) > context:
        raise RequestError(
            f"{source}: prompt and answer have {len(prompt_ids) + len(target_ids)} tokens, but the model reads at most "
            f"{context}; shorten {prompt[:60]!r} or leave this record out"
        )
    return Query(prompt, tuple(prompt_ids), tuple(target_ids), lead, divergence)


def spaced(items: Sequence[str], count: int) -> tuple[str, ...]:
    """``count`` of the items, evenly spaced from the first on; all for 0."""
    if count <= 0 or len(items) <= count:
        return tuple(items)
    return tuple(items[i * len(items) // count] for i in range(count))


def make_rows(
    queries: Sequence[Query], prompt_ids: Callable[[Query], tuple[int, ...]] | None = None
) -> tuple[list[TokenRow], list[int]]:
    """The fewest rows that hold all queries, and each query's row.

    Args:
        queries: the queries.
        prompt_ids: gives the ids of a query's prompt as the edited model sees it; by default the query's own.
    """
    rows: list[TokenRow] = []
    place = [0] * len(queries)
    by_prompt: dict[tuple[int, ...], list[int]] = {}
    inputs = [((prompt_ids(q) if prompt_ids else q.prompt_ids), q.target_ids[:-1]) for q in queries]
    for i in sorted(range(len(queries)), key=lambda i: (-len(inputs[i][1]), i)):
        prompt, rest = inputs[i]
        for r in by_prompt.setdefault(prompt, []):
            if rows[r].ids[len(prompt) : len(prompt) + len(rest)] == rest:
                place[i] = r
                rows[r].width = max(rows[r].width, queries[i].width)
                break
        else:
            place[i] = len(rows)
            by_prompt[prompt].append(len(rows))
            rows.append(TokenRow(len(prompt), prompt + rest, queries[i].width))
    return rows, place


def pack(rows: Sequence[TokenRow], *, token_budget: int = 4096, read_budget: int = 512) -> list[list[int]]:
    """Divide rows into batches at the least cost of padding and of starting batches.

    Rows are sorted by length; the cut points minimise ``sum (batch size * longest row + overhead)``. A
    batch holds at most ``token_budget`` padded tokens and ``read_budget`` predictions, or a single row.
    """
    order = sorted(range(len(rows)), key=lambda i: (-len(rows[i].ids), i))
    best = [0.0] + [float("inf")] * len(order)  # least cost of the first n rows
    cut = [0] * (len(order) + 1)
    for start in range(len(order)):
        longest, reads = len(rows[order[start]].ids), 0
        for end in range(start + 1, len(order) + 1):
            reads += rows[order[end - 1]].width
            tokens = (end - start) * longest
            if end > start + 1 and (tokens > token_budget or reads > read_budget):
                break
            cost = best[start] + tokens + _BATCH_OVERHEAD
            if cost < best[end]:
                best[end], cut[end] = cost, start
    batches: list[list[int]] = []
    end = len(order)
    while end:
        batches.append(order[cut[end] : end])
        end = cut[end]
    return batches[::-1]
