"""Exact match and F1 of written answers, against SQuAD's formula written plainly."""

import random
import re
import string

import pytest

from ted_scale.evaluation.answers import judged

WORDS = [
    "the",
    "a",
    "an",
    "The",
    "cat",
    "Cat,",
    "mat",
    "mat.",
    "cats'",
    "(an)",
    "sat-on",
    "",
    " ",
    "\n",
    "theme",
    "3.5",
    "über",
]


def normal(text: str) -> str:
    """Lower case, punctuation away, articles away, white space once, in this order."""
    text = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def formula(found: str, accepted: str) -> tuple[float, float]:
    """2 · precision · recall / (precision + recall) over a bag of words."""
    one, other = normal(found).split(), normal(accepted).split()
    exact, left = float(one == other), list(other)
    if not one or not other:
        return exact, exact
    shared = [word for word in one if word in left and not left.remove(word)]
    if not shared:
        return exact, 0.0
    precision, recall = len(shared) / len(one), len(shared) / len(other)
    return exact, 2 * precision * recall / (precision + recall)


def test_scores_are_squad_s_and_the_best_of_all_accepted_answers():
    draw = random.Random(3)
    seen = set()
    for _ in range(2000):
        found, *accepted = (" ".join(draw.choices(WORDS, k=draw.randrange(5))) for _ in range(3))
        expected = [max(column) for column in zip(*(formula(found, answer) for answer in accepted), strict=True)]
        score = judged({"answers": accepted}, [found])
        assert [score["exact_match"], score["f1"]] == [expected[0], pytest.approx(expected[1], abs=1e-12)]
        seen.add((score["exact_match"], 0 < score["f1"] < 1))
    assert seen == {(0.0, False), (0.0, True), (1.0, False)}
