"""Output of the command line: tables for people or JSON for machines on stdout, everything else on stderr."""

from __future__ import annotations

import json
import logging
import sys
import unicodedata
from collections.abc import Iterable, Sequence
from typing import Any, Literal

OK, FAILED, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130  # exit codes
Mark = Literal["ok", "missed", "same", "moved", "changed"]
_STYLES: dict[str, str] = {"ok": "bold green", "missed": "bold red", "same": "green", "moved": "bold yellow"}
PIPED_WIDTH = 120  # columns of a table that goes to a file or a pipe


class Output:
    """The output of a command.

    Args:
        as_json: write the result as one JSON value to stdout, and nothing else there.
        quiet: write no progress bar and no notes to stderr, only warnings and errors.
    """

    def __init__(self, *, as_json: bool = False, quiet: bool = False):
        self.as_json, self.quiet = as_json, quiet

    @property
    def progress(self) -> bool:
        """Whether to draw a progress bar: stderr is a terminal, and ``quiet`` is off."""
        return not self.quiet and sys.stderr.isatty()

    def note(self, text: str) -> None:
        """Write a line about the work in progress to stderr."""
        if not self.quiet:
            sys.stderr.write(text + "\n")
            sys.stderr.flush()

    def say(self, text: str = "", *, style: str = "") -> None:
        """Write a line of the result for people."""
        if not self.as_json:
            from rich.text import Text

            _console().print(Text(text, style=style))

    def table(
        self,
        columns: Sequence[str],
        rows: Iterable[Sequence[object]],
        *,
        title: str = "",
        mark: int | None = None,
        sections: Iterable[int] = (),
    ) -> None:
        """Write a table of the result for people.

        Args:
            columns: headings.
            rows: cells, shown as plain text with control characters replaced.
            title: a line above.
            mark: index of the column of :data:`Mark`, which is coloured.
            sections: indices of rows with a rule below.
        """
        if self.as_json:
            return
        from rich import box
        from rich.table import Table
        from rich.text import Text

        table = Table(
            title=Text(title, style="bold") if title else None,
            title_justify="left",
            box=box.SIMPLE_HEAD,
            pad_edge=False,
        )
        for i, name in enumerate(columns):
            table.add_column(Text(name), overflow="fold", no_wrap=i == mark)
        ends = set(sections)
        for index, row in enumerate(rows):
            cells = [
                Text(one_line(cell), style=_STYLES.get(str(cell), "") if i == mark else "")
                for i, cell in enumerate(row)
            ]
            table.add_row(*cells, end_section=index in ends)
        _console().print(table)

    def result(self, data: Any) -> None:
        """Write the whole result for machines, in ASCII, which passes any pipe."""
        if self.as_json:
            sys.stdout.write(json.dumps(data, indent=1) + "\n")
            sys.stdout.flush()


class Silent(Output):
    """Shows nothing, for all but one of several processes that run a command together."""

    def __init__(self) -> None:
        super().__init__(as_json=True, quiet=True)

    def result(self, data: Any) -> None:
        pass


def one_line(value: object) -> str:
    """A text on one line, with ``⏎`` for line ends and without control characters."""
    text = str(value).strip().replace("\r\n", "\n").replace("\n", "⏎")
    while "⏎⏎" in text:
        text = text.replace("⏎⏎", "⏎")
    return "".join(c if unicodedata.category(c) not in ("Cc", "Cs") else "�" for c in text)


def can_show(text: str) -> bool:
    """Whether stdout's encoding has the characters."""
    try:
        text.encode(getattr(sys.stdout, "encoding", None) or "utf-8")
    except UnicodeEncodeError:
        return False
    return True


def set_up_logging(*, quiet: bool, debug: bool) -> None:
    """Show the library's messages on stderr."""
    logger = logging.getLogger("baft_intervention")
    logger.setLevel(logging.DEBUG if debug else logging.WARNING if quiet else logging.INFO)
    for handler in [h for h in logger.handlers if isinstance(h, _StderrHandler)]:
        logger.removeHandler(handler)
    logger.addHandler(_StderrHandler())
    logger.propagate = False
    # hide the retries if the hub cannot be reached; the error says so
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)


class _StderrHandler(logging.Handler):
    """Writes to the current ``sys.stderr`` (tests replace it) without breaking a progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        from tqdm import tqdm

        prefix = "" if record.levelno <= logging.INFO else f"{record.levelname.lower()}: "
        tqdm.write(f"baft: {prefix}{record.getMessage()}", file=sys.stderr)


def _console() -> Any:
    from rich.console import Console

    width = None if sys.stdout.isatty() else PIPED_WIDTH
    return Console(file=sys.stdout, width=width, highlight=False, markup=False, emoji=False)
