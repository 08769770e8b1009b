"""Small edits for the tests: facts whose targets are one token of the tiny tokenizer, and settings that reach them fast."""

from __future__ import annotations

import contextlib
import hashlib
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from baft_intervention.config import BaftConfig
from baft_intervention.editor.editor import BaftEditor
from baft_intervention.gates import RelationEncoder
from baft_intervention.models.structure import hidden_size
from baft_intervention.requests import EditRequest
from baft_intervention.runtime import causal_gate
from baft_intervention.training import relation_training

# given to the editor as its bank, so that no test waits for a tiny model to write texts
BANK = (
    "The city of London is large.",
    "He works as a painter in Rome.",
    "What language does he speak?",
    "In the year 1965 she was born.",
    "Music is what I like.",
    "The name of the river",
    "Who is she?",
    "It is located in the country of Italy.",
    "A painter was born",
    "France and Japan",
    "Leo speaks French.",
    "the mother of Danielle",
    "The United States",
    "They are",
)
FRANCE = EditRequest("The capital of France is", "Japan", subject="France", id="france")
LEO = EditRequest("The mother tongue of Leo is", "city", subject="Leo", id="leo")
TOWER = EditRequest("The Eiffel Tower is located in", "capital", subject="The Eiffel Tower", id="tower")
FACTS = (FRANCE, LEO, TOWER)
# of different lengths in tokens, edited and not
PROMPTS = (FRANCE.prompt, "Who is the president of the United States?", LEO.prompt, "He was", TOWER.prompt)


ASKED = causal_gate._ASKED  # what a real model's gate asks


def leave_encoders_untrained(replace: Callable[[Any, str, Any], None], cache: Path) -> None:
    """Relation encoders of tiny models stay as they are built, apart from real ones; any subject that is named is asked about.

    Args:
        replace: ``setattr``, or that of a monkeypatch.
        cache: the folder where encoders are kept.
    """
    train = relation_training.new_encoder

    def new_encoder(model: Any, tokenizer: Any, layers: Any, **options: Any) -> RelationEncoder:
        width = hidden_size(model)
        if width > 128:
            return train(model, tokenizer, layers, **options)
        encoder = RelationEncoder().build(width)
        encoder.least = torch.tensor([-1e4])  # an answer may begin anywhere
        encoder.false_openings = torch.linspace(-1.0, 0.6, 3)  # a threshold that the forms of a request pass
        return encoder

    replace(relation_training, "new_encoder", new_encoder)
    replace(relation_training, "cache_folder", lambda: cache)
    replace(causal_gate, "_ASKED", -math.inf)


def config(**changes: Any) -> BaftConfig:
    """Settings that reach a one-token target on a tiny model in a few steps; its attention is too weak for what ends it."""
    return BaftConfig(**{"rank": 4, "learning_rate": 0.05, "steps": 40, "ending": "", **changes})


def tiny_editor(model: Any, tokenizer: Any, **changes: Any) -> BaftEditor:
    return BaftEditor(model, tokenizer, config(**changes), model_name="tiny", bank_texts=BANK)


def logits(model: Any, tokenizer: Any, prompt: str) -> torch.Tensor:
    """Next-token logits ``(V,)`` of a prompt alone, as anybody would call the model."""
    with torch.no_grad():
        return model(**tokenizer(prompt, return_tensors="pt")).logits[0, -1]


def next_word(model: Any, tokenizer: Any, prompt: str) -> str:
    return tokenizer.decode([int(logits(model, tokenizer, prompt).argmax())]).strip()


def digest(model: nn.Module) -> str:
    """sha256 over every parameter and buffer, name and bytes."""
    found = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        found.update(name.encode() + tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def hooks(model: nn.Module) -> dict[str, int]:
    """How many hooks of each kind each module has; modules without any are left out."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    counts = {n: sum(len(getattr(m, kind)) for kind in kinds) for n, m in model.named_modules()}
    return {name: count for name, count in counts.items() if count}


def adapter_bytes(editor: BaftEditor) -> dict[str, bytes]:
    """The adapter's tensors by name, and the edits' ids in order."""
    state = {name: tensor.numpy().tobytes() for name, tensor in editor.adapter.state().items()}
    return {**state, "ids": repr([edit.id for edit in editor.edits]).encode()}


@contextlib.contextmanager
def unchanged(editor: BaftEditor) -> Iterator[None]:
    """Fails where, after the block, anything of the model or of the adapter is not what it was before."""
    model = editor.model

    def look() -> dict[str, Any]:
        return {
            "weights": digest(model),
            "hooks": hooks(model),
            "modes": [m.training for m in model.modules()],
            "flags": [p.requires_grad for p in model.parameters()],
            "gradients": [p.grad is not None for p in model.parameters()],
            "adapter": adapter_bytes(editor),
            "logits": [logits(model, editor.tokenizer, p).numpy().tobytes() for p in PROMPTS],
        }

    before = look()
    yield
    after = look()
    for name, value in before.items():
        assert after[name] == value, f"{name} changed"
