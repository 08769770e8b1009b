"""ConvSent: change the sentiment of replies about a topic (SERAC, Mitchell et al. 2022, arXiv 2206.06520).

JSON *Lines*, although the files end in ``.json``::

    {"ent": "Esparto, California", "pos": [" I love it. ", …], "neg": [" I'm not a fan. ", …]}

The replies are BlenderBot samples about the entity, positive and negative. The record does not say which of them an edit
should aim at. SERAC and EasyEdit draw this direction from a global random state; here the option ``direction`` is
``positive``, ``negative`` or ``random``, which depends on the seed and the entity alone (:func:`direction_of`), not on
the limit or the order of the file.

The request is ``What do you think of {ent}?`` with the first desired reply as its target, as in EasyEdit. Its probes:
    * kind ``rephrase``, group ``sentiment``: the question in one of SERAC's other twelve wordings; ``answers`` are
      *all* desired replies and ``contrast`` all opposite ones, which the ConvSent score compares.
    * kind ``locality``, group ``other_topic``: the same questions about the next entities of the file, with all
      their replies, positive first, for the KL term of the score.

Traps: BlenderBot often misreads an entity (it praises a town as a rapper); a "positive" reply may say that it has no
opinion. Token accuracy means little here; use the ConvSent score.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any, Literal

from ..requests import EditRequest, Probe
from .record import Record
from .registry import register_format

Direction = Literal["positive", "negative"]

# SERAC's thirteen wordings
TEMPLATES = (
    "What do you think of {}?",
    "What do you feel about {}?",
    "How do you view {}?",
    *(
        f"What is your {noun} {{}}?"
        for noun in (
            *("opinion of", "stance on", "position on", "attitude about", "view on"),
            *("take on", "impression of", "assessment of", "judgment of", "sentiment of"),
        )
    ),
)


def _draw(bound: int, *key: object) -> int:
    """A number below ``bound`` that depends on ``key`` alone, not on the machine or a library's version."""
    digest = hashlib.sha256("\0".join(map(str, key)).encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") % bound


def direction_of(entity: str, seed: int) -> Direction:
    """An entity's direction under ``direction="random"``."""
    return ("positive", "negative")[_draw(2, "direction", seed, entity)]


def question(entity: str, template: str = TEMPLATES[0]) -> str:
    return template.replace("{}", entity)


@register_format("convsent", matches=("ent", "pos", "neg"))
def read_convsent(
    record: Record,
    *,
    direction: Literal["random", "positive", "negative"] = "random",
    instructed: bool = False,
    rephrases: int = 1,
    others: int = 2,
    seed: int = 0,
) -> EditRequest:
    """ConvSent (ent, pos, neg): a desired sentiment about a topic.

    Args:
        record: the record.
        direction: the desired sentiment; ``random`` draws it from ``seed`` and the entity.
        instructed: train on "From the sentiment dataset, answer {question} positively.", as EasyEdit's script does
            (with the spelling "postively"); the probes ask the plain question in either case.
        rephrases: number of probes with other wordings, 0 to 12.
        others: number of probes about other entities.
        seed: draws the direction and the wordings.
    """
    entity = record.text("ent")
    replies = {"positive": record.texts("pos"), "negative": record.texts("neg")}
    for name, side in (("pos", "positive"), ("neg", "negative")):
        if not replies[side]:
            raise record.error(name, "holds no reply; ConvSent needs replies of both sentiments")
    desired: Direction = direction_of(entity, seed) if direction == "random" else direction
    opposite = "negative" if desired == "positive" else "positive"
    prompt = question(entity)
    if instructed:
        prompt = f"From the sentiment dataset, answer {prompt} {desired}ly."
    probes: list[Probe] = []
    start = _draw(len(TEMPLATES) - 1, "wording", seed, entity)
    for k in range(max(0, min(rephrases, len(TEMPLATES) - 1))):
        template = TEMPLATES[1 + (start + k) % (len(TEMPLATES) - 1)]
        wording = question(entity, template)
        probes += record.probe(wording, "rephrase", replies[desired], replies[opposite], group="sentiment")
    probes += _other_topics(record, entity, others, seed)
    return record.request(
        prompt=prompt,
        target_new=replies[desired][0],
        subject=entity,
        target_true=replies[opposite],
        probes=tuple(probes),
    )


def _other_topics(record: Record, entity: str, count: int, seed: int) -> list[Probe]:
    """Questions about the next entities of the file; skips siblings that are malformed or about the same entity."""
    probes: list[Probe] = []
    for step in range(1, len(record.siblings)):
        if len(probes) >= count:
            break
        sibling = record.siblings[(record.position + step) % len(record.siblings)]
        other = sibling.get("ent") if isinstance(sibling, Mapping) else None
        if not isinstance(other, str) or not other.strip() or other.strip() == entity:
            continue
        other = other.strip()
        replies = _texts_of(sibling, "pos") + _texts_of(sibling, "neg")
        wording = question(other, TEMPLATES[_draw(len(TEMPLATES), "other", seed, entity, other)])
        probes += record.probe(wording, "locality", replies, group="other_topic")
    return probes


def _texts_of(row: Mapping[str, Any], name: str) -> tuple[str, ...]:
    """The usable replies of another record, whose errors are reported when it is read itself."""
    value = row.get(name)
    found = (text.strip() for text in value if isinstance(text, str)) if isinstance(value, list) else ()
    return tuple(text for text in found if text)
