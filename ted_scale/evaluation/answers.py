"""Exact match and F1 of an answer that a model wrote, as SQuAD defines them; the best over all accepted answers.

Note: a task's YAML names `judged`, so lm-eval's own command line gives the same numbers where this package is installed.
"""

import re
import string
from collections import Counter

PUNCTUATION = str.maketrans("", "", string.punctuation)
ARTICLES = re.compile(r"\b(a|an|the)\b")


def judged(doc: dict, results: list[str]) -> dict[str, float]:
    """What lm-eval asks of one example."""
    return {"exact_match": best(exact_match, results[0], doc["answers"]), "f1": best(f1, results[0], doc["answers"])}


def best(score, found: str, accepted: list[str]) -> float:
    words = words_of(found)
    return max(score(words, words_of(answer)) for answer in accepted)


def words_of(text: str) -> list[str]:
    """In lower case, without punctuation and articles."""
    return ARTICLES.sub(" ", text.lower().translate(PUNCTUATION)).split()


def exact_match(found: list[str], accepted: list[str]) -> float:
    return float(found == accepted)


def f1(found: list[str], accepted: list[str]) -> float:
    """Of words, each as often as it is in both. Where one has no words, both must have none."""
    if not found or not accepted:
        return float(found == accepted)
    common = sum((Counter(found) & Counter(accepted)).values())
    return 2 * common / (len(found) + len(accepted))
