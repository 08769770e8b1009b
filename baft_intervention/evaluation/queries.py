"""From a request to rows of token ids: what is asked about an edit, and how little must be computed for it.

A request and its probes become :class:`Question`\\ s; each question's answers become :class:`Query`\\ s (one prompt,
one answer, ids apart); queries become :class:`TokenRow`\\ s, the sequences that go through the model. The last answer token
is never an input, and a query whose input begins another's of the same prompt shares its row: all one-token
answers of a prompt cost one row. Rows are packed into right-padded batches by :func:`pack`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..errors import RequestError
from ..models.tokenization import encode_pair, encode_prompt
from ..requests import EditRequest
from .metrics import lead_tokens

REPLY_GROUPS = ("sentiment", "other_topic")  # ConvSent's groups: their answers are replies, several are scored
_BATCH_OVERHEAD = 24  # cost of starting one more batch, in tokens (measured: 30 ms against 2.1 ms a token on one core)


@dataclass(frozen=True)
class Question:
    """A probe, or the edit itself (kind ``edit``), with the queries that score it.

    Args:
        wanted: indices of the queries of its answers (of the bare prompt where it has none).
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
    """A prompt and one answer; an empty ``target_ids`` asks for the one prediction after the prompt.

    Args:
        lead: white-space tokens at the beginning of the answer that are left out of accuracies.
        divergence: whether the whole distribution is compared with the unedited model's.
    """

    prompt: str
    prompt_ids: tuple[int, ...]
    target_ids: tuple[int, ...]
    lead: int
    divergence: bool

    @property
    def width(self) -> int:
        """How many predictions are read."""
        return max(1, len(self.target_ids))


@dataclass
class TokenRow:
    """A sequence for the model; predictions are read at ``len(prompt) - 1 + j`` for ``j < width``."""

    prompt_length: int
    ids: tuple[int, ...]
    width: int


@dataclass
class RecordQueries:
    """Everything that is asked about one request."""

    request: EditRequest
    questions: list[Question] = field(default_factory=list)
    queries: list[Query] = field(default_factory=list)


def make_record_queries(
    request: EditRequest, tokenizer: Any, *, replies: int = 4, contrasts: int = 1, context: int | None = None
) -> RecordQueries:
    """The questions about a request and their queries.

    Args:
        request: the edit, whose probes are asked.
        tokenizer: gives the ids; boundaries between prompt and answer come from concatenated ids.
        replies: for ConvSent's groups, how many answers and contrasts are scored, evenly spaced; 0 for all. Elsewhere
            the first answer is scored (as EasyEdit scores ``ground_truth[0][0]``).
        contrasts: how many contrasts are scored elsewhere; 0 for all.
        context: longest sequence that the model can read.

    Raises:
        RequestError: a sequence longer than ``context``, or a text that the tokenizer makes no token of.
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
    tokenizer: Any, prompt: str, target: str | None, divergence: bool, context: int | None = None, where: str = ""
) -> Query:
    """Encode one prompt and answer."""
    if target is None:
        prompt_ids, target_ids, lead = encode_prompt(tokenizer, prompt), [], 0
    else:
        prompt_ids, target_ids = encode_pair(tokenizer, prompt, target)
        lead = lead_tokens([tokenizer.decode([i]) for i in target_ids])
    if context and len(prompt_ids) + len(target_ids) > context:
        raise RequestError(
            f"{where}: {len(prompt_ids) + len(target_ids)} tokens of prompt and answer, but the model reads {context} "
            f"at most; shorten {prompt[:60]!r} or leave this record out"
        )
    return Query(prompt, tuple(prompt_ids), tuple(target_ids), lead, divergence)


def spaced(items: Sequence[str], count: int) -> tuple[str, ...]:
    """``count`` of the items, evenly spaced and the first among them; all for 0."""
    if count <= 0 or len(items) <= count:
        return tuple(items)
    return tuple(items[i * len(items) // count] for i in range(count))


def make_rows(
    queries: Sequence[Query], prompt_ids: Callable[[Query], tuple[int, ...]] | None = None
) -> tuple[list[TokenRow], list[int]]:
    """The fewest rows that hold all queries, and each query's row.

    Args:
        queries: what is asked.
        prompt_ids: ids of a query's prompt as the edited model sees it; its own where left out.
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
    """Rows in batches, so that padding and the number of batches together cost least.

    Rows are sorted by length; the cut points minimise ``sum (batch size * longest row + overhead)``. A
    batch holds at most ``token_budget`` padded tokens and ``read_budget`` predictions (a single row always fits).
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
