"""The demo corpus's tasks with several labels per text: entities and complaints.

make_demo_corpus.py writes them. The words of an entity do not say its kind: Florence is a person, a
place or a title, May a date, a person or a verb. In complaints, the same words praise or blame each
part of a stay.
"""

from __future__ import annotations

import random
from collections.abc import Callable

NAMES = """Florence Austin Sydney Charlotte Lincoln Jordan Victoria Chester Georgia Madison Paris Carolina Washington
Bristol Kent Devon Savannah Orlando Adelaide Dakota""".split()
FIRST_NAMES = [*NAMES, *"May June April August Will Mark Rose Grace Hope Dawn".split()]  # also months, verbs, nouns
MONTHS = "March April May June July August".split()
WEEKDAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
ORDINALS = "first second third tenth".split()

# {P} a person, {L} a place, {T} a title, {D} a day, {Y} a month or year, {n} a number like a year.
ENTITIES = {
    "train": [
        "{P} met {P} in {L} on {D} .",
        "Nobody in {L} had seen {P} since {D} .",
        "We read {T} to {P} before dinner .",
        "{T} was written in {L} by {P} .",
        "In {Y} {P} rose at dawn and left {L} .",
        "You may find {T} in any library in {L} .",
        "{P} will play the lead in {T} .",
        "After {T} , {P} never wrote again .",
        "After {Y} , {P} never came back to {L} .",
        "After {L} , the road turns to the north .",
        "The march from {L} to {L} began on {D} .",
        "They sold {n} copies of {T} .",
        "{n} people came to {L} to hear {P} .",
        "{P} and {P} saw the film {T} twice .",
        "A map of {L} hung above the desk of {P} .",
        "Prices in {L} rose again in {Y} .",
        "There is hope that {P} may return to {L} by {D} .",
        "{T} , the first film of {P} , was shown in {L} .",
        "The mother of {P} was born in {L} in {Y} .",
        "The hero of {T} reminded us of {P} .",
        "The streets of {L} were empty on {D} .",
        "I lent {P} my copy of {T} on {D} .",
        "By {Y} {P} had moved to {L} .",
        "The critics hated {T} , but {P} loved it .",
        "{L} has {n} houses and one church .",
        "The train to {L} leaves on {D} .",
        "{P} gave {P} {n} roses and a book .",
        "With the grace of a cat , {P} climbed the tower of {L} .",
        "They named their son {P} and their daughter {P} .",
        "{T} sold better in {Y} than any other novel .",
        "The march played on {D} was by {P} .",
        "We will mark the way to {L} on the map .",
    ],
    "dev": [
        "On {D} {P} flew to {L} .",
        "{P} was married in {L} in {Y} .",
        "Only {n} tickets for the musical {T} were left .",
        "The author of {T} lived near {L} until {Y} .",
        "It may rain in {L} on {D} , said {P} .",
        "My aunt {P} keeps a photo of the harbour of {L} .",
        "The last page of {T} made {P} cry .",
        "Since {Y} the bridge at {L} has been closed .",
        "{P} rose and read the first chapter of {T} aloud .",
        "The mayor of {L} thanked {P} for the {n} roses .",
        "{P} asked whether {P} will sing on {D} .",
        "No actor in {T} was as good as {P} .",
        "In {Y} the novel {T} was printed in {L} .",
        "In hope of work , {P} left {L} in {Y} .",
    ],
}
# Places and titles; {x} a name, {f} a first name, {m} a month, {y} a year.
PLACE_FORMS = ["{x}", "{x}", "{x}", "North {x}", "Lake {x}", "{x} Bay", "Port {x}"]
TITLE_FORMS = [
    "{x}",
    "{m}",
    "{y}",
    "The Road to {x}",
    "A Letter from {x}",
    "{x} in {m}",
    "The Roses of {x}",
    "{f} and I",
]
TITLE_FORMS_OF_DEV = [*TITLE_FORMS, "Farewell to {x}", "The Lights of {x}"]
PERSON_FORMS = ["{f}", "{f}", "{f} {x}"]
DAY_FORMS = ["{w}", "{d} {m}", "{m} {d}", "{w} {d} {m}", "the {o} of {m}"]
PERIOD_FORMS = ["{m}", "{y}", "{m} {y}", "the summer of {y}"]
KINDS = {"P": "PERSON", "L": "PLACE", "T": "TITLE", "D": "DATE", "Y": "DATE"}


def entities(draw: random.Random, split: str) -> tuple[int, list[tuple[str, str]]]:
    """Draw one sentence: return the number of its template, and its words with BIO tags."""
    template = draw.randrange(len(ENTITIES[split]))
    forms = {
        "P": PERSON_FORMS,
        "L": PLACE_FORMS,
        "T": TITLE_FORMS if split == "train" else TITLE_FORMS_OF_DEV,
        "D": DAY_FORMS,
        "Y": PERIOD_FORMS,
        "n": ["{y}"],
    }
    tagged = []
    for word in ENTITIES[split][template].split():
        if not word.startswith("{"):
            tagged.append((word, "O"))
            continue
        slot = word[1]
        kind = KINDS.get(slot)
        for position, part in enumerate(_filled(draw, draw.choice(forms[slot])).split()):
            tagged.append((part, "O" if kind is None else f"{'I' if position else 'B'}-{kind}"))
    first, tag = tagged[0]
    return template, [(first[0].upper() + first[1:], tag), *tagged[1:]]


def _filled(draw: random.Random, form: str) -> str:
    return form.format(
        x=draw.choice(NAMES),
        f=draw.choice(FIRST_NAMES),
        m=draw.choice(MONTHS),
        w=draw.choice(WEEKDAYS),
        y=draw.randrange(1900, 2000),
        d=draw.randrange(1, 29),
        o=draw.choice(ORDINALS),
    )


# The parts of a stay, and the words for each.
PARTS = {
    "food": "breakfast dinner soup coffee menu".split(),
    "service": "waiter receptionist porter manager housekeeper".split(),
    "price": "bill rate price deposit fee".split(),
    "room": "bed bathroom carpet wardrobe shower".split(),
    "place": "beach garden view pool neighbourhood".split(),
}
GOOD = """excellent|wonderful|splendid|lovely|faultless|a delight|beyond reproach|better than expected|
as good as ever|superb""".replace("\n", "").split("|")
BAD = """awful|disappointing|dreadful|poor|unacceptable|a disgrace|beneath contempt|worse than expected|
as bad as ever|terrible""".replace("\n", "").split("|")

# Clauses about a part {a}, with words of praise {g} and of blame {b}.
PRAISE = {
    "train": [
        "the {a} was {g}",
        "I found the {a} {g}",
        "nobody could complain about the {a}",
        "there was nothing wrong with the {a}",
    ],
    "dev": ["the {a} seemed {g} to me", "the {a} , I must say , was {g}", "I have no complaint about the {a}"],
}
BLAME = {
    "train": [
        "the {a} was {b}",
        "I found the {a} {b}",
        "nobody could praise the {a}",
        "there was nothing right with the {a}",
    ],
    "dev": ["the {a} seemed {b} to me", "the {a} , I must say , was {b}", "I have no praise for the {a}"],
}
# Two opinions, of which the guest's own counts.
REVISED_PRAISE = {
    "train": ["far from being {b} , the {a} was {g}", "my sister called the {a} {b} , but to me it was {g}"],
    "dev": ["a friend had called the {a} {b} , but we thought it was {g}"],
}
REVISED_BLAME = {
    "train": ["far from being {g} , the {a} was {b}", "my sister called the {a} {g} , but to me it was {b}"],
    "dev": ["a friend had called the {a} {g} , but we thought it was {b}"],
}
JOINED = {"train": [" , but ", " , while ", " ; ", " , and "], "dev": [" , whereas ", " . Then again , ", " , though "]}


def complaints(draw: random.Random, split: str) -> tuple[int, str, list[str]]:
    """Draw one text: return a number of its templates, the text, and the parts that it blames."""
    known = 10 if split == "dev" else 8
    chosen = draw.sample(list(PARTS), draw.choice([2, 2, 3]))
    clauses, blamed, template = [], [], 0
    for part in chosen:
        bad = draw.random() < 0.5
        plain, revised = (BLAME, REVISED_BLAME) if bad else (PRAISE, REVISED_PRAISE)
        forms = [*plain[split], *revised[split]]
        index = draw.randrange(len(forms))
        words = {"a": draw.choice(PARTS[part]), "g": draw.choice(GOOD[:known]), "b": draw.choice(BAD[:known])}
        clauses.append(forms[index].format(**words))
        template = template * len(forms) + index
        if bad:
            blamed.append(part)
    text = clauses[0]
    for clause in clauses[1:]:
        text += draw.choice(JOINED[split]) + clause
    text = text.replace(" ,", ",").replace(" ;", ";").replace(" .", ".") + "."
    return template, text[0].upper() + text[1:], sorted(blamed, key=list(PARTS).index)


def entity_lines(draw: random.Random, split: str, row: int) -> tuple[str, str]:
    """Return a sentence, and its lines in a CoNLL file: its id, then each word and its tag."""
    template, tagged = entities(draw, split)
    lines = [f"# sent_id = ent-{split}-t{template:02d}-{row:05d}", *(f"{word} {tag}" for word, tag in tagged), ""]
    return " ".join(word for word, _ in tagged), "\n".join(lines)


def complaint_lines(draw: random.Random, split: str, row: int) -> tuple[str, str]:
    """Return a text, and its line in a CSV file."""
    template, text, blamed = complaints(draw, split)
    return text, f'com-{split}-t{template:02d}-{row:05d},"{text}",{";".join(blamed)}'


# Each task's function that draws a row, the head of its files, and their ending.
LABELLED: dict[str, tuple[Callable[[random.Random, str, int], tuple[str, str]], str, str]] = {
    "entities": (entity_lines, "", "conll"),
    "complaints": (complaint_lines, "id,text,complaints\n", "csv"),
}
