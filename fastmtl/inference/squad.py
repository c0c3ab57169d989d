"""Exact match and F1 of answers by SQuAD's rules (its program evaluate-v2.0.py).

Answers are compared without case, punctuation, the articles a, an and the, and superfluous spaces.
F1 is that of the words, as a multiset. An answer is compared with all right answers, and the best
result counts. The right answer of a question without an answer is "". A right answer of which
nothing is left, such as "the", does not count if there are others.
Source: Rajpurkar et al. 2016 and 2018.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def words(answer: str) -> list[str]:
    """Return the words of an answer that are compared."""
    return _ARTICLES.sub(" ", answer.lower().translate(_NO_PUNCTUATION)).split()


def compare(answer: str, right: Sequence[str]) -> tuple[float, float]:
    """Return exact match, 0 or 1, and F1 of an answer. right: all right answers; []: no answer."""
    found = words(answer)
    golds = [gold for gold in map(words, right) if gold] or [[]]
    return max(float(found == gold) for gold in golds), max(_f1(found, gold) for gold in golds)


def _f1(found: list[str], gold: list[str]) -> float:
    if not found or not gold:
        return float(found == gold)
    same = (Counter(found) & Counter(gold)).total()
    return 2 * same / (len(found) + len(gold))
