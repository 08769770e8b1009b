"""The library's own errors.

Every message names the offending value, its place, and how to fix it. Each class derives from :class:`BaftError` and from
the built-in that a caller expects, so ``except ValueError`` works too.
"""


class BaftError(Exception):
    """Base class of every error that this library raises on purpose."""


class RequestError(BaftError, ValueError):
    """An edit request or a probe is malformed: an empty target, a missing field, an unknown kind."""


class ConfigError(BaftError, ValueError):
    """A setting is out of its range, unknown, or does not fit the model (a block that it does not have)."""


class PositionError(BaftError, ValueError):
    """A position rule cannot be read or finds no token, e.g. because the subject is not in the prompt."""


class EditError(BaftError, RuntimeError):
    """An edit could not be trained (a loss that is not finite); model and adapter are unchanged."""


class AdapterError(BaftError, ValueError):
    """A saved adapter cannot be loaded: it is truncated, altered, or of another model or schema."""


class StoreError(AdapterError):
    """A folder of edits cannot be opened or written: another writer, a full disk, damage. No finished edit is lost."""


class DataError(BaftError, ValueError):
    """A data file or record cannot be read; the message names file, line or index, and field."""


class ModelError(BaftError, ValueError):
    """A model cannot be resolved, loaded or edited: an unknown name, blocks that cannot be found."""
