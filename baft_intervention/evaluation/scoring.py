"""The scorer: every question about one or many edits in few forward passes.

    scorer = Scorer(model, tokenizer)
    scorer.prepare(requests)                  # the unedited model's answers, once
    edited = method.edit(model, tokenizer, [request])
    [scores] = scorer.score(edited, [request])
    scores.metrics["reliability"], scores.metrics["locality"], ...

What makes it fast: one batch a few lengths instead of one pass a probe; no second pass for the unedited model; logits
at answer positions only; one row for all one-token answers of a prompt; blocks below the edit skipped. What keeps it
right: the skipped work is verified against the full computation at first use, and the result does not depend on
which records were scored before.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import EditError
from ..models.fingerprint import model_fingerprint
from ..models.structure import compute_device, find_blocks
from ..models.tokenization import encode_prompt, pad_rows, pad_token_id
from ..requests import EditRequest
from .baseline_outputs import BaselineCache, BaselineOutputs, baseline_key, code_version
from .edited import EditedModel
from .forward import BlockInput, LogitReader, recorded_block_inputs, resume_at
from .metrics import kl_divergence
from .queries import Query, RecordQueries, TokenRow, make_record_queries, make_rows, pack

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class QueryScore:
    """The edited model on one query, beside the unedited one.

    Args:
        predicted, before: argmax ids of the edited and of the unedited model, one a position.
        log_probs, log_probs_before: log-probabilities of the target's tokens (nats).
        divergence: ``KL(unedited || edited)`` at each position (nats); empty where it is not asked for.
    """

    query: Query
    predicted: tuple[int, ...]
    before: tuple[int, ...]
    log_probs: tuple[float, ...]
    log_probs_before: tuple[float, ...]
    divergence: tuple[float, ...]


class Scorer:
    """Evaluates edited models of one base model.

    Args:
        model: the base model, unedited while :meth:`prepare` runs.
        tokenizer: its tokenizer.
        resume_depths: where edited models may resume, as fractions of the depth: what enters these blocks is kept
            with the unedited model's answers (fp32, ``4 d`` bytes a token and block), and an edited model begins at the
            last of them that is not above its :attr:`EditedModel.first_changed_block`. Empty keeps nothing.
        keep_log_probs: keep the unedited model's whole log-probabilities instead of hidden states; needed for methods that
            change the output head, and large.
        replies, contrasts: see :func:`~baft_intervention.evaluation.queries.make_record_queries`.
        token_budget: padded tokens a batch.
        cache: folder of the unedited model's answers, or a store; in memory where left out.
        fingerprint: of the model's parameters, where known; computed otherwise.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        resume_depths: Sequence[float] = (1 / 2, 2 / 3, 5 / 6),
        keep_log_probs: bool = False,
        replies: int = 4,
        contrasts: int = 1,
        token_budget: int = 4096,
        cache: BaselineCache | str | None = None,
        fingerprint: str | None = None,
    ) -> None:
        self.model, self.tokenizer = model, tokenizer
        depth = len(find_blocks(model))
        self.resume_blocks = tuple(sorted({b for x in resume_depths if 0 < (b := round(x * depth)) < depth}))
        self.keep_log_probs = keep_log_probs
        self.replies, self.contrasts, self.token_budget = replies, contrasts, token_budget
        self.store = cache if isinstance(cache, BaselineCache) else BaselineCache(cache)
        self.reader = LogitReader(model)
        self.fingerprint = fingerprint or model_fingerprint(model)
        self._settings: dict[str, Any] | None = None
        self._queries: dict[EditRequest, RecordQueries] = {}
        self._resume_checked = self._resume_refused = False

    @property
    def context(self) -> int | None:
        config = self.model.config
        return getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)

    @property
    def read_budget(self) -> int:
        """Predictions a batch: their logits are to stay under 100 MB in fp32."""
        return max(32, 2**25 // (4 * int(self.model.get_output_embeddings().weight.shape[0])) * 3)

    def queries(self, request: EditRequest) -> RecordQueries:
        """The questions about a request; kept for the next call."""
        if request not in self._queries:
            if len(self._queries) > 4096:
                self._queries.clear()
            self._queries[request] = make_record_queries(
                request, self.tokenizer, replies=self.replies, contrasts=self.contrasts, context=self.context
            )
        return self._queries[request]

    # --- before the edit ------------------------------------------------------------------------------------------------

    def prepare(self, requests: Iterable[EditRequest], progress: Callable[[int], None] | None = None) -> int:
        """See to it that the unedited model's answers are there; gives how many had to be computed.

        Call it while the model is unedited. Each record is computed by itself, so that its answers do not
        depend on the others.
        """
        self._check_reader()
        computed = 0
        for request in requests:
            record = self.queries(request)
            rows, place = make_rows(record.queries)
            key = self._key(record, rows)
            if self.store.get(key, record.queries) is None:
                self.store.put(key, self._baseline_outputs(record, rows, place))
                computed += 1
            if progress:
                progress(1)
        return computed

    def baseline(self, request: EditRequest, *, blocks: Sequence[int] = ()) -> BaselineOutputs:
        """The unedited model's answers, with the inputs of ``blocks``.

        Raises:
            RuntimeError: :meth:`prepare` has not seen the request; it is not computed here, where an edit may be on.
        """
        record = self.queries(request)
        found = self.store.get(self._key(record, make_rows(record.queries)[0]), record.queries, blocks=blocks)
        if found is None:
            raise RuntimeError(f"{request.where}: no answers of the unedited model; call prepare() before editing")
        return found

    def _check_reader(self) -> None:
        """Find out whether the head can be read alone: what is kept of the unedited model depends on it."""
        if self.reader.selective is None:
            ids, mask = self._pad([TokenRow(1, tuple(encode_prompt(self.tokenizer, "one two three")), 1)])
            self.reader(ids, mask, *self._indices(([0], [ids.shape[1] - 1])))

    def _key(self, record: RecordQueries, rows: list[TokenRow]) -> str:
        if self._settings is None:
            import transformers

            weight, device = self.model.get_input_embeddings().weight, compute_device(self.model).type
            self._settings = {
                "model": self.fingerprint,
                "code": code_version(),
                "torch": torch.__version__,
                "transformers": transformers.__version__,
                "device": device,
                "dtype": str(weight.dtype),
                "attention": getattr(self.model.config, "_attn_implementation", None),
                "threads": torch.get_num_threads() if device == "cpu" else None,
                "resume_blocks": self.resume_blocks,
                "log_probs": self.keep_log_probs,
                "token_budget": self.token_budget,
            }
        return baseline_key(record.queries, rows, self._settings)

    @torch.no_grad()
    def _baseline_outputs(self, record: RecordQueries, rows: list[TokenRow], place: list[int]) -> BaselineOutputs:
        predicted: list[list[int]] = [[] for _ in record.queries]
        log_probs: list[list[float]] = [[] for _ in record.queries]
        states: list[torch.Tensor | None] = [None] * len(record.queries)
        inputs: dict[int, list[torch.Tensor]] = {b: [torch.empty(0)] * len(rows) for b in self.resume_blocks}
        as_tuple = False
        for batch in pack(rows, token_budget=self.token_budget, read_budget=self.read_budget):
            ids, mask = self._pad([rows[r] for r in batch])
            indices = _places(rows, batch)
            with recorded_block_inputs(self.model, self.resume_blocks) as seen:
                logits, hidden, _ = self.reader(ids, mask, *self._indices(indices))
            for block in seen:
                as_tuple = block.as_tuple
                for b, r in enumerate(batch):
                    inputs[block.layer][r] = block.hidden[b, : len(rows[r].ids)].cpu()
            normal = logits.float().logsumexp(-1)
            keep = logits.float() - normal.unsqueeze(-1) if self.keep_log_probs or hidden is None else hidden
            argmax = logits.argmax(-1).tolist()
            first = _first_read(rows, batch)
            for q, query in enumerate(record.queries):
                if place[q] not in first:
                    continue
                start = first[place[q]]
                predicted[q] = argmax[start : start + query.width]
                log_probs[q] = _target_log_probs(logits, normal, start, query)
                if query.divergence:
                    states[q] = keep[start : start + query.width].cpu()
        kept = [s for s in states if s is not None]
        return BaselineOutputs(
            predicted,
            log_probs,
            torch.cat(kept) if kept else torch.zeros(0, 1),
            {block: torch.cat(parts) for block, parts in inputs.items()},
            as_tuple,
        )

    # --- after the edit -------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def score(self, edited: EditedModel, requests: Sequence[EditRequest]) -> list[list[QueryScore]]:
        """The edited model on all questions of the requests, batched together; one list of scores a request.

        Raises:
            RuntimeError: a request that :meth:`prepare` has not seen.
            EditError: the edited model's logits are not finite.
        """
        self._check_reader()
        records = [self.queries(r) for r in requests]
        block = max((b for b in self.resume_blocks if b <= edited.first_changed_block), default=0)
        baselines = [self.baseline(r, blocks=(block,) if block else ()) for r in requests]
        queries = [q for record in records for q in record.queries]
        owner = [i for i, record in enumerate(records) for _ in record.queries]
        texts = {q.prompt: edited.rewrite(q.prompt) for q in queries}
        same = all(text == prompt for prompt, text in texts.items())
        if same:
            rows, place, inputs = self._joined(records, baselines, block)
        else:
            ids = {prompt: tuple(encode_prompt(self.tokenizer, text)) for prompt, text in texts.items()}
            rows, place = make_rows(queries, lambda q: ids[q.prompt])
            inputs = []
        states = [
            s for record, baseline in zip(records, baselines, strict=True) for s in _split_states(record, baseline)
        ]
        found: list[tuple[list[int], list[float], list[float]]] = [([], [], [])] * len(queries)
        for batch in pack(rows, token_budget=self.token_budget, read_budget=self.read_budget):
            self._score_batch(
                edited, rows, batch, queries, place, states, (block, inputs, baselines[0].as_tuple), found
            )
        scores: list[list[QueryScore]] = [[] for _ in requests]
        number = [0] * len(requests)
        for q, query in enumerate(queries):
            baseline, local = baselines[owner[q]], number[owner[q]]
            number[owner[q]] += 1
            predicted, log_probs, divergence = found[q]
            scores[owner[q]].append(
                QueryScore(
                    query, tuple(predicted), tuple(baseline.predicted[local]),
                    tuple(log_probs), tuple(baseline.log_probs[local]), tuple(divergence),
                )
            )  # fmt: skip
        return scores

    def _joined(
        self, records: list[RecordQueries], baselines: list[BaselineOutputs], block: int
    ) -> tuple[list[TokenRow], list[int], list[torch.Tensor]]:
        """The records' own rows one after another, with what enters the resume block for each."""
        rows: list[TokenRow] = []
        place: list[int] = []
        inputs: list[torch.Tensor] = []
        for record, baseline in zip(records, baselines, strict=True):
            own, row_of = make_rows(record.queries)
            place += [len(rows) + r for r in row_of]
            rows += own
            if block in baseline.block_inputs:
                inputs += baseline.block_inputs[block].split([len(r.ids) for r in own])
        return rows, place, inputs if len(inputs) == len(rows) else []

    def _score_batch(self, edited, rows, batch, queries, place, states, kept, found) -> None:
        ids, mask = self._pad([rows[r] for r in batch])
        indices = _places(rows, batch)
        first = _first_read(rows, batch)
        here = [q for q in range(len(queries)) if place[q] in first]
        compared = [q for q in here if queries[q].divergence]
        hidden_kept = self.reader.selective and not self.keep_log_probs
        extra = torch.cat([states[q] for q in compared]).to(ids.device) if compared and hidden_kept else None
        block, inputs, as_tuple = kept
        use = inputs and not self._resume_refused
        start = _block_input(block, [inputs[r] for r in batch], ids, as_tuple) if use else None
        if not edited.head_intact and not self.keep_log_probs:
            raise RuntimeError("the edit changes the output head; make the Scorer with keep_log_probs=True")

        def run(begin: BlockInput | None) -> torch.Tensor:
            with edited.prompts([rows[r].prompt_length for r in batch]), resume_at(edited.model, begin):
                return self.reader(ids, mask, *self._indices(indices), extra=extra)[0]

        logits = run(start)
        if start is not None and not self._resume_checked:
            full = run(None)
            if (full - logits).abs().max() > 1e-3 * full.abs().max().clamp_min(1.0):
                logger.warning("resuming at block %d changes the logits; all blocks are computed", block)
                self._resume_refused = True
                logits = full
            self._resume_checked = True
        logits = logits.float()
        if not torch.isfinite(logits).all():
            raise EditError("the edited model's logits are not finite; lower the learning rate")
        reads = len(indices[0])
        normal = logits.logsumexp(-1)
        argmax = logits[:reads].argmax(-1).tolist()
        offset = reads
        for q in here:
            query, at = queries[q], first[place[q]]
            divergence: list[float] = []
            if query.divergence:
                after = logits[at : at + query.width] - normal[at : at + query.width, None]
                if extra is None:
                    before = states[q].to(after)
                else:
                    end = offset + query.width
                    before = logits[offset:end] - normal[offset:end, None]
                    offset = end
                divergence = kl_divergence(before, after).tolist()
            found[q] = (argmax[at : at + query.width], _target_log_probs(logits, normal, at, query), divergence)

    def _pad(self, rows: list[TokenRow]) -> tuple[torch.Tensor, torch.Tensor]:
        device = compute_device(self.model)
        ids, mask = pad_rows([r.ids for r in rows], pad_token_id(self.tokenizer))
        return ids.to(device), mask.to(device)

    def _indices(self, indices: tuple[list[int], list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        device = compute_device(self.model)
        return torch.tensor(indices[0], device=device), torch.tensor(indices[1], device=device)


def _block_input(block: int, rows: list[torch.Tensor], ids: torch.Tensor, as_tuple: bool) -> BlockInput:
    """Kept rows, padded as the batch is."""
    hidden = torch.zeros(*ids.shape, rows[0].shape[-1], dtype=rows[0].dtype)  # (B, T, d)
    for b, row in enumerate(rows):
        hidden[b, : len(row)] = row
    return BlockInput(block, hidden.to(ids.device), as_tuple)


def _places(rows: Sequence[TokenRow], batch: Sequence[int]) -> tuple[list[int], list[int]]:
    """``(row in the batch, column)`` of every prediction that is read."""
    pairs = [(b, rows[r].prompt_length - 1 + j) for b, r in enumerate(batch) for j in range(rows[r].width)]
    return [p[0] for p in pairs], [p[1] for p in pairs]


def _first_read(rows: Sequence[TokenRow], batch: Sequence[int]) -> dict[int, int]:
    """Index of each row's first prediction among those of the batch."""
    first, count = {}, 0
    for r in batch:
        first[r] = count
        count += rows[r].width
    return first


def _target_log_probs(logits: torch.Tensor, normal: torch.Tensor, start: int, query: Query) -> list[float]:
    if not query.target_ids:
        return []
    at = torch.arange(start, start + query.width, device=logits.device)
    target = torch.tensor(query.target_ids, device=logits.device)
    return (logits[at, target].float() - normal[at]).tolist()


def _split_states(record: RecordQueries, baseline: BaselineOutputs) -> list[torch.Tensor | None]:
    widths = [q.width for q in record.queries if q.divergence]
    parts = iter(baseline.states.split(widths) if widths else ())
    return [next(parts) if q.divergence else None for q in record.queries]
