"""progress.json: what is written is read back, an earlier version's file is read, and anything else is refused by name."""

import dataclasses
import json

import pytest

from ted_scale.base.errors import UserError
from ted_scale.checkpoints.life import Spent
from ted_scale.checkpoints.progress import Health, Progress, parse_progress, progress_as_bytes

DOMAIN = {"tokens": 900, "content": "c", "share": 1000, "epoch": 1, "unit": 8, "token": 16, "seen": 912}
BLEND = {"start": 0, "seq_len": 8, "seed": 1, "domains": {"a": DOMAIN}}
FULL = Progress(
    step=4, tokens=256, samples=32, blend=BLEND, wandb_id="abc", identity={"seed": 0}, run={"name": "r"}, validation=2.5,
    adaptive={"step": 2, "weights": {"a": 1.0}, "teacher": {"a": 2.5}, "text": {"a": "text"}},
    health=Health(in_a_row=1, ground="g", losses=[1.5, 1.25]), forks=(2,), spent=Spent(at=9.0, steps=4.5),
    entropy_floor=0.1, scores={"val/ppl": 12.5},
)  # fmt: skip
FIRST_VERSION = ("step", "tokens", "samples", "blend", "adaptive", "wandb_id", "identity")


def test_what_is_written_is_read_back():
    assert parse_progress(progress_as_bytes(FULL).decode(), "p") == FULL
    assert parse_progress(progress_as_bytes(Progress()).decode(), "p") == Progress()


def test_the_file_of_the_first_version_is_read():
    written = json.loads(progress_as_bytes(FULL))
    earlier = {key: written[key] for key in FIRST_VERSION}
    later = {
        "skipped": 0,
        "health": None,
        "run": None,
        "validation": None,
        "forks": (),
        "spent": None,
        "entropy_floor": 0.0,
        "scores": {},
    }
    assert parse_progress(json.dumps(earlier), "p") == dataclasses.replace(FULL, **later)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"step": None}, "it has no step"),
        ({"tokens": -1}, "tokens: Input should be greater than or equal to 0"),
        ({"samples": 1.5}, "samples: Input should be a valid integer"),
        ({"wandb_id": "../x"}, "wandb_id: String should match pattern"),
        ({"validation": float("nan")}, "validation: Input should be a finite number"),
        ({"spent": {"steps": -1.0}}, "spent.steps: Input should be greater than or equal to 0"),
        ({"another": 1}, "another: Unexpected keyword argument"),
        ({"health": {"losses": ["x"]}}, "health.losses.0: Input should be a valid number"),
        ({"blend": {**BLEND, "start": 33}}, "blend.start must be at most samples (32)"),
        ({"blend": {**BLEND, "domains": {}}}, "blend.domains: Dictionary should have at least 1 item"),
        ({"blend": {**BLEND, "domains": {"a": {**DOMAIN, "share": 999}}}}, "blend.domains.share must add up to 1000"),
        ({"blend": {**BLEND, "seq_len": 900}}, "blend.domains.a.tokens must hold a window of 900"),
        ({"blend": {**BLEND, "domains": {"a": {**DOMAIN, "token": 999}}}}, "blend.domains.a.token must be within its"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_a_damaged_file_is_refused_by_the_key(change, said):
    values = {**json.loads(progress_as_bytes(FULL)), **change}
    values = {key: value for key, value in values.items() if key != "step" or value is not None}
    with pytest.raises(UserError, match="p must be a progress file, but is not: ") as caught:
        parse_progress(json.dumps(values), "p")
    assert said in str(caught.value)


@pytest.mark.parametrize("text", ["", "[]", "null", "{", "[" * 100_000], ids=["empty", "list", "null", "cut", "deep"])
def test_what_is_no_object_is_refused(text):
    with pytest.raises(UserError, match="p must be a progress file, but is not: "):
        parse_progress(text, "p")
