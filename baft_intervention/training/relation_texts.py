"""The texts that the relation encoder learns from: relations in many words, and what resembles them without asking for them.

``relations.json`` has 547 common relations, each in six to eight questions and as many unfinished statements that mean the same,
and names to put in them; ``running_texts.tsv`` has short descriptions of those names, written by SmolLM2. The vocabulary is
general and ours; no benchmark was read to write it.
"""

from __future__ import annotations

import functools
import json
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import RequestError
from ..models.chat import render_chat

RELATIONS = Path(__file__).with_name("relations.json")
RUNNING_TEXTS = Path(__file__).with_name("running_texts.tsv")

# what anyone may ask about anything, and how sentences about it begin: no relation in particular
GENERAL = (
    "What is {} known for?", "Tell me about {}.", "Write a short description of {}.", "Who or what is {}?",
    "Describe {}.", "{} is", "{} was", "{} has", "{} can", "What do you know about {}?", "Give me some facts about {}.",
    "Why is {} important?", "How can I learn more about {}?", "Where can I read more about {}?", "I like {} because",
    "Yesterday I read about {}.", "What do people think about {}?", "When I think of {}, I",
    "There are many stories about {}, and", "In an article about {}, the author", "Summarise what is known about {}.",
    "What is the history of {}?", "What is special about {}?", "Can you explain {} to a child?", "{} became",
    "People say that {}", "What should I know about {}?", "The story of {} begins", "Who has heard of {}?",
)  # fmt: skip
OPENINGS = (
    "It rained all night and the streets were empty.",
    "She put the letter on the table and left.",
    "The second edition appeared two years later.",
    "Nobody had expected so many people.",
    "This was decided at the meeting in March.",
    "The game ended with a draw.",
    "He opened the window and looked at the garden.",
    "Prices have risen again since then.",
    "The road leads through a small forest.",
    "There are several reasons for this.",
    "After dinner they played cards.",
    "A new bridge is being built.",
)  # sentences that can stand before a prompt and are unrelated to it
_BEFORE = (
    "The morning was cold, and a thin layer of frost lay on the fields.",
    "I have been thinking about this for a while.",
    "She closed the book and looked out of the window.",
    "Thank you for your help yesterday.",
)
_AUXILIARY = re.compile(r"\{\} (is|was|are|were|has|had|can|will) (.+)")
_VERB = re.compile(r"\{\} ([a-z]+[^s])s (.+)")


@dataclass(frozen=True)
class RelationText:
    """A text that ends where something is about to be stated.

    Args:
        text: the text.
        relation: number of the relation whose object would follow; -1 where none would.
        near: number of a relation that the text is about without asking for its object; -1 if there is none.
        subject: the entity that is asked about, as it stands in the text; empty for a text without one.
        running: whether the text is running prose, none of whose tokens asks for anything.
        closed: whether it wants yes or no, or nothing in particular: no name begins an answer to it.
    """

    text: str
    relation: int = -1
    near: int = -1
    subject: str = ""
    running: bool = False
    closed: bool = False


@functools.cache
def relations() -> tuple[dict[str, list[str]], list[dict[str, Any]]]:
    """``(kind -> names, relations)``; a relation has a name, kinds of subjects, questions and statements with ``{}``."""
    data = json.loads(RELATIONS.read_text(encoding="utf-8"))
    return data["subjects"], data["relations"]


def relation_texts(tokenizer: Any, *, limit: int | None = None, seed: int = 0) -> list[RelationText]:
    """All texts, in a fixed order; without a chat template the conversations are left out.

    Args:
        limit: of the number of relations, for a quick look.
    """
    subjects, found = relations()
    return list(_Writer(tokenizer, subjects, found[:limit], seed).texts())


class _Writer:
    def __init__(self, tokenizer: Any, subjects: dict[str, list[str]], found: Sequence[dict[str, Any]], seed: int):
        self.subjects, self.relations, self.random = subjects, found, random.Random(seed)
        self.everyone = [name for names in subjects.values() for name in names]
        self.chat: Callable[..., str] | None = functools.partial(_chat, tokenizer)
        try:
            self.chat("Hello")
        except RequestError:
            self.chat = None

    def subject(self, relation: dict[str, Any]) -> str:
        kinds = [kind for kind in relation["kinds"] if kind in self.subjects] or ["thing"]
        return self.random.choice(self.subjects[self.random.choice(kinds)])

    def texts(self):
        for number, relation in enumerate(self.relations):
            yield from self.asked(number, relation)
            yield from self.nearly_asked(number, relation)
        for form in GENERAL:
            for k in range(8):
                name = self.random.choice(self.everyone)
                text = _sentence(form, name)
                yield RelationText(self.chat(text) if self.chat and k % 2 else text, subject=name, closed=True)
        for k, line in enumerate(RUNNING_TEXTS.read_text(encoding="utf-8").splitlines()):
            name, text = line.split("\t")
            if self.chat and k % 2:
                asked = self.chat(_sentence(self.random.choice(GENERAL[1:5]), name))
                yield RelationText(asked + text, subject=name, running=True)
            else:
                yield RelationText(text, subject=name, running=True)
        for number, relation in enumerate(self.relations):
            yield from self.told(number, relation)

    def asked(self, number: int, relation: dict[str, Any]):
        """The relation in all its words, some of them in chat, after ``Q:``, behind other text or a turn about another subject."""
        forms = [(True, form) for form in relation["questions"]] + [(False, form) for form in relation["statements"]]
        self.random.shuffle(forms)
        for _, form in forms:
            name = self.subject(relation)
            yield RelationText(_sentence(form, name), number, subject=name)
        questions, statements = ([f for is_question, f in forms if is_question is kind] for kind in (True, False))
        for form in questions[:2]:
            name = self.subject(relation)
            yield RelationText(f"Q: {_sentence(form, name)}\nA:", number, subject=name)
        name = self.subject(relation)
        yield RelationText(f"{self.random.choice(_BEFORE)} {_sentence(questions[-1], name)}", number, subject=name)
        name = self.subject(relation)
        yield RelationText(f"{self.said()} {_sentence(statements[-1], name)}", number, subject=name)
        if self.chat is None:
            return
        for form in (*questions[:3], statements[0]):
            name = self.subject(relation)
            yield RelationText(self.chat(_sentence(form, name)), number, subject=name)
        other = self.random.choice(self.relations)
        name, before = self.subject(relation), self.subject(other)
        turn = (_sentence(self.random.choice(other["questions"]), before), self.random.choice(self.everyone))
        yield RelationText(self.chat(_sentence(questions[-1], name), turn), number, subject=name)

    def told(self, number: int, relation: dict[str, Any]):
        """The relation in running text and as a keyword."""
        for opening in (self.said(), f"{self.said()} {self.said()}", self.random.choice(_BEFORE)):
            name = self.subject(relation)
            yield RelationText(
                f"{opening} {_sentence(self.random.choice(relation['statements']), name)}", number, subject=name
            )
        name = self.subject(relation)
        form = self.random.choice(("{} {}:", "{} - {}:", "{}, {}:", "{}\n{}:"))
        yield RelationText(form.format(name, relation["name"]), number, subject=name)

    def said(self) -> str:
        """A whole sentence about something."""
        other = self.random.choice(self.relations)
        about = self.subject(other)
        return f"{_sentence(self.random.choice(other['statements']), about)} {self.random.choice(self.everyone)}."

    def nearly_asked(self, number: int, relation: dict[str, Any]):
        """Yes-or-no questions about the relation, and questions that need one more hop from or to it."""
        name, noun = self.subject(relation), relation["name"]
        answer = self.random.choice(self.everyone)
        statements = [_lower(form) for form in relation["statements"]]
        closed = [
            f"Is it true that {self.random.choice(statements)} {answer}?",
            _sentence(self.random.choice(statements), "{}") + f" {answer}, right?",
            f"Is {answer} the {noun} of {{}}?",
            f"Is the {noun} of {{}} {answer}?",
        ]
        for form in statements:
            if found := _AUXILIARY.fullmatch(form):
                closed += [f"{found[1].capitalize()} {{}} {found[2]} {answer}?"] * 2
            elif found := _VERB.fullmatch(form):
                closed += [f"Does {{}} {found[1]} {found[2]} {answer}?"] * 2
        self.random.shuffle(closed)
        for k, form in enumerate(closed[:4]):
            text = form.replace("{}", name)
            yield RelationText(
                self.chat(text) if self.chat and k == 0 else text, near=number, subject=name, closed=True
            )
        for k in range(4):
            other = self.random.choice(self.relations)
            outer, inner = (relation, other) if k == 0 else (other, relation)
            name = self.subject(inner)
            form = self.random.choice(outer["questions"] if k < 3 else outer["statements"])
            text = _sentence(form, f"the {inner['name']} of {name}")
            yield RelationText(self.chat(text) if self.chat and k == 1 else text, near=number, subject=name)


def _sentence(form: str, name: str) -> str:
    text = form.replace("{}", name)
    return text[:1].upper() + text[1:]


def _lower(form: str) -> str:
    return form if form.startswith("{}") else form[:1].lower() + form[1:]


def _chat(tokenizer: Any, text: str, before: tuple[str, str] | None = None) -> str:
    turns = [{"role": "user", "content": text}]
    if before:
        turns = [{"role": "user", "content": before[0]}, {"role": "assistant", "content": before[1]}, *turns]
    return render_chat(tokenizer, turns)
