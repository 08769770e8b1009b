"""Run by ``make wheel`` in an environment with the wheel and no pyreft: edit, save, load, undo on a tiny model.

Not a test module: it runs with ``python -P`` from a folder outside the tree, and must find the installed package.
"""

from __future__ import annotations

import importlib.util
import sys
import tempfile
from pathlib import Path

TESTS = Path(__file__).resolve().parent
if str(TESTS) not in sys.path:
    sys.path.append(str(TESTS))  # for tiny.py, behind the installed packages

import torch

import baft_intervention as baft
from baft_intervention.training.relation_texts import relations
from baft_intervention.training.relation_training import SHIPPED
from tiny import tiny_model, tiny_tokenizer


def edit_a_tiny_model() -> None:
    """Edit, generate, save, load into a second editor, undo; the base model is byte for byte as before."""
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    config = baft.BaftConfig(rank=4, layers=(1,), weighting="cosine")  # the default gate would train an encoder first
    editor = baft.BaftEditor(model, tokenizer, config)
    request = baft.EditRequest(prompt="The capital of Japan is", target_new="city", subject="Japan")
    unedited = editor.generate(request.prompt, max_new_tokens=4)
    report = editor.edit([request])
    text = editor.generate(request.prompt, max_new_tokens=4)
    assert text.strip().startswith("city"), f"the edit does not hold: {text!r}"
    with tempfile.TemporaryDirectory() as folder:
        editor.save_pretrained(folder)
        editor.detach()
        again = baft.BaftEditor(model, tokenizer, config)
        again.load_adapter(folder)
        assert again.generate(request.prompt, max_new_tokens=4) == text
        again.undo(report.edits[0].id)
        assert again.generate(request.prompt, max_new_tokens=4) == unedited
        again.detach()
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def main() -> None:
    where = Path(baft.__file__).resolve()
    assert where.is_relative_to(Path(sys.prefix).resolve()), f"{where} is not of this environment, {sys.prefix}"
    assert importlib.util.find_spec("pyreft") is None, "this environment was to be without pyreft"
    assert relations()[1], "the default gate has no relations"
    assert list(SHIPPED.glob("*.safetensors")), "the encoder of the built-in model is not in the wheel"
    edit_a_tiny_model()
    sys.stdout.write(f"the wheel works from {where.parent}\n")


if __name__ == "__main__":
    main()
