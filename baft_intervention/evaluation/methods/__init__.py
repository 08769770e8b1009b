"""Editing methods under one interface: :func:`make_method` by name, :func:`register_method` for one of your own.

method = make_method("ft-m", {"learning_rate": 5e-4})
edited = method.edit(model, tokenizer, [request])
...
edited.restore()
"""

from . import adapters, baft, plain, reft, weights  # noqa: F401  (each registers its methods)
from .base import Method, load_method, make_method, method_names, register_method

__all__ = ["Method", "load_method", "make_method", "method_names", "register_method"]
