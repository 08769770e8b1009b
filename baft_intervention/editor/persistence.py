"""Saving and loading of an editor: the adapter it opens, the folder it writes to, and the hub it pushes to."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..config import BaftConfig
from ..environment import library_versions
from ..errors import AdapterError, ConfigError, StoreError
from ..gates import weighting_class
from ..models.fingerprint import config_hash, model_fingerprint
from ..models.loading import give_pad_token, load_model
from ..models.structure import is_sharded
from ..runtime.adapter import BaftAdapter, Edit
from ..runtime.distributed import from_main, is_main, world_size
from ..storage.compatibility import check_base, check_settings
from ..storage.exchange import DESCRIPTION, read_directory
from ..storage.hub import CARD, fetched_adapter, is_repo_id, model_card, push_folder
from ..storage.working_store import MainStore, Store, open_store, write_directory

if TYPE_CHECKING:
    from typing_extensions import Self


class PersistentEdits:
    """A model with an adapter that is loaded from and saved to folders; :class:`BaftEditor` adds the training.

    Args:
        model, tokenizer, config, model_name, bank_texts: see :class:`~baft_intervention.editor.editor.BaftEditor`.
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
        self.model_name = model_name or getattr(model.config, "_name_or_path", "") or type(model).__name__
        self.bank_texts = None if bank_texts is None else tuple(bank_texts)
        self._store: Store | MainStore | None = None
        give_pad_token(tokenizer, self.model_name)
        self.adapter = BaftAdapter(model, tokenizer, config or BaftConfig())
        self.adapter.attach()

    @property
    def config(self) -> BaftConfig:
        """The settings that all edits share. Only settings that affect nothing but training can be changed.

        Raises:
            AdapterError: on assignment, if a changed setting defines what the edits' tensors mean.
        """
        return self.adapter.config

    @config.setter
    def config(self, config: BaftConfig) -> None:
        check_settings(self.adapter.config, config, "editor.config")
        self.adapter.config = config

    @property
    def edits(self) -> tuple[Edit, ...]:
        """The committed edits, oldest first."""
        return self.adapter.edits

    def prepare(self) -> bool:
        """Fit what all edits share, unless it is fitted already; return whether anything was fitted."""
        raise NotImplementedError

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
    ) -> Self:
        """Create an editor from a model (built-in name, folder or hub id), or from an adapter and its base model.

        Args:
            name: a model's name, or an adapter: a folder that :meth:`save_pretrained` wrote, or a hub id that
                :meth:`push_to_hub` wrote to.
            config: settings for a model without edits; an adapter has its own.
            device, dtype: see :func:`~baft_intervention.models.loading.load_model`; by default an adapter's base model
                is loaded in the dtype that the adapter records.
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
    ) -> Self:
        """Create an editor that keeps its edits in a folder; each edit is on disk before the call that made it returns.

        It loads the edits of an existing adapter, up to the last committed one, even if the process that wrote them was
        killed. No other process can write to the folder until :meth:`close` or the end of a ``with`` block.

        Args:
            folder: a folder with an adapter, an empty folder, or a new one.
            model: name of the base model; required for a new adapter, and for one whose base model has moved.
            config: settings. For an existing adapter, only settings that affect nothing but training may differ from
                its own.
            device, dtype, bank_texts: as for :meth:`from_pretrained`.

        Example::

            with BaftEditor.open("edits", "smollm2-135m") as editor:
                editor.edit(requests)  # if it is killed, only the edit in training is lost

        Raises:
            StoreError: another process has the folder open, the folder cannot be written to, or its log is damaged.
            AdapterError: the folder holds something else, or an adapter that does not fit.
        """
        store, given = open_store(folder), {"device": device, "dtype": dtype, "bank_texts": bank_texts}
        name, changed = os.fspath(folder), False
        try:
            if not store.fresh:
                editor = cls._from_adapter(
                    store.path, name, None, model=None if model is None else os.fspath(model), store=store, **given
                )
                if config is not None and config != editor.config:
                    check_settings(editor.config, config, name)
                    editor.config, changed = config, True
            elif model is None:
                raise ConfigError(f"{name} holds no adapter yet; name the model to edit, e.g. model='smollm2-135m'")
            else:
                editor = cls.from_pretrained(model, config, **given)
            editor._keep(store, rewrite=changed)
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
    ) -> Self:
        if config is not None:
            raise ConfigError(f"{name!r} is an adapter and has its own settings; leave config out")
        # all ranks use what rank 0 reads: the folder may exist only on rank 0's disk
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
        """Push the edits and a generated model card to the hub; :meth:`from_pretrained` with ``repo_id`` loads them.

        An adapter contains its requests (prompts, new answers, subjects): everyone who can read the repository can read
        them. With several processes, only rank 0 pushes; the others return an empty string.

        Args:
            repo_id: ``user/name``; the repository is created if it does not exist.
            private: whether a new repository is private; by default the account's setting.
            token: access token of the account; by default the one stored by ``huggingface_hub``.
            revision: branch to push to.
            license: license identifier for the card, e.g. ``apache-2.0``.
            metrics: your own measurements for the card.
            message: commit message.

        Returns:
            The commit's URL.

        Raises:
            AdapterError: the hub is unreachable or refuses the upload, or the model's parameters are sharded over processes.
        """
        if world_size() > 1 and is_sharded(self.model):
            raise AdapterError(
                "the model's parameters are sharded over processes; call save_pretrained on every process, then push that folder"
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
        """Replace this editor's edits with those of an adapter folder of the same base model; on an error, change nothing.

        Raises:
            AdapterError: the adapter is damaged, or belongs to another model, schema or settings.
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

        If the editor keeps its edits in this very folder, :meth:`compact` runs instead. With several processes, rank 0
        writes and the others do not wait for it.

        Raises:
            AdapterError: the folder holds something else, or cannot be written to.
        """
        if self._store is not None and Path(path).expanduser().resolve() == self._store.path.resolve():
            self.compact()
            return self._store.path
        description = self._description()  # on all ranks, because a fingerprint gathers sharded parameters
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
        """From now on, write every change to ``folder`` before the call that makes it returns; see :meth:`open`.

        An editor without edits loads those of the folder. An editor with edits needs a folder without any.

        Raises:
            StoreError: both have edits, another process has the folder open, the folder cannot be written to, or its log
                is damaged.
            AdapterError: the folder holds something else, or an adapter that does not fit.
        """
        if self._store is not None:
            raise StoreError(f"the edits are already kept in {self._store.path}; close() the editor first")
        store = open_store(folder)
        try:
            if not store.fresh:
                if len(self.adapter):
                    raise StoreError(
                        f"{store.path} holds an adapter, but this editor has {len(self.adapter)} edits of its own; "
                        "give another folder, or merge() the adapter into this editor"
                    )
                self.load_adapter(folder)
            self._keep(store)
        except BaseException:
            store.close(discard=True)
            raise

    def _keep(self, store: Store | MainStore, *, rewrite: bool = False) -> None:
        if self.prepare() or store.fresh or rewrite:
            store.seal(self.adapter.state(), self._description())
        self._store = store

    def compact(self) -> None:
        """Fold the log of the editor's folder into its snapshot; without a folder, do nothing.

        :meth:`edit` calls this by itself once more than half of the log concerns removed edits.
        """
        if self._store is not None:
            self._store.seal(self.adapter.state(), self._description())

    def close(self, *, discard: bool = False) -> None:
        """Release the folder for other writers; the edits stay on the model, but only in memory.

        Args:
            discard: if the folder held no adapter when it was opened, delete what was written to it.
        """
        if self._store is not None:
            self._store.close(discard=discard)
            self._store = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def attach(self) -> None:
        """Put this editor's hooks back on the model after :meth:`detach`."""
        self.adapter.attach()

    def detach(self) -> None:
        """Remove this editor's hooks from the model, which is then unedited."""
        self.adapter.detach()

    def enabled(self, value: bool = True) -> contextlib.AbstractContextManager[None]:
        """Context that enables or disables the edits: inside ``with editor.enabled(False):``, the model is unedited."""
        return self.adapter.enabled(value)
