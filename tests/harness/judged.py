"""What an evaluation reads: tiny models with a tokenizer and a corpus of it, and local files of lm-eval's tasks."""

import json
from pathlib import Path

from tiny import make_model

from ted_scale.commands import task, tokenize_corpus, train_tokenizer

VOCABULARY = 380
TEXTS = [
    f"Document {n} says: {'the cat sat on the mat, ' * (n % 5)}näive façade 🙂 costs {n * 37} €.\n  Indented."
    for n in range(60)
]


def make_judged(root: Path) -> Path:
    """A tokenizer, two models with it, `one` and `two`, and the corpus `cats`."""
    (root / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    train_tokenizer.main(["--vocab-size", str(VOCABULARY), "--out", str(root / "tok"), str(root / "texts.jsonl")])
    tokenize_corpus.main(["--tokenizer", str(root / "tok"), "--out", str(root / "cats"), str(root / "texts.jsonl")])
    for seed, name in enumerate(("one", "two")):
        make_model(root / name, "llama", vocab_size=VOCABULARY, num_hidden_layers=2, seed=seed)
        for file in (root / "tok").iterdir():
            (root / name / file.name).write_bytes(file.read_bytes())
    return root


def make_tasks(folder: Path) -> Path:
    """The data of suite small, in numbers that no batch and no number of ranks divides."""
    folder.mkdir()
    words = [f"{text.split(':')[0]} {'and the cat sat ' * (n % 3)}on the mat" for n, text in enumerate(TEXTS)]
    label = {"text": ["the cat", "the mat and the cat", "façade"], "label": ["A", "B", "C"]}
    rows = {
        "lambada_openai": [{"text": words[n]} for n in range(29)],
        "arc_easy": [{"question": words[n], "choices": label, "answerKey": "ABC"[n % 3]} for n in range(23)],
        "piqa": [{"goal": words[n], "sol1": "sit", "sol2": "cost 37 €", "label": n % 2} for n in range(17)],
    }
    for name, lines in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def make_written(folder: Path) -> None:
    """The task squad_held_out below `folder`: 11 questions of many lengths, each with many answers, so that a model hits some."""
    answers = {"text": [*"abcdefghijklmnopqrstuvwxyz0123456789€", "cat", "cat sat on"]}
    rows = [{"context": text[: 8 + n], "question": "What?", "answers": answers} for n, text in enumerate(TEXTS[:11])]
    file = folder / "squad.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (to_train := folder / "squad_train.jsonl").write_text(json.dumps({**rows[0], "question": "Which?"}) + "\n")
    task.main(["squad", "--data", str(to_train), "--held-out", str(file), "--out", str(folder / "squad")])
