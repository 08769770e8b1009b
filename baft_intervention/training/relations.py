"""Common relations and subjects: what else could be asked about an edit's subject.

From these the library makes its hard negatives: the relation dictionary (each relation asked of each common subject,
once a model) and an edit's own centre (a few relations asked of its subject). General vocabulary, ours; no benchmark
was read to write it.
"""

from __future__ import annotations

RELATIONS = (
    "name", "father", "mother", "spouse", "child", "brother", "gender", "occupation", "employer", "place of birth",
    "place of death", "date of birth", "cause of death", "nationality", "religion", "native language", "education", "award",
    "field of work", "team", "position", "founder", "owner", "author", "director", "publisher", "genre", "country",
    "capital", "population", "currency", "official language", "head of government", "location", "headquarters",
    "year of foundation", "color", "size", "species", "purpose", "subject", "instrument", "network", "manufacturer", "river",
    "continent", "twin city", "anthem",
)  # fmt: skip
COMMON_SUBJECTS = (
    "Canada", "Maria Lopez", "Mount Kenya", "The Silver Lake", "Peter Schmidt", "Toyota", "Queen Anne", "Vienna",
    "Apollo Records", "John Baker", "Hamlet", "Stanford University",
)  # fmt: skip
CENTRE_RELATIONS = (
    "name",
    "cause of death",
    "capital",
    "location",
)  # far apart, so that their mean is the subject's share


def ask(relation: str, subject: str) -> str:
    """The statement-form prompt of a relation: ``The capital of Canada is``."""
    return f"The {relation} of {subject} is"


def ask_in_chat(relation: str, subject: str) -> str:
    """The same as a user of a chat model asks it: ``What is the capital of Canada?``."""
    return f"What is the {relation} of {subject}?"
