"""Tables and a plot of a folder of results: report.md, report.csv and report.png in it.

python benchmarks/report.py benchmarks/results/smollm2
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from baft_intervention.errors import BaftError
from baft_intervention.evaluation.report import write_report


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="holds the cells that benchmarks/run.py wrote")
    parser.add_argument("--note", default="", help="a paragraph for the head of the report")
    args = parser.parse_args(argv)
    command = args.folder / "command.txt"
    try:
        paths = write_report(
            args.folder, command=command.read_text(encoding="utf-8") if command.is_file() else "", note=args.note
        )
    except (BaftError, OSError) as error:
        print(f"report.py: error: {error}", file=sys.stderr)
        return 2
    for path in paths.values():
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
