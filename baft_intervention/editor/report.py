"""The result of ``BaftEditor.edit``, and the earlier edits that it supersedes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..runtime.adapter import Edit


@dataclass(frozen=True)
class EditReport:
    """The result of one call of :meth:`BaftEditor.edit`.

    Args:
        edits: the committed edits, one per request (a single one for ``allocation="joint"``).
        replaced: ids of earlier edits of the same prompts, which the new edits supersede.
        seconds: wall time of the call, including the bank.
    """

    edits: tuple[Edit, ...]
    replaced: tuple[str, ...]
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        edits = [{**e.summary(), "seconds": round(e.seconds, 4)} for e in self.edits]
        return {"edits": edits, "replaced": list(self.replaced), "seconds": round(self.seconds, 4)}


class Superseded:
    """Earlier edits, each to be removed once new edits have covered all its prompts."""

    def __init__(self, edits: Sequence[Edit]):
        self._left = {edit.id: {r.prompt for r in edit.requests} for edit in edits}
        self._asking: dict[str, list[str]] = {}
        for name, prompts in self._left.items():
            for prompt in prompts:
                self._asking.setdefault(prompt, []).append(name)

    def superseded_by(self, edit: Edit) -> list[str]:
        """Ids of the earlier edits whose last remaining prompt this edit covers."""
        gone = []
        for request in edit.requests:
            for name in self._asking.get(request.prompt, ()):
                self._left[name].discard(request.prompt)
                if not self._left[name]:
                    gone.append(name)
        return gone
