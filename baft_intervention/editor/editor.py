"""Editing a language model in a few calls."""

from __future__ import annotations

import logging
import os
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import nn
from tqdm.auto import tqdm

from ..config import BaftConfig
from ..errors import EditError, RequestError
from ..gates import FactWeighting, RelationEncoder
from ..gates.relation_encoder import read_layers
from ..models.structure import context_length, is_sharded
from ..requests import EditRequest
from ..runtime.adapter import Edit, edits_state
from ..runtime.distributed import from_main, gather, is_main, shard, unshard, world_size
from ..runtime.edit_stack import is_shared
from ..runtime.generation import generate_texts
from ..storage.compatibility import check_base, check_settings
from ..storage.exchange import read_directory
from ..storage.merge import MergeReport, OnConflict, check_same_coordinates, plan_merge
from ..training.bank import Bank, encode_texts, get_bank
from ..training.encoding import encode_requests
from ..training.engine import make_engine
from ..training.gate_initialisation import make_jobs
from ..training.relation_training import get_encoder
from ..training.types import EncodedRequest, Job, TrainingContext
from .persistence import PersistentEdits
from .report import EditReport, Superseded

logger = logging.getLogger(__name__)
_CHUNK = 64  # edits that the engine receives together
_OUTPUT_TEXTS = 16  # unrelated texts that the output loss uses
_SLACK = 1 << 20  # bytes that a log may always reach before it is compacted
_LONG = 12  # a target of more tokens may be too long for a late block
_LOWER = 2 / 3  # relative depth to suggest then: it reaches 86 % of WikiBio's tokens, nine tenths reaches 76 %


class BaftEditor(PersistentEdits):
    """Edits facts in a causal language model, and undoes edits.

    The base model's weights are never written: an edit is a small map on a block's output, applied by a hook.
    Several editors and your own hooks can share one model.

    Args:
        model: a Hugging Face causal language model.
        tokenizer: its tokenizer.
        config: settings; the defaults suit single facts.
        model_name: name of the base model in a saved adapter; by default read from the model.
        bank_texts: your own unrelated texts, from which the gate learns what to leave alone; by default the
            package's (see :mod:`baft_intervention.training.bank`).

    Example::

        editor = BaftEditor.from_pretrained("smollm2-135m")
        report = editor.edit(EditRequest("The capital of Japan is", "Osaka", subject="Japan"))
        editor.generate("The capital city of Japan is")
        editor.undo(report.edits[0].id)

    Raises:
        ConfigError: the model does not have one of the layers, or its hidden size is below the rank.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        config: BaftConfig | None = None,
        *,
        model_name: str | None = None,
        bank_texts: Sequence[str] | None = None,
    ):
        super().__init__(model, tokenizer, config, model_name=model_name, bank_texts=bank_texts)
        self._cached_bank: Bank | None = None

    # ------------------------------------------------------------------------------------------ editing

    def edit(self, requests: EditRequest | Sequence[EditRequest], *, progress: bool = False) -> EditReport:
        """Train and commit one or several edits; on an error, none of them.

        A later edit of a prompt supersedes the earlier one. An interrupt (Ctrl-C) keeps the finished edits.

        Several processes (see :mod:`~baft_intervention.runtime.distributed`) call it with the same requests and have the same edits
        afterwards. Competing edits are divided among the processes. A joint edit of several requests, and edits that
        add up, are trained by all processes together.

        Args:
            requests: what to change; conversations are rendered with the tokenizer's chat template, which is recorded.
            progress: show a progress bar with the remaining time.

        Raises:
            RequestError: the list is empty, two requests share a prompt, or a target has no tokens.
            PositionError: the position rule finds no token, e.g. because a subject is not in its prompt.
            EditError: the loss is not finite.
            StoreError: the editor's folder cannot be written to.
        """
        begin = time.perf_counter()
        encoded = self._check([requests] if isinstance(requests, EditRequest) else list(requests))
        items = [each.request for each in encoded]
        self.prepare()
        replaced = self._superseded(items)
        groups = [tuple(encoded)] if self.config.allocation == "joint" else [(each,) for each in encoded]
        before, waiting = self.edits, Superseded(replaced)
        done: list[Edit] = []
        marks = [self._store and self._store.mark()]  # positions in the log, after each finished edit
        engine = make_engine(self.model, self.tokenizer, self.config, self.adapter.layers)
        chunk = (
            _CHUNK * world_size() if self.adapter.routed else 1
        )  # updates that are summed train on top of the earlier edits
        progress = progress and is_main()
        bar = tqdm(total=len(groups), desc="editing", unit="edit", disable=not progress, dynamic_ncols=True)
        try:
            for edit in replaced:
                self.adapter.remove(edit.id)
            with self.adapter.enabled(False), bar:
                for first in range(0, len(groups), chunk):
                    for edit in self._trained(engine, groups[first : first + chunk]):
                        self._commit(edit, waiting.superseded_by(edit))
                        marks.append(self._store and self._store.mark())
                        done.append(edit)
                        bar.update()
        except KeyboardInterrupt:
            logger.warning("interrupted: %d of %d edits are finished and kept", len(done), len(groups))
            finished = {r.prompt for e in done for r in e.requests}
            self.adapter.set_edits([e for e in before if not {r.prompt for r in e.requests} <= finished] + done)
            self._roll_back(marks[len(done)])
            raise
        except BaseException:
            self.adapter.set_edits(before)
            self._roll_back(marks[0])
            raise
        if self._store is not None and self._store.log_bytes > 2 * self.adapter.stored_bytes() + _SLACK:
            self.compact()
        for edit in done:
            if self.config.reads_tokens and not all(request.subject for request in edit.requests):
                logger.warning(
                    "%s: no subject is given and the prompt has no name; the edit acts wherever a text asks this, whatever it is "
                    "about; give subject=", edit.requests[0].where,
                )  # fmt: skip
            if not edit.reached:
                logger.warning(
                    "%s: after %d steps the model does not produce the whole target (loss %.3f); %s",
                    edit.requests[0].where, edit.steps, edit.loss, self._hint(edit),
                )  # fmt: skip
        return EditReport(tuple(done), tuple(edit.id for edit in replaced), time.perf_counter() - begin)

    def _hint(self, edit: Edit) -> str:
        """How an edit may reach its target; a late block leaves few blocks to carry a long target to its later tokens."""
        longest = max(len(self.tokenizer(r.target_new)["input_ids"]) for r in edit.requests)
        lower = round(_LOWER * len(self.adapter.blocks))
        if longest > _LONG and max(self.adapter.layers) > lower:
            return f"its target has {longest} tokens; edit a lower block, layers=({lower},), or raise steps"
        return "raise steps or rank"

    def _trained(self, engine: Any, groups: Sequence[Sequence[EncodedRequest]]) -> Iterator[Edit]:
        """The edit of each group of requests, in order, as soon as it is trained; the same on all ranks."""
        if world_size() == 1:
            yield from engine.train_many(self._jobs(groups), self._surroundings())
        elif self.adapter.routed and self.config.allocation != "joint" and not is_sharded(self.model):
            around = self._surroundings()
            own = gather(lambda: list(engine.train_many(self._jobs(shard(groups)), around)))
            yield from unshard(own)
        else:  # all ranks call the model equally often, as sharded parameters require
            for job in self._jobs(groups):
                for module in job.maps.values():  # so that all ranks start from the same bits
                    module.load_state_dict(from_main(module.state_dict))
                yield engine.train_data_parallel(job, self._surroundings())

    def _jobs(self, groups: Sequence[Sequence[EncodedRequest]]) -> list[Job]:
        return make_jobs(
            self.model, self.tokenizer, self.config, self.adapter.layers, groups, shared=self.adapter.shared,
            bank=self._bank(),
        )  # fmt: skip

    def _superseded(self, items: Sequence[EditRequest]) -> list[Edit]:
        """Earlier edits whose prompts all occur in these requests."""
        prompts = {item.prompt: item for item in items}
        return [e for e in self.adapter.asking(prompts) if all(r.prompt in prompts for r in e.requests)]

    def _commit(self, edit: Edit, gone: Sequence[str]) -> None:
        """Write a finished edit and the removals that it causes to disk, then add the edit to the adapter."""
        if self._store is not None:
            self._store.append(gone, [edit.summary()], edits_state([edit]))
        self.adapter.add(edit)

    def _roll_back(self, mark: Any) -> None:
        if self._store is not None:
            self._store.rollback(mark)

    def undo(self, edit_id: str) -> Edit:
        """Undo one edit and return it.

        With a routed weighting (``cosine``), every edit has its own bases, so nothing of the undone edit remains. With
        summed updates (``constant``, ``linear``, ``mlp``), later edits were trained on top of it and stay unchanged.

        Raises:
            EditError: there is no edit with this id, or it is the id of a request that was trained jointly with others.
        """
        return self.undo_all([edit_id])[0]

    def undo_all(self, edit_ids: Sequence[str]) -> list[Edit]:
        """Undo several edits, as :meth:`undo` does; on an error, none of them."""
        edits = [self.find(name) for name in dict.fromkeys(edit_ids)]
        if self._store is not None and edits:
            self._store.append([edit.id for edit in edits])
        return [self.adapter.remove(edit.id) for edit in edits]

    def find(self, edit_id: str) -> Edit:
        """The edit with this id.

        Raises:
            EditError: there is none, or it is the id of a request that was trained jointly with others.
        """
        edit = self.adapter.find(edit_id)
        if edit is not None:
            return edit
        for edit in self.edits:
            if any(r.id == edit_id for r in edit.requests):
                raise EditError(
                    f"request {edit_id!r} was trained jointly in edit {edit.id!r}; undo that one as a whole"
                )
        known = ", ".join(e.id for e in self.edits[:10]) or "none"
        raise EditError(f"there is no edit {edit_id!r}; edits: {known}{' …' if len(self.adapter) > 10 else ''}")

    def merge(self, path: str | os.PathLike[str], *, on_conflict: OnConflict = "error") -> MergeReport:
        """Add the edits of an adapter folder with the same base model and settings; on an error, none of them.

        Edits that both adapters have stay as they are here. If the two answer a prompt differently, ``on_conflict``
        decides. A prompt and its paraphrase are two prompts: contradictions between them are not detected.

        Args:
            path: folder of the other adapter.
            on_conflict: ``error``, or whose answer to keep: ``ours`` (this editor's) or ``theirs``.

        Raises:
            AdapterError: the adapter is damaged or does not fit, its edits add up (see
                :func:`~.storage.merge.plan_merge`), or there are conflicts and ``on_conflict`` is ``error``.
        """
        state, description = from_main(lambda: read_directory(path))
        where = f"{os.fspath(path)}: "
        check_settings(BaftConfig.from_dict(description["config"], where=where), self.config, os.fspath(path))
        check_base(description, self.adapter, where)
        shared, theirs = self.adapter.read_state(state, description["edits"], where)
        if theirs:
            self.prepare()
            check_same_coordinates(self.adapter.shared, shared, where)
        coming, report = plan_merge(self.adapter, theirs, on_conflict)
        if self._store is not None and (coming or report.replaced):
            self._store.append(report.replaced, [edit.summary() for edit in coming], edits_state(coming))
        for name in report.replaced:
            self.adapter.remove(name)
        self.adapter.extend(coming)
        return report

    def _check(self, requests: Sequence[Any]) -> list[EncodedRequest]:
        """Render, encode and check the requests of one call."""
        if not requests:
            raise RequestError("there is no request to edit; give at least one EditRequest")
        for i, request in enumerate(requests):
            if not isinstance(request, EditRequest):
                raise RequestError(
                    f"requests[{i}] is {request!r}; it must be an EditRequest (EditRequest.from_dict reads dicts)"
                )
        encoded = encode_requests(self.tokenizer, requests, self.config)
        prompts: dict[str, EditRequest] = {}
        context = context_length(self.model)
        for each in encoded:
            item = each.request
            if item.prompt in prompts:
                raise RequestError(
                    f"{item.where}: the same prompt is edited twice in one call, to {prompts[item.prompt].target_new!r} and "
                    f"to {item.target_new!r}; keep one"
                )
            prompts[item.prompt] = item
            tokens = len(each.row.ids)
            if context and tokens > context:
                raise RequestError(
                    f"{item.where}: {tokens} tokens of prompt and target, but the model reads {context}; shorten them"
                )
        items = [each.request for each in encoded]
        going = {edit.id for edit in self._superseded(items)}
        ids = Counter(item.id for item in items)
        for item in items:
            if ids[item.id] > 1 or (item.id not in going and self.adapter.find(item.id) is not None):
                raise RequestError(f"{item.where}: the id {item.id!r} is taken by another edit; choose another id")
        return encoded

    def prepare(self) -> bool:
        """Fit what the edits of each layer share (the gates' statistics of unrelated text) now, not at the first edit.

        The result depends only on the model and the settings. A call beforehand keeps this time out of the first edit's.
        Further calls do nothing.

        Returns:
            Whether anything was fitted.
        """
        fitted = False
        for layer in self.adapter.layers:
            network = self.adapter.network(layer)
            if network.shared and not self.adapter.shared[layer]:
                if isinstance(network, FactWeighting):
                    network.encoder = self._encoder()
                else:
                    network.fit_shared(self._bank().unrelated[layer])
                state = network.state_dict()
                own = {n: t.clone() for n, t in state.items() if is_shared(network, n)}
                self.adapter.shared[layer] = from_main(lambda own=own: own)
                fitted = True
        return fitted

    def _encoder(self) -> RelationEncoder:
        return get_encoder(self.model, self.tokenizer, read_layers(self.adapter.layers, len(self.adapter.blocks)))

    def _bank(self) -> Bank:
        """The bank, computed once per editor; empty if nothing needs it."""
        if self._cached_bank is None:
            self._cached_bank = Bank()
            if self.config.needs_bank or self.config.locality_coefficient:
                self._cached_bank = get_bank(self.model, self.tokenizer, self.adapter.layers, texts=self.bank_texts)
        return self._cached_bank

    def _surroundings(self) -> TrainingContext:
        earlier = {}
        if len(self.adapter) and not self.adapter.routed:
            for layer in self.adapter.layers:
                earlier[layer] = lambda x, layer=layer: self.adapter.stack(layer, x.device).update(x)
        used = self.adapter.used() if self.config.balance_coefficient else {}
        texts = encode_texts(self.tokenizer, self.bank_texts)[:_OUTPUT_TEXTS] if self.config.output_coefficient else ()
        return TrainingContext(self._bank().unrelated, used, texts, earlier)

    # ------------------------------------------------------------------------------------------ asking

    def generate(
        self,
        prompts: str | Sequence[str | Mapping[str, str]] | Sequence[Sequence[Mapping[str, str]]],
        *,
        max_new_tokens: int = 32,
        batch_size: int = 32,
        **options: Any,
    ) -> Any:
        """The edited model's continuation of each prompt, without the prompt itself.

        Args:
            prompts: one or several; several are padded on the left and run in batches. A prompt is a text, or a
                conversation (a list of ``{"role", "content"}``), which is rendered with the tokenizer's chat template.
            max_new_tokens: maximum number of generated tokens.
            batch_size: prompts per batch.
            options: arguments of ``model.generate`` (``do_sample``, ``num_beams``, ``num_return_sequences``,
                ``use_cache``, …); decoding is greedy by default.

        Returns:
            A string for one prompt, a list of strings for several. With ``num_return_sequences > 1``, each string
            becomes a list of strings.

        Raises:
            RequestError: a prompt has no tokens or is too long for the model.
        """
        return generate_texts(self.adapter, prompts, max_new_tokens=max_new_tokens, batch_size=batch_size, **options)
