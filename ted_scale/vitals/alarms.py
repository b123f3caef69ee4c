"""What the vitals warn of: for each cause a sentence, with what it means and what to try. Pure functions of the last numbers.

Note: one sample of some hundred tokens is noisy. So a mean of RECENT samples is judged, and nothing before there are so many.
"""

import math
from collections.abc import Iterator, Mapping, Sequence

History = Mapping[str, Sequence[float]]  # by key, the last measured numbers, the newest last

KEPT = 20  # numbers of a key
RECENT = 3
# Of the teacher's directions, those of the student's filter: 0.3 to 1 in the hard first steps of SmolLM2-135M cut to ten blocks.
COLLAPSED = 0.2
# A filter of the teacher whose states differ in less than three directions gives the layer loss next to nothing to match.
LEAST_RANK = 3.0
# A mean of three samples of 256 tokens moves by some percent from sample to sample; a quarter is no chance.
GROWN = 1.25
# A student cut from its teacher begins with errors near 0 in its first blocks, which must grow while it learns. A half leaves a
# quarter of the square of t unexplained.
LARGE = 0.5
# Text has some tokens that are sure, up to a third of code. More than half of them is no text, or logits that are too large.
SATURATED = 0.5
# Of ln V, what a teacher that knows nothing has. A teacher that knows its text is below a half of it.
UNKNOWN = 0.75
# Of ln V: so much an untrained model has. Who knows no more than how often each token comes is well below it.
CHANCE = 0.95
# Gradients without a relation have a cosine of about 0.01 over so many entries; -0.1 is a direction.
AGAINST = -0.1
# Of the rest's norm, below which it does not matter where the layer loss pulls.
FELT = 0.1


def alarms(history: History, uniform: float) -> dict[str, str]:
    """Sentences by their cause. `uniform` is ln V of the teacher."""
    pairs = sorted({int(key.rpartition("/")[2]) for key in history if key.startswith("vitals/error/")})
    found = dict(of_output(history, uniform))
    for pair in pairs:
        found |= dict(of_pair(history, pair))
    return found


def of_pair(history: History, k: int) -> Iterator[tuple[str, str]]:
    student, teacher = (recent(history, f"vitals/rank_filter_{side}/{k}") for side in "st")
    if teacher < LEAST_RANK:
        yield (
            f"the teacher's filter {k}",
            f"the filter of the teacher has collapsed in pair {k}: its states differ in {teacher:.2g} directions. The layer loss "
            "has next to nothing to match there; take filters.start = 'states', or fewer filters.steps, or leave the pair out "
            "(pairs.explicit)",
        )
    elif student < COLLAPSED * teacher:
        yield (
            f"the student's filter {k}",
            f"the filter of the student has collapsed in pair {k}: its states differ in {student:.3g} directions, the teacher's in "
            f"{teacher:.3g}. What it drops, the student does not learn; lower filters.lr, or take filters.start = 'states'",
        )
    errors = history.get(f"vitals/error/{k}", ())
    before = [mean(errors[i : i + RECENT]) for i in range(len(errors) - 2 * RECENT + 1)]
    now = recent(history, f"vitals/error/{k}")
    if before and now > max(GROWN * min(before), before[-1], LARGE):  # it was lower, and it still grows
        yield (
            f"error {k}",
            f"the error of pair {k} grows: {now:.3g} after {min(before):.3g}. The student's state moves away from the "
            "teacher's there. That is right only if loss.layer falls or has ended. Otherwise raise loss.layer, or lower train.lr "
            "or filters.lr",
        )
    cosine, norms = (recent(history, f"vitals/{name}/{k}") for name in ("pull_cosine", "pull"))
    if cosine < AGAINST and norms > FELT:
        yield (
            f"pull {k}",
            f"the layer loss of pair {k} pulls against the other terms: the cosine of their gradients is {cosine:.2f}, its norm "
            f"{norms:.2g} times theirs. It costs next-token loss; lower loss.layer, let it end early (loss.layer.off_after), or "
            "leave the pair out (pairs.explicit)",
        )


def of_output(history: History, uniform: float) -> Iterator[tuple[str, str]]:
    ways = {
        "teacher": "Its KL says there no more than the label does; raise loss.temperature, or set loss.skip_low_entropy",
        "student": "It hardly learns from such tokens; lower train.lr, and look whether the text repeats itself",
    }
    for side, way in ways.items():
        if (share := recent(history, f"vitals/saturated_{side[0]}")) > SATURATED:
            what = f"the {side}'s logits are saturated: {share:.0%} of tokens have one sure next token"
            yield f"logits of the {side}", f"{what}. {way}"
    teacher, student = (recent(history, f"vitals/{side}_ce") for side in ("teacher", "student"))
    if found := of_teacher(teacher, student, uniform):
        yield found


def of_teacher(teacher: float, student: float, uniform: float) -> tuple[str, str] | None:
    """(cause, sentence) where these losses say that there is little to learn from the teacher."""
    if teacher > CHANCE * uniform:
        return (
            "a teacher at chance",
            f"the teacher knows nothing of this text: its cross-entropy is {teacher:.3g}, a guess among all tokens has "
            f"{uniform:.3g}. Its weights are untrained, or the corpus is tokenized for another model (ted-scale inspect); its KL "
            "and its states teach noise. Look at teacher.path and at the corpus, or take method = 'ce'",
        )
    if teacher > min(student, UNKNOWN * uniform):
        return (
            "the teacher's text",
            f"the teacher does not know this text: its cross-entropy is {teacher:.3g}, the student's {student:.3g}. It was trained "
            "on other text, or the corpus is tokenized for another model (ted-scale inspect); lower loss.kl, change the text, or "
            "train the teacher on it first",
        )
    return None


def recent(history: History, key: str) -> float:
    """The mean of the last numbers; NaN, which no comparison is true for, where there are too few."""
    values = history.get(key, ())
    return mean(values[-RECENT:]) if len(values) >= RECENT else math.nan


def mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)
