"""Methods that train nothing: the unedited model, and the fact in the prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ...errors import ConfigError
from ...models.structure import find_blocks
from ...models.tokenization import encode_prompt, joint_text
from ...requests import EditRequest
from ..edited import EditCost, EditedModel
from .base import Method, register_method


@register_method("base")
@dataclass(frozen=True)
class Base(Method):
    """No edit: the unedited model."""

    def attach(self, model: Any, tokenizer: Any) -> EditedModel:
        edited = EditedModel(model, tokenizer)
        edited.first_changed_block = len(find_blocks(model))
        return edited


@register_method("icl")
@dataclass(frozen=True)
class InContext(Method):
    """In-context editing: nothing is trained; every prompt begins with the new facts.

    EasyEdit's form without demonstrations (``New Fact: {prompt} {target}\\nPrompt: {question}``). Facts accumulate; if not
    all fit, the latest are kept.

    Args:
        template: text of one fact, with ``{fact}``.
        lead: text before the question.
        context_share: share of the model's context that facts may fill.
    """

    template: str = "New Fact: {fact}\n"
    lead: str = "Prompt: "
    context_share: float = 0.75

    def attach(self, model: Any, tokenizer: Any) -> EditedModel:
        if "{fact}" not in self.template:
            raise ConfigError(f"template of method 'icl' is {self.template!r}; it must contain {{fact}}")
        return _InContextModel(self, model, tokenizer)


class _InContextModel(EditedModel):
    def __init__(self, method: InContext, model: Any, tokenizer: Any) -> None:
        super().__init__(model, tokenizer)
        self.method = method
        self.facts: dict[str, str] = {}
        self.text = ""

    def apply(self, requests: Sequence[EditRequest]) -> EditCost:
        for request in requests:
            self.facts.pop(request.prompt, None)  # a prompt's newest answer replaces an older one, and comes last
            self.facts[request.prompt] = joint_text(request.prompt, request.target_new)
        config = self.model.config
        context = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None) or 2048
        room, kept = int(self.method.context_share * context), []
        for fact in reversed(self.facts.values()):
            line = self.method.template.replace("{fact}", fact)
            room -= len(encode_prompt(self.tokenizer, line))
            if kept and room < 0:
                break
            kept.append(line)
        self.text = "".join(reversed(kept))
        self.cost = EditCost(0, None, 0, len(self.text.encode()))
        return self.cost

    def rewrite(self, prompt: str) -> str:
        return self.text + self.method.lead + prompt if self.text else prompt

    def restore(self) -> None:
        self.facts, self.text = {}, ""
