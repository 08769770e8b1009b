"""Records from Hugging Face ``datasets``: a loaded ``Dataset`` or a hub id.

``datasets`` is an optional extra, imported only when a hub id is read. A hub id is read by
``datasets.load_dataset(id, **hub)``, which never runs code of the repository.

Traps: Arrow gives every record the same columns, so absent fields are ``None`` (readers treat null as absent), and it
cannot load a column of texts *and* lists; ``load_dataset("json", …)`` names any file's split ``train``.
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
    """Whether it is ``hub:anything``, or ``owner/name`` that neither exists as a file nor ends like a data file."""
    if source.startswith(PREFIX):
        return True
    return bool(_HUB_ID.fullmatch(source)) and Path(source).suffix.lower() not in SUFFIXES and not Path(source).exists()


def is_dataset(source: object) -> bool:
    """Whether it is an object of ``datasets``, which this does not import."""
    module = sys.modules.get("datasets")
    names = ("Dataset", "IterableDataset", "DatasetDict", "IterableDatasetDict")
    kinds = tuple(kind for name in names if isinstance(kind := getattr(module, name, None), type))
    return isinstance(source, kinds)


def read_hub(source: str, hub: Mapping[str, Any] | None = None) -> Table:
    """Load a hub id through ``datasets.load_dataset``.

    Args:
        source: ``owner/name``, or ``hub:`` followed by what ``load_dataset`` takes (also a folder of data files).
        hub: keyword arguments of ``load_dataset``: ``name``, ``split``, ``revision``, ``data_files``, …

    Raises:
        DataError: ``datasets`` is not installed, the data set does not exist, or it has several splits and none is named.
    """
    name, arguments = source.removeprefix(PREFIX), dict(hub or {})
    if "trust_remote_code" in arguments:
        raise DataError("hub option 'trust_remote_code' is refused: this library never runs code of a data repository")
    try:
        import datasets
    except ImportError:
        raise DataError(
            f"{source}: there is no such file, and reading it from the hub needs 'datasets' "
            "(pip install 'baft_intervention[data]'); install it, or check the path"
        ) from None
    try:
        loaded = datasets.load_dataset(name, **arguments)
    except Exception as error:  # OSError, ValueError and many classes of its own
        first = (str(error).strip() or "no message").splitlines()[0]
        raise DataError(
            f"{source}: there is no such file, and datasets.load_dataset({name!r}) failed: {type(error).__name__}: {first}"
        ) from error
    return read_dataset(loaded, name)


def read_dataset(dataset: Any, name: str = "<datasets.Dataset>") -> Table:
    """The rows of a ``Dataset``, or of a ``DatasetDict`` with a single split."""
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
    """The split that the arguments of ``load_dataset`` name; a data file's name counts more than ``split``."""
    hub = hub or {}
    files = hub.get("data_files")
    if isinstance(files, (str, Path)):
        return split_of(files)
    if files is None and isinstance(hub.get("split"), str):
        return split_of(hub["split"].split("[")[0] + ".json")
    return None
