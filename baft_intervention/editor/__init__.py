"""``BaftEditor``: editing a model, undoing, merging and keeping edits in a few calls."""

from .editor import BaftEditor
from .report import EditReport

__all__ = ["BaftEditor", "EditReport"]
