"""How long the trainer takes from the command to its first step, beside the same launcher running only its imports.

Each round starts both, one after the other, so that other work on the machine affects both. The medians and their difference
are printed. A round of the trainer uses a run folder of its own, which is removed.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

LAUNCH = Path(__file__).resolve().parents[2] / "launch" / "pretrain.py"
ONLY_IMPORTS = """
import deepspeed, torch, transformers
from ted_scale import run
print("imported", flush=True)
"""


def command(ranks: int, script: Path, *arguments: str) -> list[str]:
    return [str(Path(sys.executable).with_name("deepspeed")), "--num_gpus", str(ranks), str(script), *arguments]


def seconds_until(reached, arguments: list[str]) -> float:
    """Seconds from the start of the command until `reached()`; then waits for the command to finish."""
    start = time.monotonic()
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    output = []
    while not reached() and process.poll() is None:
        time.sleep(0.02)
    elapsed = time.monotonic() - start
    output = process.communicate()[0]
    if process.returncode:
        raise SystemExit(f"{' '.join(arguments)} failed:\n{output[-2000:]}")
    return elapsed


def imports_seconds(folder: Path, ranks: int) -> float:
    script = folder / "only_imports.py"
    script.write_text(f"{ONLY_IMPORTS}\nimport pathlib\npathlib.Path(__file__).with_suffix('.done').touch()\n")
    done = script.with_suffix(".done")
    done.unlink(missing_ok=True)
    return seconds_until(done.exists, command(ranks, script))


def first_step_seconds(folder: Path, ranks: int, config: str, overrides: list[str]) -> float:
    runs = Path(tempfile.mkdtemp(dir=folder))
    settings = [f"runs={json.dumps(str(runs))}", "log_every=1", *overrides]

    def stepped() -> bool:
        return any('"loss/total"' in path.read_text() for path in runs.glob("*/metrics.jsonl"))

    return seconds_until(
        stepped, command(ranks, LAUNCH, "--config", config, *(x for s in settings for x in ("--set", s)))
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", required=True, help="a run file over tiny models, of few steps")
    parser.add_argument("--set", action="append", default=[], metavar="section.key=value")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rounds = [
            (
                imports_seconds(Path(folder), arguments.ranks),
                first_step_seconds(Path(folder), arguments.ranks, arguments.config, arguments.set),
            )
            for _ in range(arguments.rounds)
        ]
    imports, first = (statistics.median(column) for column in zip(*rounds, strict=True))
    extra = statistics.median(b - a for a, b in rounds)
    print(
        f"only imports {imports:.1f} s | to the first step {first:.1f} s | difference {extra:.1f} s (medians of {len(rounds)})"
    )


if __name__ == "__main__":
    main()
