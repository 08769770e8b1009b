"""Records from Hugging Face ``datasets``: a loaded ``Dataset`` or a hub id.

``datasets`` is an optional extra and imported only here, when it is needed. Reading a hub id is
``datasets.load_dataset(id, **hub)``; no code of the repository is ever run.

Traps: Arrow gives every record the same columns, so absent fields come as ``None`` (readers treat null as absent), and a
column of texts *and* lists cannot be loaded at all; a file loaded with ``load_dataset("json", …)`` is called split
``train``, whatever it is.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import DataError
from .files import SUFFIXES, Table, rows_of_values, sha256_of_rows
from .splits import Split, split_of

PREFIX = "hub:"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.\-]*/[A-Za-z0-9][\w.\-]*")


def is_hub_id(source: str) -> bool:
    """``hub:anything``, or ``owner/name`` that is no file here and has no data file's suffix."""
    if source.startswith(PREFIX):
        return True
    return bool(_HUB_ID.fullmatch(source)) and Path(source).suffix.lower() not in SUFFIXES and not Path(source).exists()


def is_dataset(source: object) -> bool:
    """Whether it is an object of ``datasets``; asks without importing it."""
    module = sys.modules.get("datasets")
    names = ("Dataset", "IterableDataset", "DatasetDict", "IterableDatasetDict")
    kinds = tuple(kind for name in names if isinstance(kind := getattr(module, name, None), type))
    return isinstance(source, kinds)


def read_hub(source: str, hub: Mapping[str, Any] | None = None) -> Table:
    """Load a hub id through ``datasets.load_dataset``.

    Args:
        source: ``owner/name``, or ``hub:`` and whatever ``load_dataset`` takes (a folder of data files, too).
        hub: its keyword arguments: ``name``, ``split``, ``revision``, ``data_files``, …

    Raises:
        DataError: ``datasets`` is not installed, there is no such data set, or it has several splits and none was named.
    """
    name, arguments = source.removeprefix(PREFIX), dict(hub or {})
    if "trust_remote_code" in arguments:
        raise DataError("hub option 'trust_remote_code' is refused: this library never runs code of a data repository")
    try:
        import datasets
    except ImportError:
        raise DataError(
            f"{source}: neither a file here, nor can the hub be asked: 'datasets' is not installed "
            "(pip install 'baft_intervention[data]'); or check the path"
        ) from None
    try:
        loaded = datasets.load_dataset(name, **arguments)
    except Exception as error:  # the hub raises everything from OSError to its own classes
        first = (str(error).strip() or "no message").splitlines()[0]
        raise DataError(
            f"{source}: no such file here, and datasets.load_dataset({name!r}) failed: {type(error).__name__}: {first}"
        ) from error
    return read_dataset(loaded, name)


def read_dataset(dataset: Any, name: str = "<datasets.Dataset>") -> Table:
    """The rows of a ``Dataset``; of a ``DatasetDict`` only where it has a single split."""
    if isinstance(dataset, Mapping):
        splits = list(dataset)
        if len(splits) != 1:
            names = ", ".join(map(str, splits)) or "none"
            raise DataError(f"{name} has the splits {names}; name one, e.g. hub={{'split': 'test'}}")
        dataset = dataset[splits[0]]
    try:
        values = [dict(row) for row in dataset]
    except (TypeError, ValueError) as error:
        raise DataError(f"{name}: its rows cannot be read ({error})") from error
    return Table(name, name, rows_of_values(values), sha256=sha256_of_rows(values))


def hub_split(hub: Mapping[str, Any] | None) -> Split | None:
    """The split that ``load_dataset``'s arguments name; data files count before the split's name."""
    hub = hub or {}
    files = hub.get("data_files")
    if isinstance(files, (str, Path)):
        return split_of(files)
    if files is None and isinstance(hub.get("split"), str):
        return split_of(hub["split"].split("[")[0] + ".json")
    return None
