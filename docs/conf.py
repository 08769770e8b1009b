"""The documentation site: ``make docs`` builds it into build/docs, and a warning ends the build."""

from __future__ import annotations

import pkgutil
import re
import shutil
from pathlib import Path
from typing import Any

import baft_intervention

DOCS = Path(__file__).parent
MODULES, NOTEBOOKS = DOCS / "reference" / "modules", DOCS / "tutorials"  # written here, not committed

project = "baft_intervention"
author = "the baft_intervention authors"
copyright = "the baft_intervention authors, Apache-2.0"
release = baft_intervention.__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
]
exclude_patterns = ["**/.ipynb_checkpoints"]
nb_execution_mode = "off"  # the tests run the notebooks; the site shows their committed outputs
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
suppress_warnings = [
    "ref.python"
]  # a public name is documented twice, on its own page and in its module; either is right

autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_class_signature = "mixed"
autodoc_preserve_defaults = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_custom_sections = [("Class attributes", "params_style")]

html_theme = "furo"
html_title = "baft_intervention"
html_static_path = ["static"]
html_css_files = ["tables.css"]
copybutton_prompt_text = r"\$ "
copybutton_prompt_is_regexp = True


def _site_links(app: Any, page: str, source: list[str]) -> None:
    """Links in the sources are right in the repository; in the site, the notebooks lie inside docs/."""
    if page.startswith("tutorials/"):
        source[0] = source[0].replace("](../docs/", "](../")
    else:
        source[0] = source[0].replace("../tutorials/", "tutorials/")


def _copy_notebooks(app: Any) -> None:
    NOTEBOOKS.mkdir(exist_ok=True)
    for notebook in DOCS.parent.joinpath("tutorials").glob("*.ipynb"):
        shutil.copy2(notebook, NOTEBOOKS)


def _write_reference(app: Any) -> None:
    """One page per room of the package, with every module in it."""
    MODULES.mkdir(exist_ok=True)
    rooms: dict[str, list[str]] = {}
    for module in pkgutil.walk_packages(baft_intervention.__path__, "baft_intervention."):
        room = module.name.split(".")[1]
        if not module.name.endswith(".__main__"):
            rooms.setdefault(room, []).append(module.name)
    alone = [names.pop() for room, names in rooms.items() if names == [f"baft_intervention.{room}"]]
    rooms = {room: names for room, names in rooms.items() if names} | {"top_level": alone}
    for room, names in rooms.items():
        lines = [f"# {room.replace('_', ' ')}", ""]
        for name in names:
            lines += [f"## {name}", "", "```{eval-rst}", f".. automodule:: {name}", "   :members:", "```", ""]
        page, text = MODULES / f"{room}.md", "\n".join(lines)
        if not page.is_file() or page.read_text(encoding="utf-8") != text:
            page.write_text(text, encoding="utf-8")
    for page in MODULES.glob("*.md"):
        if page.stem not in rooms:
            page.unlink()


def _indented_is_literal(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """An indented paragraph of a docstring is a formula, a record or code, as in Markdown; reST takes it for a quotation."""
    above, blank, found = "", False, []
    for line in lines:
        deeper = len(line) - len(line.lstrip()) > len(above) - len(above.lstrip())
        if (
            line.strip()
            and blank
            and deeper
            and not above.endswith("::")
            and not re.match(r"\s*([*-]|\.\.|\d+\.) ", above)
        ):
            found += [f"{' ' * (len(above) - len(above.lstrip()))}::", ""]
            above = "::"  # its further lines belong to it
        if line.strip() and not (above == "::" and line.startswith(" ")):
            above = line
        blank = not line.strip()
        found.append(line)
    lines[:] = found


def setup(app: Any) -> None:
    app.connect("autodoc-process-docstring", _indented_is_literal, priority=400)  # before napoleon
    app.connect("builder-inited", _write_reference)
    app.connect("builder-inited", _copy_notebooks)
    app.connect("source-read", _site_links)
