"""Editing a language model in a few calls."""

from __future__ import annotations

import contextlib
import logging
import os
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from ..config import BaftConfig
from ..environment import library_versions
from ..errors import AdapterError, ConfigError, EditError, RequestError, StoreError
from ..gates import weighting_class
from ..models.fingerprint import config_hash, model_fingerprint
from ..models.loading import give_pad_token, load_model
from ..models.structure import context_length, is_sharded
from ..requests import EditRequest
from ..runtime.adapter import BaftAdapter, Edit, edits_state
from ..runtime.distributed import from_main, gather, is_main, shard, unshard, world_size
from ..runtime.edit_stack import is_shared
from ..runtime.generation import generate_texts
from ..storage.compatibility import check_base, check_settings
from ..storage.exchange import DESCRIPTION, read_directory
from ..storage.hub import CARD, fetched_adapter, is_repo_id, model_card, push_folder
from ..storage.merge import MergeReport, OnConflict, check_same_coordinates, plan_merge
from ..storage.working_store import MainStore, Store, open_store, write_directory
from ..training.bank import Bank, encode_texts, get_bank
from ..training.encoding import encode_requests
from ..training.engine import make_engine
from ..training.gate_initialisation import make_jobs, shared_context
from ..training.types import EncodedRequest, Job, TrainingContext

logger = logging.getLogger(__name__)
_CHUNK = 64  # edits that are prepared and handed to the engine together
_OUTPUT_TEXTS = 16  # unrelated texts that the output loss looks at
_SLACK = 1 << 20  # bytes of a log that are never worth a new snapshot
_LONG = 12  # tokens of a target that are many for a late block
_LOWER = 2 / 3  # depth of a block that reaches them: WikiBio's 76 % of tokens at nine tenths are 86 % there


@dataclass(frozen=True)
class EditReport:
    """What a call of :meth:`BaftEditor.edit` did.

    Args:
        edits: the committed edits, one a request (one in all for ``allocation="joint"``).
        replaced: ids of earlier edits of the same prompts, which these supersede.
        seconds: wall time of the call, bank included.
    """

    edits: tuple[Edit, ...]
    replaced: tuple[str, ...]
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        edits = [{**e.summary(), "seconds": round(e.seconds, 4)} for e in self.edits]
        return {"edits": edits, "replaced": list(self.replaced), "seconds": round(self.seconds, 4)}


class BaftEditor:
    """Edits facts of a causal language model, and takes them back.

    The base model's weights are never written: an edit is a small map on one block's output, put there by a hook.
    Several editors, and a user's own hooks, can live on one model.

    Args:
        model: a Hugging Face causal language model.
        tokenizer: its tokenizer.
        config: settings; the defaults suit single facts.
        model_name: what the base model is called in a saved adapter; taken from the model where not given.
        bank_texts: unrelated texts of your own, from which the gate learns what to leave alone; by default the
            package's own (see :mod:`baft_intervention.training.bank`).

    Example::

        editor = BaftEditor.from_pretrained("smollm2-135m")
        report = editor.edit(EditRequest("The capital of Japan is", "Osaka", subject="Japan"))
        editor.generate("The capital city of Japan is")
        editor.undo(report.edits[0].id)

    Raises:
        ConfigError: a layer that the model has not, a rank above its hidden size.
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
        self.model: Any = model  # nn.Module, with the generate() of transformers
        self.tokenizer = tokenizer
        self.config = config or BaftConfig()
        self.model_name = model_name or getattr(model.config, "_name_or_path", "") or type(model).__name__
        self.bank_texts = None if bank_texts is None else tuple(bank_texts)
        self._cached_bank: Bank | None = None
        self._store: Store | MainStore | None = None
        give_pad_token(tokenizer, self.model_name)
        self.adapter = BaftAdapter(model, tokenizer, self.config)
        self.adapter.attach()

    # ------------------------------------------------------------------------------------------ coming and going

    @classmethod
    def from_pretrained(
        cls,
        name: str | os.PathLike[str],
        config: BaftConfig | None = None,
        *,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        revision: str | None = None,
        bank_texts: Sequence[str] | None = None,
    ) -> BaftEditor:
        """An editor of a model by name (built-in, folder or hub id), or of an adapter with its base model.

        Args:
            name: of a model; or a folder written by :meth:`save_pretrained`, or a hub id that :meth:`push_to_hub` wrote to.
            config: settings for new edits; an adapter has its own.
            device, dtype: see :func:`~baft_intervention.models.loading.load_model`; an adapter's dtype is its base model's.
            revision: branch, tag or commit of a hub id.
            bank_texts: see the class.

        Raises:
            ModelError: the model cannot be loaded.
            AdapterError: the adapter is damaged or does not fit its base model.
        """
        name = os.fspath(name)
        given: dict[str, Any] = {"device": device, "dtype": dtype, "bank_texts": bank_texts}
        if (Path(name).expanduser() / DESCRIPTION).is_file():
            return cls._from_adapter(name, name, config, **given)
        if is_repo_id(name):
            with fetched_adapter(name, revision=revision) as folder:
                if folder is not None:
                    return cls._from_adapter(folder, name, config, **given)
        model, tokenizer = load_model(name, device=device, dtype=dtype, revision=revision)
        return cls(model, tokenizer, config, model_name=name, bank_texts=bank_texts)

    @classmethod
    def open(
        cls,
        folder: str | os.PathLike[str],
        model: str | os.PathLike[str] | None = None,
        config: BaftConfig | None = None,
        *,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        bank_texts: Sequence[str] | None = None,
    ) -> BaftEditor:
        """An editor whose edits live in a folder: each is on the disk before the call that made it returns.

        A folder that holds an adapter is gone on with; the last edit that was committed is there, however the process that
        made it ended. Nobody else can write to the folder until :meth:`close` (or the end of a ``with`` block).

        Args:
            folder: of an adapter, an empty one, or none, which is made.
            model: name of the base model; needed for a new adapter, and for one whose base model was moved.
            config: settings; those of an adapter that is there already may differ only in what training reads.
            device, dtype, bank_texts: as :meth:`from_pretrained`.

        Example::

            with BaftEditor.open("edits", "smollm2-135m") as editor:
                editor.edit(requests)  # killed in the middle, it loses at most what it was training

        Raises:
            StoreError: another process has it open, it cannot be written to, or its log is damaged.
            AdapterError: it holds something else, or an adapter that does not fit.
        """
        store, given = open_store(folder), {"device": device, "dtype": dtype, "bank_texts": bank_texts}
        name = os.fspath(folder)
        try:
            if not store.fresh:
                editor = cls._from_adapter(
                    store.path, name, None, model=None if model is None else os.fspath(model), store=store, **given
                )
                if config is not None:
                    check_settings(editor.config, config, name)
                    editor.config = config
            elif model is None:
                raise ConfigError(f"{name} holds no adapter yet; say which model is to be edited, e.g. 'smollm2-135m'")
            else:
                editor = cls.from_pretrained(model, config, **given)
            editor._keep(store)
        except BaseException:
            store.close(discard=True)
            raise
        return editor

    @classmethod
    def _from_adapter(
        cls,
        folder: str | Path,
        name: str,
        config: BaftConfig | None,
        *,
        device: Any,
        dtype: Any,
        bank_texts: Any,
        model: str | None = None,
        store: Any = None,
    ) -> BaftEditor:
        if config is not None:
            raise ConfigError(f"{name!r} is an adapter and has its own settings; leave config out")
        # several processes that open a folder together read what rank 0 reads: it may be on rank 0's disk alone
        state, description = store.read() if isinstance(store, MainStore) else read_directory(folder)
        base = description["base_model"]
        given = {"device": device, "dtype": dtype or base.get("dtype")}
        base_name = model or base["name"]
        loaded, tokenizer = load_model(base_name, revision=None if model else base.get("revision"), **given)
        config = BaftConfig.from_dict(description["config"], where=f"{name}: ")
        editor = cls(loaded, tokenizer, config, model_name=base_name, bank_texts=bank_texts)
        try:
            editor._take(state, description, f"{name}: ")
        except BaseException:
            editor.detach()
            raise
        return editor

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | None = None,
        revision: str | None = None,
        license: str | None = None,
        metrics: Mapping[str, float] | None = None,
        message: str = "Upload adapter",
    ) -> str:
        """Push the edits with a generated model card to the hub; :meth:`from_pretrained` with ``repo_id`` loads them.

        The requests themselves (prompts, new answers, subjects) are part of an adapter and are readable there. Of several
        processes rank 0 pushes; the others do nothing and get an empty address.

        Args:
            repo_id: ``user/name``; the repository is made where there is none.
            private: whether a new repository is; the account's default where left out.
            token: of the account; what ``huggingface_hub`` has stored where left out.
            revision: branch to push to.
            license: the hub's identifier, e.g. ``apache-2.0``, for the card.
            metrics: numbers of your own for the card.
            message: of the commit.

        Returns:
            The commit's address.

        Raises:
            AdapterError: the hub cannot be reached or refuses.
        """
        if world_size() > 1 and is_sharded(self.model):
            raise AdapterError(
                "the model's parameters are sharded over processes; call save_pretrained on all of them, and push that folder"
            )
        if not is_main():
            return ""
        with tempfile.TemporaryDirectory(prefix="baft-") as folder:
            place = self.save_pretrained(Path(folder) / "adapter")
            _, description = read_directory(place)
            requests = [request for edit in self.edits for request in edit.requests]
            card = model_card(description, requests, repo_id, license=license, metrics=metrics)
            (place / CARD).write_text(card, encoding="utf-8")
            return push_folder(place, repo_id, private=private, token=token, revision=revision, message=message)

    def load_adapter(self, path: str | os.PathLike[str]) -> None:
        """Replace this editor's edits by those of an adapter folder of the same base model; all or nothing.

        Raises:
            AdapterError: damaged, of another model or schema, or of other settings than this editor's.
        """
        state, description = from_main(lambda: read_directory(path))
        before = self.adapter.shared, self.edits
        check_settings(BaftConfig.from_dict(description["config"], where=f"{path}: "), self.config, os.fspath(path))
        self._take(state, description, f"{os.fspath(path)}: ")
        try:
            self.compact()
        except BaseException:
            self.adapter.shared = before[0]
            self.adapter.set_edits(before[1])
            raise

    def _take(self, state: Mapping[str, Any], description: Mapping[str, Any], where: str) -> None:
        check_base(description, self.adapter, where)
        self.adapter.load_state(state, description["edits"], where)

    def save_pretrained(self, path: str | os.PathLike[str]) -> Path:
        """Write the edits to a folder (``adapter.safetensors`` and ``adapter.json``), atomically.

        Of several processes rank 0 writes, and the others do nothing: whoever reads what it wrote waits for it first.

        Raises:
            AdapterError: the folder holds something else, or cannot be written.
        """
        if self._store is not None and Path(path).expanduser().resolve() == self._store.path.resolve():
            self.compact()
            return self._store.path
        description = self._description()  # of all ranks: where parameters are sharded they are put together for it
        if not is_main():
            return Path(path)
        return write_directory(path, self.adapter.state(), description)

    def _description(self) -> dict[str, Any]:
        dtype = str(next(self.model.parameters()).dtype).removeprefix("torch.")
        base = {
            "name": self.model_name, "revision": getattr(self.model.config, "_commit_hash", None), "dtype": dtype,
            "fingerprint": model_fingerprint(self.model), "config_hash": config_hash(self.model),
        }  # fmt: skip
        return {
            "base_model": base, "config": self.config.to_dict(), "layers": list(self.adapter.layers),
            "weighting_layout": weighting_class(self.config.weighting).layout,
            "edits": [edit.summary() for edit in self.adapter.edits], "versions": library_versions(),
        }  # fmt: skip

    def keep_in(self, folder: str | os.PathLike[str]) -> None:
        """From now on every change is in ``folder`` before the call that makes it returns; see :meth:`open`.

        An editor without edits takes those that the folder holds; one with edits needs a folder without.

        Raises:
            StoreError: both have edits, another process has the folder open, it cannot be written to, its log is damaged.
            AdapterError: it holds something else, or an adapter that does not fit.
        """
        if self._store is not None:
            raise StoreError(f"the edits are kept in {self._store.path} already; close() the editor first")
        store = open_store(folder)
        try:
            if not store.fresh:
                if len(self.adapter):
                    raise StoreError(
                        f"{store.path} holds an adapter, and this editor has {len(self.adapter)} edits of its own; "
                        "give another folder, or merge() the one into the other"
                    )
                self.load_adapter(folder)
            self._keep(store)
        except BaseException:
            store.close(discard=True)
            raise

    def _keep(self, store: Store | MainStore) -> None:
        if self.prepare() or store.fresh:
            store.seal(self.adapter.state(), self._description())
        self._store = store

    def compact(self) -> None:
        """Make one snapshot of the folder's snapshot and log; does nothing for an editor that is not kept in a folder.

        It is done by itself where more than half of the log is about edits that are gone.
        """
        if self._store is not None:
            self._store.seal(self.adapter.state(), self._description())

    def close(self, *, discard: bool = False) -> None:
        """Let others write to the folder; the edits stay on the model, and from now on in memory only.

        Args:
            discard: leave a folder that held no adapter before as it was then.
        """
        if self._store is not None:
            self._store.close(discard=discard)
            self._store = None

    def __enter__(self) -> BaftEditor:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def attach(self) -> None:
        """Put the edits back on the model after :meth:`detach`."""
        self.adapter.attach()

    def detach(self) -> None:
        """Take this editor's hooks off the model, which then is what it was before."""
        self.adapter.detach()

    def enabled(self, value: bool = True) -> contextlib.AbstractContextManager[None]:
        """``with editor.enabled(False):`` the unedited model answers."""
        return self.adapter.enabled(value)

    # ------------------------------------------------------------------------------------------ editing

    @property
    def edits(self) -> tuple[Edit, ...]:
        return self.adapter.edits

    def edit(self, requests: EditRequest | Sequence[EditRequest], *, progress: bool = False) -> EditReport:
        """Train and commit one or several edits: all of them, or on an error none.

        A later edit of a prompt supersedes the earlier one. An interrupt (Ctrl-C) keeps the edits that are finished.

        Several processes (see :mod:`~baft_intervention.runtime.distributed`) call it with the same requests and have the same edits
        afterwards. Edits that compete are shared out over them; one of several requests, and those that add up, are
        trained by all together.

        Args:
            requests: what to change; conversations are put into the tokenizer's chat template, which is recorded.
            progress: show a bar with the time left.

        Raises:
            RequestError: an empty list, two requests with one prompt, a target of no token.
            PositionError: a position rule that finds no token, e.g. a subject that is not in its prompt.
            EditError: a loss that is not finite.
            StoreError: the editor is kept in a folder that cannot be written to.
        """
        begin = time.perf_counter()
        encoded = self._check([requests] if isinstance(requests, EditRequest) else list(requests))
        items = [each.request for each in encoded]
        self.prepare()
        replaced = self._superseded(items)
        groups = [tuple(encoded)] if self.config.allocation == "joint" else [(each,) for each in encoded]
        before, waiting = self.edits, _Waiting(replaced)
        done: list[Edit] = []
        marks = [self._store and self._store.mark()]  # of the log, after each edit that is done
        engine = make_engine(self.model, self.tokenizer, self.config, self.adapter.layers)
        chunk = _CHUNK * world_size() if self._independent else 1
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
            logger.warning("interrupted: %d of %d edits are finished and stay", len(done), len(groups))
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
            if not edit.reached:
                logger.warning(
                    "%s: after %d steps the model does not give the whole target (loss %.3f); %s",
                    edit.requests[0].where, edit.steps, edit.loss, self._mend(edit),
                )  # fmt: skip
        return EditReport(tuple(done), tuple(edit.id for edit in replaced), time.perf_counter() - begin)

    def _mend(self, edit: Edit) -> str:
        """What may bring an edit to its target: what lies above the edited block must carry a long one to its later tokens."""
        longest = max(len(self.tokenizer(r.target_new)["input_ids"]) for r in edit.requests)
        lower = round(_LOWER * len(self.adapter.blocks))
        if longest > _LONG and max(self.adapter.layers) > lower:
            return f"its target is of {longest} tokens: edit a lower block, layers=({lower},), or raise steps"
        return "raise steps or rank"

    def _trained(self, engine: Any, groups: Sequence[Sequence[EncodedRequest]]) -> Iterator[Edit]:
        """The edit of each group of requests, in order, as soon as it is trained; the same on all ranks."""
        if world_size() == 1:
            yield from engine.train_many(self._jobs(groups), self._surroundings())
        elif self._independent and self.config.allocation != "joint" and not is_sharded(self.model):
            around = self._surroundings()
            own = gather(lambda: list(engine.train_many(self._jobs(shard(groups)), around)))
            yield from unshard(own)
        else:  # the ranks call the model equally often, as it must be where its parameters are sharded
            for job in self._jobs(groups):
                for module in job.maps.values():  # so that all begin at the same bits
                    module.load_state_dict(from_main(module.state_dict))
                yield engine.train_data_parallel(job, self._surroundings())

    @property
    def _independent(self) -> bool:
        """Whether edits train together: those that compete do; those that add up train on top of the earlier ones."""
        return self.adapter.routed and self.config.order != "depth"

    def _jobs(self, groups: Sequence[Sequence[EncodedRequest]]) -> list[Job]:
        return make_jobs(
            self.model, self.tokenizer, self.config, self.adapter.layers, groups, shared=self.adapter.shared,
            bank=self._bank(),
        )  # fmt: skip

    def _superseded(self, items: Sequence[EditRequest]) -> list[Edit]:
        """Edits that ask nothing but what these requests ask anew."""
        prompts = {item.prompt: item for item in items}
        return [e for e in self.adapter.asking(prompts) if all(r.prompt in prompts for r in e.requests)]

    def _commit(self, edit: Edit, gone: Sequence[str]) -> None:
        """Put a finished edit, and that others went for it, on the disk and then into the adapter."""
        if self._store is not None:
            self._store.append(gone, [edit.summary()], edits_state([edit]))
        self.adapter.add(edit)

    def _roll_back(self, mark: Any) -> None:
        if self._store is not None:
            self._store.rollback(mark)

    def undo(self, edit_id: str) -> Edit:
        """Take one edit back and return it.

        With a routed weighting (``cosine``) every edit has its own bases and the adapter is as if it had never been.
        Where updates are summed (``constant``, ``linear``, ``mlp``), later edits were trained on top of it and stay so.

        Raises:
            EditError: no edit of this id, or one that was trained jointly with others.
        """
        return self.undo_all([edit_id])[0]

    def undo_all(self, edit_ids: Sequence[str]) -> list[Edit]:
        """As :meth:`undo`, for several: all of them, or on an error none."""
        edits = [self.find(name) for name in dict.fromkeys(edit_ids)]
        if self._store is not None and edits:
            self._store.append([edit.id for edit in edits])
        return [self.adapter.remove(edit.id) for edit in edits]

    def find(self, edit_id: str) -> Edit:
        """The edit of this id.

        Raises:
            EditError: there is none, or it is a request that was trained jointly with others.
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
        """Take in the edits of an adapter folder of the same base model and settings; all or nothing.

        Edits that both have stay as they are here. Where both answer a prompt differently, ``on_conflict`` says what is done.
        A prompt and its paraphrase are two prompts: that they contradict each other is not noticed.

        Args:
            path: the other adapter.
            on_conflict: ``error``, or whose answer stays: ``ours`` (this editor's) or ``theirs``.

        Raises:
            AdapterError: it is damaged or does not fit, its edits add up (see :func:`~.storage.merge.plan_merge`), or
                conflicts.
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
        """Fit now what the edits of each layer share (the gates' measure of unrelated text), not at the first edit.

        It belongs to the model and the settings, not to an edit: called beforehand, it keeps its seconds out of the first
        edit's. Called again it does nothing.

        Returns:
            Whether there was anything to fit.
        """
        fitted = False
        for layer in self.adapter.layers:
            network = self.adapter.network(layer)
            if network.shared and not self.adapter.shared[layer]:
                bank = self._bank()
                context = shared_context(network, bank, layer, self.adapter.read_layer)
                network.fit_shared(bank.unrelated[layer], context)
                state = network.state_dict()
                own = {n: t.clone() for n, t in state.items() if is_shared(network, n)}
                self.adapter.shared[layer] = from_main(lambda own=own: own)
                fitted = True
        return fitted

    def _bank(self) -> Bank:
        """The bank, once an editor; empty where nothing asks for it."""
        if self._cached_bank is None:
            self._cached_bank = Bank()
            if self.config.needs_bank or self.config.locality_coefficient:
                layers, read_layer = self.adapter.layers, self.adapter.read_layer
                self._cached_bank = get_bank(
                    self.model, self.tokenizer, layers if read_layer is None else sorted({*layers, read_layer}),
                    relation_layers=() if read_layer is None else layers, texts=self.bank_texts,
                )  # fmt: skip
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
        """What the edited model writes after each prompt, the prompt itself left out.

        Args:
            prompts: one or several; several are padded on the left and answered together. A prompt is a text, or a
                conversation (a list of ``{"role", "content"}``), which is put into the tokenizer's chat template.
            max_new_tokens: at most so many tokens.
            batch_size: prompts a batch.
            options: of ``model.generate`` (``do_sample``, ``num_beams``, ``num_return_sequences``, ``use_cache``, …); greedy
                by default.

        Returns:
            A string for one prompt, a list for several; with ``num_return_sequences > 1`` a list of strings in place of
            each string.

        Raises:
            RequestError: a prompt that the tokenizer makes no token of, or that is too long for the model.
        """
        return generate_texts(self.adapter, prompts, max_new_tokens=max_new_tokens, batch_size=batch_size, **options)


class _Waiting:
    """Edits that go as soon as others have asked all their prompts anew."""

    def __init__(self, edits: Sequence[Edit]):
        self._left = {edit.id: {r.prompt for r in edit.requests} for edit in edits}
        self._asking: dict[str, list[str]] = {}
        for name, prompts in self._left.items():
            for prompt in prompts:
                self._asking.setdefault(prompt, []).append(name)

    def superseded_by(self, edit: Edit) -> list[str]:
        """Ids of those that go with this edit and the ones before it."""
        gone = []
        for request in edit.requests:
            for name in self._asking.get(request.prompt, ()):
                self._left[name].discard(request.prompt)
                if not self._left[name]:
                    gone.append(name)
        return gone
