"""Known tasks: how a row of their data becomes a prompt, and answers that a model chooses from or may write.

A prompt is one template of plain text. Note: each answer begins with a space, as words inside a text do, so that prompt and answer
are the same tokens in training and for a judge.
"""

from collections.abc import Callable
from string import Formatter
from typing import NamedTuple

from ted_scale.base.errors import shown

NO_ANSWER = "unanswerable"  # of SQuAD 2.0, where the context does not say it


class Item(NamedTuple):
    prompt: str
    answers: list[str]  # the choices, or what is accepted where the model writes
    right: int | None  # of the choices; None where the model writes
    texts: list[str]  # what it asks about

    @property
    def completion(self) -> str:
        return self.answers[self.right or 0]


class Task(NamedTuple):
    template: str  # of columns of text
    columns: tuple[str, ...]  # those of the answer
    answers: Callable[[dict], tuple[list, int | None]]  # of a row, with the number of the right one

    @property
    def asks(self) -> list[str]:
        return [name for _, name, _, _ in Formatter().parse(self.template) if name]


def item_of(task: Task, row: dict) -> Item:
    """A ValueError has the rest of a sentence."""
    if missing := next((name for name in (*task.asks, *task.columns) if name not in row), None):
        raise ValueError(f"must have the column {missing}, but has {', '.join(row)}")
    asked = {name: text_of(name, row[name]) for name in task.asks}
    if not any(asked.values()):
        raise ValueError(f"must have a text in {' or '.join(asked)}, but has none")
    answers, right = task.answers(row)
    answers = [" " + text_of("answer", answer) for answer in answers]
    if empty := [answer for answer in answers if answer == " "]:
        raise ValueError(f"must have a text in each answer, but {len(empty)} of {len(answers)} are empty")
    return Item(task.template.format(**asked).strip(), answers, right, [text for text in asked.values() if text])


def text_of(name: str, value) -> str:
    if not isinstance(value, str):
        raise ValueError(f"must have text in {name}, but has {shown(value)}")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError(f"must have text in {name}, but spells half of a surrogate pair") from None
    return value.strip()


def number_of(name: str, value, count: int) -> int:
    if type(value) is int and 0 <= value < count:
        return value
    raise ValueError(f"must have a {name} of 0 to {count - 1}, but has {shown(value)}{secret(value)}")


def secret(value) -> str:
    """The way out where a test split keeps its answers for itself."""
    return ", as a test split whose answers are secret; name the train or validation split" if value in (-1, "") else ""


def named(*names: str, column: str = "label") -> dict:
    """Of a task whose label is the number of a name."""
    return {"columns": (column,), "answers": lambda row: (names, number_of(column, row[column], len(names)))}


def yes_or_no(row: dict) -> tuple[list, int]:
    if not isinstance(row["answer"], bool):
        raise ValueError(f"must have true or false in answer, but has {shown(row['answer'])}{secret(row['answer'])}")
    return ["no", "yes"], int(row["answer"])


def one_of_two(row: dict) -> tuple[list, int]:
    return [row["sol1"], row["sol2"]], number_of("label", row["label"], 2)


def right_one_last(row: dict) -> tuple[list, int]:
    """In the order of lm-eval's task."""
    return [row[name] for name in SCIQ], 3


def lettered(row: dict) -> tuple[list, int]:
    texts, letters = lists_of(row, "choices", "text", "label")
    if row["answerKey"] not in letters:
        found = row["answerKey"]
        raise ValueError(f"must have a letter of choices in answerKey, but has {shown(found)}{secret(found)}")
    return texts, letters.index(row["answerKey"])


def written(row: dict) -> tuple[list, None]:
    (texts,) = lists_of(row, "answers", "text")
    return list(dict.fromkeys(texts)) or [NO_ANSWER], None


def lists_of(row: dict, column: str, *keys: str) -> list[list]:
    """The lists under `keys` of a struct. They must be equally long."""
    value = row[column]
    found = [value.get(key) for key in keys] if isinstance(value, dict) else [None]
    if not all(isinstance(each, list) and len(each) == len(found[0]) for each in found):
        raise ValueError(f"must have lists of {' and '.join(keys)} in {column}, but has {shown(value)}")
    return found


SCIQ = ("distractor1", "distractor2", "distractor3", "correct_answer")
PAIR = "Sentence 1: {sentence1}\nSentence 2: {sentence2}\n"
PREMISE = "Premise: {sentence1}\nHypothesis: {sentence2}\nEntailment:"

TASKS = {
    "boolq": Task("{passage}\nQuestion: {question}?\nAnswer:", ("answer",), yes_or_no),
    "commonsense_qa": Task("Question: {question}\nAnswer:", ("choices", "answerKey"), lettered),
    "piqa": Task("Question: {goal}\nAnswer:", ("sol1", "sol2", "label"), one_of_two),
    "sciq": Task("{support}\nQuestion: {question}\nAnswer:", SCIQ, right_one_last),
    "squad": Task("{context}\nQuestion: {question}\nAnswer:", ("answers",), written),
    "cola": Task("Sentence: {sentence}\nAcceptable:", **named("no", "yes")),
    "sst2": Task("Review: {sentence}\nSentiment:", **named("negative", "positive")),
    "mrpc": Task(PAIR + "Paraphrase:", **named("no", "yes")),
    "qqp": Task("Question 1: {question1}\nQuestion 2: {question2}\nSame meaning:", **named("no", "yes")),
    "qnli": Task("Question: {question}\nSentence: {sentence}\nAnswered:", **named("yes", "no")),
    "mnli": Task(
        "Premise: {premise}\nHypothesis: {hypothesis}\nRelation:", **named("entailment", "neutral", "contradiction")
    ),
    "rte": Task(PREMISE, **named("yes", "no")),
    "wnli": Task(PREMISE, **named("no", "yes")),
}
