"""What a long test has done, a line a case in docs/soak.csv: a test that was broken off goes on behind its last case, and one
whose code has changed begins anew."""

import csv
import datetime
import json
import subprocess
from functools import lru_cache

from places import ROOT

REPORT = ROOT / "docs" / "soak.csv"
COLUMNS = ("test", "case", "commit", "date", "result")


@lru_cache
def commit() -> str:
    """The last one that changed the code that is tested; the time of day beside it where that is changed again."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(ROOT), *arguments, "--", "ted_scale", "launch"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    changed = datetime.datetime.now().strftime("+%H:%M:%S") if git("status", "--porcelain") else ""
    return git("log", "-1", "--format=%h") + changed


def rows() -> list[dict]:
    if not REPORT.exists():
        return []
    with REPORT.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def done(test: str) -> dict[str, dict]:
    """Result by case, of this code."""
    mine = [row for row in rows() if row["test"] == test and row["commit"] == commit()]
    return {row["case"]: json.loads(row["result"]) for row in mine}


def note(test: str, case, **result) -> None:
    """In place of what earlier code did in this case."""
    kept = [row for row in rows() if (row["test"], row["case"]) != (test, str(case))]
    today = datetime.date.today().isoformat()
    kept.append({"test": test, "case": case, "commit": commit(), "date": today, "result": json.dumps(result)})
    with REPORT.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(kept)
