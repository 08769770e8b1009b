"""The relation dictionary: common relations, each asked of common subjects in several forms.

The gate takes its hard negatives from it (other relations, once a model) and an edit's centre (a few relations asked of its
own subject). The vocabulary is general and ours; no benchmark was read to write it.
"""

from __future__ import annotations

import re
from typing import NamedTuple

# noun, question, unfinished sentence
RELATIONS: tuple[tuple[str, str, str], ...] = (
    ("name", "What is {} called?", "{} is known by the name of"),
    ("father", "Who is {}'s father?", "{} is the child of a man named"),
    ("mother", "Who is {}'s mother?", "{} was born to a mother named"),
    ("spouse", "Who is {} married to?", "{} is married to"),
    ("child", "Who is {}'s child?", "{} is the parent of"),
    ("sibling", "Who is {}'s brother or sister?", "{} is the sibling of"),
    ("gender", "Is {} male or female?", "The sex of {} is"),
    ("occupation", "What does {} do for a living?", "{} works as a"),
    ("employer", "Who does {} work for?", "{} is employed by"),
    ("place of birth", "Where was {} born?", "{} was born in the town of"),
    ("place of death", "Where did {} die?", "{} passed away in the city of"),
    ("date of birth", "When was {} born?", "{} was born on"),
    ("date of death", "When did {} die?", "{} died on"),
    ("cause of death", "How did {} die?", "{} died of"),
    ("burial place", "Where is {} buried?", "{} is buried at"),
    ("residence", "Where does {} live?", "{} lives in"),
    ("nationality", "What is {}'s nationality?", "{} is a citizen of"),
    ("religion", "What faith does {} follow?", "{} believes in the religion of"),
    ("ethnic group", "What ethnicity is {}?", "{} belongs to the people of the"),
    ("native language", "What is {}'s mother tongue?", "{} grew up speaking"),
    ("school", "Where did {} study?", "{} was educated at"),
    ("academic degree", "What degree does {} have?", "{} graduated with a degree of"),
    ("award", "What prize did {} win?", "{} was honoured with the"),
    ("field of work", "What field does {} work in?", "{} is an expert in"),
    ("team", "Which team does {} play for?", "{} plays for"),
    ("position on the field", "What position does {} play?", "{} plays in the position of"),
    ("office", "What office does {} hold?", "{} holds the office of"),
    ("political party", "Which party is {} a member of?", "{} belongs to the party"),
    ("military rank", "What rank did {} have?", "{} served with the rank of"),
    ("founder", "Who founded {}?", "{} was founded by"),
    ("owner", "Who owns {}?", "{} is owned by"),
    ("author", "Who wrote {}?", "{} was written by"),
    ("director", "Who directed {}?", "{} was directed by"),
    ("producer", "Who produced {}?", "{} was produced by"),
    ("composer", "Who composed the music of {}?", "The music of {} was composed by"),
    ("performer", "Who sang {}?", "{} was performed by"),
    ("leading actor", "Who starred in {}?", "The star of {} is"),
    ("main character", "Who is the hero of {}?", "{} tells the story of"),
    ("publisher", "Who published {}?", "{} was published by"),
    ("record label", "Which label released {}?", "{} is signed to the label"),
    ("genre", "What kind of work is {}?", "{} belongs to the genre of"),
    ("publication date", "When was {} released?", "{} came out in"),
    ("designer", "Who designed {}?", "{} was designed by"),
    ("inventor", "Who discovered {}?", "{} was invented by"),
    ("manufacturer", "Which company makes {}?", "{} is produced by the company"),
    ("material", "What is {} made of?", "{} is made of"),
    ("country", "Which country is {} in?", "{} is a part of the country of"),
    ("capital", "What city is the capital of {}?", "{} is governed from its capital,"),
    ("population", "How many people live in {}?", "{} has a population of"),
    ("area", "How large is {}?", "{} covers an area of"),
    ("height", "How tall is {}?", "{} has a height of"),
    ("currency", "What money is used in {}?", "People in {} pay with the"),
    ("official language", "What language is spoken in {}?", "People in {} speak"),
    ("head of government", "Who governs {}?", "{} is led by"),
    ("location", "Where is {}?", "{} can be found in"),
    ("headquarters", "Where is {} based?", "{} has its headquarters in"),
    ("year of foundation", "When was {} founded?", "{} was established in the year"),
    ("chief executive", "Who runs {}?", "{} is managed by"),
    ("parent company", "Which group does {} belong to?", "{} is a subsidiary of"),
    ("product", "What does {} sell?", "{} is best known for making"),
    ("industry", "What business is {} in?", "{} operates in the industry of"),
    ("color", "What color is {}?", "{} is coloured"),
    ("shape", "What does {} look like?", "{} looks like a"),
    ("species", "What species is {}?", "{} is an animal of the species"),
    ("family", "Which family is {} part of?", "{} belongs to the family of"),
    ("purpose", "What is {} used for?", "{} is used for"),
    ("topic", "What is {} about?", "{} deals with the subject of"),
    ("instrument", "What instrument does {} play?", "{} plays the"),
    ("voice", "What does {} sound like?", "{} sings with a voice that is"),
    ("network", "On which channel is {} shown?", "{} is broadcast on"),
    ("river", "Which river is near {}?", "{} lies on the river"),
    ("continent", "Which continent is {} on?", "{} lies on the continent of"),
    ("twin city", "What is the sister city of {}?", "{} is twinned with"),
    ("anthem", "What is the song of {}?", "The anthem sung in {} is"),
    ("neighbour", "What borders {}?", "{} shares a border with"),
    ("climate", "What is the weather like in {}?", "The climate in {} is"),
    ("conflict", "Which war did {} fight in?", "{} fought in the"),
    ("conviction", "What crime did {} commit?", "{} was convicted of"),
    ("teacher", "Who taught {}?", "{} was a student of"),
    ("influence", "Who inspired {}?", "{} was influenced by"),
    ("status", "What state is {} in?", "The present condition of {} is"),
    ("number of members", "How many members does {} have?", "{} is made up of"),
    ("cost", "How much does {} cost?", "{} can be bought for"),
    ("successor", "Who came after {}?", "{} was followed by"),
    ("nickname", "What nickname does {} have?", "People affectionately call {} by the nickname"),
    ("eye color", "What color are {}'s eyes?", "{} looks at you with eyes that are"),
    ("weight", "How much does {} weigh?", "{} has a weight of"),
    ("age", "How old is {}?", "{} has reached the age of"),
    ("income", "How much money does {} earn?", "{} earns a yearly sum of"),
    ("hobby", "What does {} do in the free time?", "In the evenings {} likes to"),
    ("home town", "In which town did {} grow up?", "{} spent a childhood in"),
    ("coach", "Who coaches {}?", "{} is trained by"),
    ("league", "Which league does {} compete in?", "{} competes in the league called"),
    ("stadium", "Where does {} play home games?", "The home matches of {} are held at"),
    ("sport", "Which sport is {} known for?", "{} is a professional in the sport of"),
    ("editor", "Who edited {}?", "{} was edited by"),
    ("translator", "Who translated {}?", "{} was translated by"),
    ("language of the work", "In what language was {} written?", "The original text of {} is in"),
    ("setting", "Where does the story of {} take place?", "{} is set in"),
    ("source", "What is {} based on?", "{} is based on"),
    ("episode count", "How many episodes does {} have?", "The number of parts of {} is"),
    ("sequel", "What is the sequel to {}?", "{} was continued in"),
    ("license", "Under which license is {} distributed?", "{} may be used under the license"),
    ("programming language", "What language is {} programmed in?", "The code of {} is written in"),
    ("operating system", "Which system does {} run on?", "{} runs on"),
    ("architect", "Who was the architect of {}?", "The plans of {} were drawn by the architect"),
    ("style", "In which style is {} built?", "{} is an example of the style of"),
    ("patron saint", "Which saint protects {}?", "{} is under the protection of Saint"),
    ("time zone", "Which time zone is {} in?", "Clocks in {} follow"),
    ("elevation", "How high above the sea is {}?", "{} rises above the sea by"),
    ("length", "How long is {}?", "{} stretches over a length of"),
    ("mouth", "Where does {} flow to?", "{} empties into"),
    ("mountain range", "Which mountains does {} belong to?", "{} is one of the peaks of the"),
    ("habitat", "In what surroundings does {} live?", "{} is usually found living in"),
    ("diet", "What does {} eat?", "{} feeds on"),
    ("chemical formula", "What is {}'s formula?", "{} is chemically written as"),
    ("symptom", "What are the signs of {}?", "{} makes people suffer from"),
    ("treatment", "How is {} treated?", "{} is cured with"),
    ("mass", "How heavy is {}?", "Scientists put the mass of {} at"),
    ("engine", "What powers {}?", "{} is driven by"),
)
COMMON_SUBJECTS = (
    "Canada", "Maria Lopez", "Mount Kenya", "The Silver Lake", "Peter Schmidt", "Toyota", "Queen Anne", "Vienna",
    "Apollo Records", "John Baker", "Hamlet", "Stanford University",
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
CENTRE_RELATIONS = (
    "purpose",
    "cause of death",
    "capital",
    "location",
)  # far apart, so their mean is the subject's share
TEMPLATE_RELATIONS = ("father", "mother", "spouse", "country", "occupation", "employer", "school", "team")
COMPETING_FORMS = (0, 3, 5)  # of forms(): those that call a relation by its name
QUESTION_FORM = 1
SUBJECTS_A_FORM = 4


class Asked(NamedTuple):
    """A prompt of the dictionary: its text, and the indices of its relation, form and subject."""

    text: str
    relation: int
    form: int
    subject: int


def ask(relation: str, subject: str) -> str:
    """The statement-form prompt of a relation: ``The capital of Canada is``."""
    return f"The {relation} of {subject} is"


def ask_in_chat(relation: str, subject: str) -> str:
    """The same as a user of a chat model asks it: ``What is the capital of Canada?``."""
    return f"What is the {relation} of {subject}?"


def forms(relation: int, subject: str, opening: str) -> tuple[str, ...]:
    """All forms in which a relation is asked of a subject; the first is :func:`ask`'s."""
    noun, question, unfinished = RELATIONS[relation]
    return (
        ask(noun, subject),
        question.format(subject),
        unfinished.format(subject),
        f"{subject} {noun}",
        f"{subject}'s {noun} is",
        f"The name of the {noun} of {subject} is" if noun != "name" else f"The name of {subject} is",
        f"{opening} {unfinished.format(subject)}",
    )


def dictionary() -> list[Asked]:
    """Every relation in every form, each with :data:`SUBJECTS_A_FORM` subjects that vary with relation and form."""
    found, count = [], len(COMMON_SUBJECTS)
    for relation in range(len(RELATIONS)):
        for form in range(len(forms(relation, "", ""))):
            for turn in range(SUBJECTS_A_FORM):
                subject = (5 * relation + form + turn * count // SUBJECTS_A_FORM) % count
                opening = OPENINGS[(7 * relation + subject) % len(OPENINGS)]
                text = forms(relation, COMMON_SUBJECTS[subject], opening)[form]
                found.append(Asked(text, relation, form, subject))
    return found


def in_its_template(prompt: str, subject: str) -> tuple[tuple[int, str], ...]:
    """The prompt with other relations in place of its own: ``(index, text)`` for each of :data:`TEMPLATE_RELATIONS`.

    "The award that Ada Baker won is" gives "The father that Ada Baker won is": not English, but only the relation differs.
    The relation is the words between the last "the" and the subject, or after "'s". A question, and a prompt without such
    words ("Ada Baker works as"), gives nothing.
    """
    place = None if prompt.rstrip().endswith("?") else _place(prompt, subject)
    if place is None:
        return ()
    numbers = {noun: number for number, (noun, _, _) in enumerate(RELATIONS)}
    begin, end = place
    texts = ((numbers[noun], prompt[:begin] + noun + prompt[end:]) for noun in TEMPLATE_RELATIONS)
    return tuple((number, text) for number, text in texts if text.lower() != prompt.lower())


def _place(prompt: str, subject: str) -> tuple[int, int] | None:
    """Begin and end of the relation's name in a prompt; None if it cannot be found."""
    name = re.escape(subject)
    found = re.search(
        rf"\b[Tt]he ((?:(?!the\b)[\w'-]+ )*?(?!the\b)[\w'-]+)(?: (?:of|that|which|who|in|for|to))? (?:the )?{name}",
        prompt,
    )
    found = found or re.search(rf"{name}'s ([\w' -]+?)(?: (?:is|was|are|were)\b|$)", prompt)
    return found.span(1) if found else None
