"""A schedule of faults in the real trainer: two ranks on a file system that fails, some with copies in a store that fails, too.

The supervisor's own rules restart the run; only its launcher is left out. When it gives up, or the user must correct
something, the faults end and the same command is started once more. `Schedule.run` returns the first property that did not
hold: after each life every checkpoint that was published and is to be kept is there and whole; a life resumes from the newest
one; it ends done or with a sentence; and the run ends with the weights of an undisturbed one.
"""

import argparse
import importlib.util
import random
import re
import shutil
import threading
from pathlib import Path

import drawn_faults
import store_contents
from faulty_files import Faults, Rule
from launching import ended, start_ranks
from lives import End, wrong_end
from places import ROOT
from tiny import make_run, write_run

from ted_scale.base.errors import MISTAKE
from ted_scale.checkpoints import folder as files

CHECKPOINTS = ("/*", "/checkpoints/*", "/checkpoints/step_*", "/*.part*", "/*/manifest.json", "/*/rank_0000?.safetensors",
               "/*/progress.json", "/*filters.safetensors", "/metrics.jsonl", "/log.txt")  # fmt: skip
CORPORA = ("*", "*.idx", "*.bin")
DELAYS_S = (0.5, 3, 15)
TIMES = (1, 1, 1, 2, 3, 8)  # a fault for ever is one of a test without engines
SHORT_SILENCE = {"limits": {"silence_s": 8.0}}
POLICY = argparse.Namespace(attempts=5, pause_s=0.1, longest_pause_s=1.0, patience_s=60, lost_hosts="wait")
LIFE_S = 300
ALONE_S = 30  # for ranks that another one has left, before they watched each other: then a launcher kills them


def load_supervise():
    spec = importlib.util.spec_from_file_location("supervise", ROOT / "ted_scale/commands/supervise.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def drawn(rng: random.Random, run, corpus: Path, delays: tuple[float, ...]) -> list[Rule]:
    """Of the run's folder and of its corpus. Some strike nothing, because the run makes fewer such calls."""
    rules = []
    for _ in range(rng.randint(3, 7)):
        of_run = rng.random() < 0.75
        calls = drawn_faults.WRITES if of_run else drawn_faults.READS
        paths = [f"{run.folder}{path}" for path in CHECKPOINTS] if of_run else [f"{corpus}{path}" for path in CORPORA]
        rule = drawn_faults.one(rng, calls, paths, ranks=2, further=15, delay_s=rng.choice(delays))
        times = 1 if rule.action in ("kill", "delay") else rng.choice(TIMES)
        rules.append(rule._replace(times=times, value=20 if rule.action == "stale" else rule.value))
    return rules


class Schedule:
    """One run, from its first start to its end. `root` has the models and the corpus, `store` is the faulty one, if any."""

    def __init__(self, root: Path, seed: int, settings: dict, store=None, delays=DELAYS_S):
        rng, name = random.Random(seed), f"schedule_{seed}"
        copies = {"checkpoint": {**settings["checkpoint"], "copy_to": store_contents.PLACE}} if store else {}
        self.run = make_run(root, name=name, **{**settings, **SHORT_SILENCE, **copies})
        self.config, self.said = write_run(root / f"{name}.toml", self.run), root / f"{name}.said"
        self.faults, self.store = Faults(root / f"{name}.faults"), store
        self.faults.arm(drawn(rng, self.run, root / "corpus", delays))
        if store:
            store.arm(drawn_faults.drawn_of_store(rng))
        self.ever, self.wrong, self.lives = {}, None, []

    # Lives

    def to_its_end(self) -> None:
        """Under faults as long as the supervisor goes on, then without."""
        supervise = load_supervise()
        supervise.run_once = lambda *_: self.life()
        code = supervise.supervise(self.run, [], POLICY)
        for _ in range(2):
            if code == 0 or self.wrong:
                return
            self.end_faults()
            code = supervise.supervise(self.run, [], POLICY)
        self.wrong = self.wrong or f"without faults the run ended with code {code}: {self.last_words()}"

    def end_faults(self) -> None:
        self.faults.arm([])
        if self.store:
            self.faults.add_to_log(self.store.arm([]))

    def life(self) -> int:
        """Its exit code; 2, with which no supervisor goes on, if something was wrong."""
        before, resumed, struck = self.newest(), len(self.resumed_from()), len(self.faults.log())
        over = threading.Event()
        witness = threading.Thread(target=self.see_what_is_published, args=(over,))
        witness.start()
        with self.said.open("w") as said:
            words = ROOT / "launch" / "pretrain.py", "--config", self.config
            codes = ended(start_ranks(2, said, *words, environment=self.faults.environment()), LIFE_S, ALONE_S)
        over.set()
        witness.join()
        code = max(codes) if max(codes) > 0 else 137 if min(codes) < 0 else 0
        struck = self.faults.log()[struck:]
        self.lives.append(code)
        self.wrong = self.wrong_words(codes, struck) or self.wrong_checkpoints(
            before, self.resumed_from()[resumed:], struck
        )
        return 2 if self.wrong else code

    def see_what_is_published(self, over: threading.Event) -> None:
        while not over.wait(0.1):
            self.ever |= self.there()

    # What must hold after each

    def there(self) -> dict[str, dict]:
        return {c.path.name: c.manifest for c in files.published(self.run.folder) if c.fault is None}

    def newest(self) -> str:
        copies = store_contents.whole_copies(self.run.name) if self.store else {}
        return max(self.there() | copies, key=files.key_of, default="")

    def resumed_from(self) -> list[str]:
        path = self.run.folder / "log.txt"
        return re.findall(r"resuming from \S*(step_\w+)", path.read_text()) if path.exists() else []

    def last_words(self) -> str:
        return (self.said.read_text().strip().splitlines() or [""])[-1]

    def wrong_words(self, codes: list[int], struck: list[str]) -> str | None:
        text = self.said.read_text()
        if "Traceback" in text:
            return f"a traceback: {text[text.index('Traceback') :][-1500:]}"
        if max(codes) > 0 and not re.search(r"^(rank \d+: )?(error|stopped): ", self.last_words()):
            return f"codes {codes} without a sentence: {text[-500:]}"
        kind = "mistake" if max(codes) == MISTAKE else "sentence"
        if wrong := wrong_end([End(kind, self.last_words())], struck):
            return wrong
        if max(codes) <= 0 > min(codes) and not any(" kill " in line for line in self.faults.log()):
            return f"codes {codes}, and nothing was killed: {text[-500:]}"
        return None

    def wrong_checkpoints(self, before: str, resumed: list[str], struck: list[str]) -> str | None:
        old_listing, there = any(" stale " in line for line in struck), self.there()
        self.ever |= there
        if gone_back := [name for name in self.ever if files.key_of(name)[0]]:
            return f"{gone_back[0]} begins a new line, but nothing was damaged"
        if resumed and resumed[0] != before and not old_listing:
            return f"it resumed from {resumed[0]}, but {before} is the newest"
        for name in files.kept(self.ever, self.run.checkpoint):
            fault = files.check_digests(files.checkpoints_of(self.run.folder) / name)
            if name not in there or fault:
                return f"{name} was published and is lost: {fault}"
        return None

    def lose_folder_and_resume(self) -> None:
        """What a run without faults has copied is enough to go on from."""
        shutil.rmtree(self.run.folder)
        self.ever = {}
        self.to_its_end()
