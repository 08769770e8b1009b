"""A process that edits a tiny model in a folder, to be killed: ``python store_worker.py FOLDER COUNT``.

It tells of each step that is done, a line each, so that the test knows what must be there afterwards.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch

from baft_intervention.requests import EditRequest
from edits import tiny_editor
from tiny import tiny_model, tiny_tokenizer


def request(number: int) -> EditRequest:
    """Every third asks the prompt of the one before the last anew, so that edits are superseded too."""
    asked = number - 2 if number % 3 == 2 else number
    target = ("Japan", "city", "capital")[number % 3]
    return EditRequest(f"The name of number {asked} is", target, id=f"edit-{number}")


def _tell(*words: object) -> None:
    sys.stdout.write(" ".join(map(str, words)) + "\n")
    sys.stdout.flush()


def main(folder: str, count: int) -> None:
    torch.set_num_threads(1)
    editor = tiny_editor(tiny_model("llama"), tiny_tokenizer(), weighting="cosine", steps=2)
    _tell("open")
    editor.keep_in(folder)
    begin = 1 + max((int(edit.id.split("-")[1]) for edit in editor.edits), default=-1)
    for number in range(begin, begin + count):
        editor.edit(request(number))
        _tell("committed", number)
        if number % 7 == 6:
            editor.undo(f"edit-{number}")
            _tell("undone", number)
        if number % 5 == 4:
            editor.compact()
            _tell("compacted")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
