"""The reference of every module, as HTML made from the docstrings by pdoc: ``make docs`` writes ``build/reference``.

A warning of pdoc (a name that does not resolve, a docstring that cannot be read) ends the build.
"""

from __future__ import annotations

import argparse
import importlib
import pkgutil
import re
import warnings
from collections.abc import Sequence
from pathlib import Path

import pdoc
import pdoc.docstrings
import pdoc.render

import baft_intervention

ROOT = Path(__file__).resolve().parent.parent
_TABLE = re.compile(r"^(=+(?: +=+)+)\n(?:.+\n)+?\1\n(?:.+\n)+?\1$|^(=+(?: +=+)+)\n(?:.+\n)+?\2$", flags=re.MULTILINE)


def module_names() -> list[str]:
    """Every module of the package, imported; the public names of the package itself are resolved."""
    found = [baft_intervention.__name__]
    for module in pkgutil.walk_packages(baft_intervention.__path__, f"{baft_intervention.__name__}."):
        importlib.import_module(module.name)
        found.append(module.name)
    for name in baft_intervention.__all__:  # they are imported when they are first asked for
        getattr(baft_intervention, name)
    return found


def to_markdown(text: str) -> str:
    """What pdoc leaves of reStructuredText: tables become preformatted text, ``::`` before code a colon."""
    text = _TABLE.sub(lambda table: f"```text\n{table[0]}\n```", text)
    return re.sub(r"::$", ":", text, flags=re.MULTILINE)


def build(folder: Path) -> None:
    """Write the reference into ``folder``.

    Raises:
        Warning: whatever pdoc warns about.
    """
    convert = pdoc.docstrings.rst
    names = module_names()
    pdoc.render.configure(docformat="google", show_source=False, footer_text=f"version {baft_intervention.__version__}")
    pdoc.docstrings.rst = lambda contents, source_file: convert(to_markdown(contents), source_file)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", module="pdoc")
            # of a package without __all__ pdoc finds the modules itself, of one with it it does not
            warnings.filterwarnings("ignore", "The module specification .* has already been added", module="pdoc")
            pdoc.pdoc(*names, output_directory=folder)
    finally:
        pdoc.docstrings.rst = convert


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "reference", help="default: build/reference")
    folder = parser.parse_args(argv).out
    build(folder)
    print(f"{folder / 'baft_intervention.html'}")


if __name__ == "__main__":
    main()
