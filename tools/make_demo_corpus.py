"""Write the demo corpus, fastmtl/data/demo/<task>-<split>.*. Every run writes the same bytes.

Usage: python tools/make_demo_corpus.py [DIR]

There are five tasks on sentences written for this project, without third-party licences. Train and
dev share words, but no template and no sentence. A bag of words does not solve the tasks: they
depend on which of two opinions is the writer's (sentiment), who did what to whom (paraphrase),
which parts of two statements mean the same in other words (similarity), what a name is in its
sentence (entities), and which part of a stay an opinion is about (complaints). demo_labels.py has
the last two.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from pathlib import Path

from demo_labels import LABELLED

ROWS = {
    "sentiment": {"train": 2400, "dev": 400},
    "paraphrase": {"train": 2400, "dev": 400},
    "similarity": {"train": 1600, "dev": 400},
    "entities": {"train": 1000, "dev": 200},
    "complaints": {"train": 1600, "dev": 200},
}

# Opinions by class, worst to best. The last two of each class are for dev only.
OPINIONS = [
    ["awful", "dreadful", "terrible", "horrible", "atrocious", "disastrous", "appalling", "abysmal"],
    ["dull", "weak", "tedious", "bland", "clumsy", "disappointing", "tiresome", "feeble"],
    ["ordinary", "average", "passable", "middling", "acceptable", "adequate", "unremarkable", "fair"],
    ["good", "pleasant", "enjoyable", "charming", "solid", "likable", "nice", "appealing"],
    ["brilliant", "superb", "wonderful", "magnificent", "outstanding", "perfect", "marvelous", "stunning"],
]
THINGS = (
    "film novel play concert meal hotel show album comedy documentary recipe lecture game series musical tour".split()
)
SOURCES = ["critics", "reviewers", "friends", "neighbours", "colleagues", "the papers"]

# {t} the thing, {x} someone else's opinion, {y} the writer's opinion, {s} who was wrong.
SENTIMENT = {
    "train": [
        "I was told the {t} would be {x}, yet I found it {y}.",
        "The {t} was {y}, although {s} had called it {x}.",
        "{s} promised a {x} {t}; what I got was {y}.",
        "I expected something {x}, but the {t} turned out {y}.",
        "To me this {t} is {y}, whatever {s} say about it being {x}.",
        "It may look {x} at first, but in the end the {t} is {y}.",
        "Far from being {x}, the {t} was {y}.",
        "What a {y} {t}, and to think that I feared it would be {x}.",
        "The trailer made the {t} seem {x}; the real thing is {y}.",
        "{y} is my word for this {t}, not {x}.",
        "Instead of the {x} {t} I had hoped for, I sat through a {y} one.",
        "Last year's {t} was {x}; this one is {y}.",
        "The {t} was {y} from beginning to end.",
        "All in all, a {y} {t}.",
        "We thought the {t} was {y}.",
    ],
    "dev": [
        "My verdict on the {t} is {y}, even if {s} insist that it is {x}.",
        "{s} had warned us of a {x} {t}, but it proved {y}.",
        "I went in thinking the {t} would be {x} and came out thinking it was {y}.",
        "This {t} is {y} rather than {x}.",
        "Though it is often described as {x}, I consider the {t} {y}.",
        "The {t} is not {x} at all; it is {y}.",
        "Honestly, the {t} felt {y}.",
        "Some find the {t} {x}. I say it is {y}.",
    ],
}

# Pairs of words with the same meaning here.
PEOPLE = """man/gentleman woman/lady boy/lad child/kid doctor/physician lawyer/attorney teacher/instructor policeman/cop
singer/vocalist writer/author sailor/seaman soldier/trooper thief/burglar boss/manager drunk/alcoholic tourist/traveller
priest/clergyman pilot/aviator""".split()
DEEDS = """helped/assisted praised/complimented followed/trailed rescued/saved phoned/called hired/employed
insulted/offended tricked/fooled punished/penalized warned/alerted""".split()
ACTIONS = """bought/purchased repaired/fixed cleaned/washed carried/hauled found/discovered destroyed/wrecked
lost/misplaced built/constructed examined/inspected concealed/hid sold/auctioned""".split()
OBJECTS = """car/automobile bike/bicycle boat/ship sofa/couch bag/sack stone/rock gift/present picture/photo coat/jacket
lamp/light cup/mug rug/carpet box/crate letter/note""".split()
PLACES = [
    "in the forest/in the woods",
    "near the shop/near the store",
    "by the sea/by the ocean",
    "at the airport/at the airfield",
    "in the garden/in the yard",
    "on the hill/on the slope",
    "at the hospital/at the clinic",
    "behind the church/behind the chapel",
    "at the crossroads/at the junction",
    "in the cellar/in the basement",
]

# Templates for one meaning: {a} did {d} to {b} in place {p}.
CLAIMS = {
    "train": [
        "The {a} {d} the {b} {p}.",
        "The {b} was {d} by the {a} {p}.",
        "It was the {a} who {d} the {b} {p}.",
        "{P}, the {a} {d} the {b}.",
        "{P}, the {b} was {d} by the {a}.",
    ],
    "dev": [
        "Somebody saw how the {a} {d} the {b} {p}.",
        "The {b} said that {p} he was {d} by the {a}.",
        "It was {p} that the {a} {d} the {b}.",
        "It was {p} that the {b} was {d} by the {a}.",
    ],
}
STATEMENTS = {
    "train": [
        "The {a} {v} a {o} {p}.",
        "{P}, the {a} {v} a {o}.",
        "A {a} {v} the {o} {p}.",
        "There was a {a} who {v} a {o} {p}.",
    ],
    "dev": [
        "Yesterday a {a} {v} one {o} {p}.",
        "They say that {p} the {a} {v} a {o}.",
        "Some {a} {v} this {o} {p}.",
    ],
}


def sentiment(draw: random.Random, split: str) -> tuple[int, tuple[str, ...], str]:
    """Draw one row: return the number of its template, its text, and its label from 0 to 4."""
    template = draw.randrange(len(SENTIMENT[split]))
    label = draw.randrange(5)
    other = draw.choice([grade for grade in range(5) if grade != label])
    known = 8 if split == "dev" else 6
    words = {"t": draw.choice(THINGS), "s": draw.choice(SOURCES)}
    words |= {"x": draw.choice(OPINIONS[other][:known]), "y": draw.choice(OPINIONS[label][:known])}
    text = SENTIMENT[split][template].format(**words)
    return template, (_sentence(text),), str(label)


def paraphrase(draw: random.Random, split: str) -> tuple[int, tuple[str, ...], str]:
    """Draw one row: return the number of its templates, both texts, and label 1.0 or 0.0.

    Half of the pairs have the same meaning in other words (1.0). In the others, one or two parts
    differ, or subject and object are swapped.
    """
    first, second = draw.sample(range(len(CLAIMS[split])), 2)
    one, two = draw.sample(PEOPLE, 2)
    parts = {"a": one, "d": draw.choice(DEEDS), "b": two, "p": draw.choice(PLACES)}
    same = draw.random() < 0.5
    others = dict(parts)
    if not same and draw.random() < 0.1:
        others["a"], others["b"] = parts["b"], parts["a"]
    elif not same:
        for changed in draw.sample("abdp", draw.choice([1, 2])):
            pool = {"a": PEOPLE, "b": PEOPLE, "d": DEEDS, "p": PLACES}[changed]
            others[changed] = draw.choice([word for word in pool if word not in (*parts.values(), *others.values())])
    texts = (_say(draw, CLAIMS[split][first], parts, 0.0), _say(draw, CLAIMS[split][second], others, 1.0))
    return first * len(CLAIMS[split]) + second, texts, f"{int(same)}.0"


def similarity(draw: random.Random, split: str) -> tuple[int, tuple[str, ...], str]:
    """Draw one row: return the number of its templates, both texts, and their score.

    The score is 5 for the same statement in other words, less 1.25 for each of the statement's four
    parts that differs.
    """
    first, second = draw.randrange(len(STATEMENTS[split])), draw.randrange(len(STATEMENTS[split]))
    pools = {"a": PEOPLE, "v": ACTIONS, "o": OBJECTS, "p": PLACES}
    parts = {role: draw.choice(pool) for role, pool in pools.items()}
    differing = draw.sample(list(pools), draw.randrange(5))
    others = {
        role: draw.choice([word for word in pools[role] if word != parts[role]]) if role in differing else parts[role]
        for role in pools
    }
    texts = (_say(draw, STATEMENTS[split][first], parts, 0.0), _say(draw, STATEMENTS[split][second], others, 0.95))
    return first * len(STATEMENTS[split]) + second, texts, f"{5 - 1.25 * len(differing)}"


def _say(draw: random.Random, template: str, parts: dict[str, str], reworded: float) -> str:
    words = {role: pair.split("/")[draw.random() < reworded] for role, pair in parts.items()}
    return _sentence(template.format(**words, P=words["p"]))


def _sentence(text: str) -> str:
    for vowel in "aeiou":
        text = text.replace(f" a {vowel}", f" an {vowel}").replace(f"A {vowel}", f"An {vowel}")
    return text[0].upper() + text[1:]


TASKS: dict[str, tuple[Callable[..., tuple[int, tuple[str, ...], str]], str]] = {
    "sentiment": (sentiment, "sentence\tsentiment"),
    "paraphrase": (paraphrase, "sentence1\tsentence2\tis_duplicate"),
    "similarity": (similarity, "sentence1\tsentence2\tsimilarity"),
}


def make(directory: Path) -> None:
    """Write the train and the dev file of each task into `directory`."""
    directory.mkdir(parents=True, exist_ok=True)
    for task, (draw_row, header) in TASKS.items():
        seen: set[str] = set()
        for split, number in ROWS[task].items():
            draw = random.Random(f"{task}-{split}")
            lines = [f"\tid\t{header}"]
            while len(lines) <= number:
                template, texts, label = draw_row(draw, split)
                if any(text in seen for text in texts) and (split == "dev" or len(texts) == 1):
                    continue
                if split == "train" or len(texts) == 1:
                    seen.update(texts)
                row = len(lines) - 1
                lines.append("\t".join([str(row), f"{task[:3]}-{split}-t{template:02d}-{row:05d}", *texts, label]))
            (directory / f"{task}-{split}.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    for task, (draw_lines, header, ending) in LABELLED.items():
        seen = set()
        for split, number in ROWS[task].items():
            draw = random.Random(f"{task}-{split}")
            rows: list[str] = []
            while len(rows) < number:
                text, lines_of_row = draw_lines(draw, split, len(rows))
                if text not in seen:
                    seen.add(text)
                    rows.append(lines_of_row)
            (directory / f"{task}-{split}.{ending}").write_text(header + "\n".join(rows) + "\n", encoding="utf-8")


if __name__ == "__main__":
    make(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parents[1] / "fastmtl" / "data" / "demo")
