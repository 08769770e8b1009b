"""``BaftEditor``: edit a model, and undo, merge and save edits, in a few calls."""

from .editor import BaftEditor
from .report import EditReport

__all__ = ["BaftEditor", "EditReport"]
