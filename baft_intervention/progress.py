"""Progress bars of long preparations, in Python and on the command line."""

from __future__ import annotations

import os
from typing import Any

from tqdm.auto import tqdm

HIDE = "TQDM_DISABLE"  # tqdm's own variable; ``baft --quiet`` sets it


def progress_bar(total: int, what: str, unit: str) -> tqdm[Any]:
    """A bar on a terminal; elsewhere, and where ``TQDM_DISABLE`` is set, none.

    Args:
        total: how many units the work has.
        what: names the work, e.g. ``"reading unrelated texts"``.
        unit: of ``total``.
    """
    disable = True if os.environ.get(HIDE) else None
    return tqdm(total=total, desc=what, unit=unit, disable=disable, dynamic_ncols=True, leave=False)
