"""Which faults a seed means: what file servers, full disks and killers do, on some paths of a run, now or a little later."""

import errno
import random

import faulty_store
from faulty_files import FOR_EVER, Rule

FAILURES = {  # call: (action, name of the errno or a number)
    "open": [("fail", "ESTALE"), ("fail", "EIO"), ("fail", "ETIMEDOUT")],
    "read": [("fail", "ESTALE"), ("fail", "EIO"), ("short", 0), ("short", 0)],
    "write": [("fail", "ENOSPC"), ("fail", "EDQUOT"), ("fail", "EIO"), ("fail", "ESTALE"), ("short", 0)],
    "fsync": [("fail", "EIO"), ("fail", "EDQUOT"), ("lost", "EIO")],
    "close": [("fail", "EIO"), ("fail", "EDQUOT")],
    "rename": [("fail", "ESTALE"), ("fail", "EIO"), ("twice", "ENOENT"), ("twice", "ESTALE")],
    "unlink": [("fail", "EIO"), ("fail", "ESTALE"), ("twice", "ENOENT")],
    "mkdir": [("fail", "ENOSPC"), ("fail", "EIO"), ("twice", "EEXIST")],
    "link": [("fail", "EIO"), ("fail", "ENOSPC"), ("twice", "EEXIST")],
    "stat": [("fail", "ESTALE"), ("fail", "EIO"), ("fail", "ETIMEDOUT")],
    "list": [("fail", "ESTALE"), ("fail", "EIO"), ("stale", 60)],
}
READS = ("open", "read", "stat", "list")
WRITES = tuple(FAILURES)
TIMES = (1, 1, 1, 1, 2, 3, 8, FOR_EVER)


def drawn(rng: random.Random, calls, paths, *, ranks: int = 1, further: int = 12, delay_s: float = 0.02) -> list[Rule]:
    """Some rules. The first call that one strikes is 5 * `further` at most."""
    return [one(rng, calls, paths, ranks, further, delay_s) for _ in range(rng.randint(1, 5))]


def one(rng: random.Random, calls, paths, ranks: int, further: int, delay_s: float) -> Rule:
    call = rng.choice(calls)
    action, value = rng.choice([*FAILURES[call], ("delay", delay_s), ("kill", 0)])
    first, times = rng.choice((0, rng.randrange(further), rng.randrange(5 * further))), rng.choice(TIMES)
    if action == "delay":
        times = min(times, 3)
    if action == "kill":
        times = 1
    number = getattr(errno, value) if isinstance(value, str) else value
    return Rule(call, rng.choice(paths), action, number, first, times, rng.choice((-1, *range(ranks))))


REQUESTS = ("PUT *", "PUT *rank_*", "PUT *manifest*", "GET *list-type=2*", "GET *manifest*", "GET *rank_*", "DELETE *", "POST *",
            "*partNumber=2*", "*")  # fmt: skip


def drawn_of_store(rng: random.Random, further: int = 10, seconds: float = 0.05) -> list[faulty_store.Rule]:
    """Credentials are back before the shortened patience of a start ends: without them, a run rightly ends with a mistake."""
    rules = []
    for times in rng.choices(TIMES[:-1], k=rng.randint(1, 3)):
        kind = rng.choice(faulty_store.KINDS)
        times = min(times, 2) if kind == "expire" else times
        rules.append(faulty_store.Rule(rng.choice(REQUESTS), kind, rng.randrange(further), times, seconds))
    return rules
