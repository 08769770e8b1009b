"""What a call of ``BaftEditor.edit`` did, and which earlier edits it supersedes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..runtime.adapter import Edit


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


class Superseded:
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
