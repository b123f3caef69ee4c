"""What a long test has done, a line a case in docs/soak.csv: a test that was broken off goes on behind its last case.

Lines of another version of the code are not taken for this one's: remove the file, or the lines, to begin anew.
"""

import csv
import datetime
import json
from pathlib import Path

REPORT = Path(__file__).resolve().parents[1] / "docs" / "soak.csv"
COLUMNS = ("test", "case", "date", "result")


def done(test: str) -> dict[str, dict]:
    """Result by case."""
    if not REPORT.exists():
        return {}
    with REPORT.open(newline="", encoding="utf-8") as file:
        return {row["case"]: json.loads(row["result"]) for row in csv.DictReader(file) if row["test"] == test}


def note(test: str, case, **result) -> None:
    new = not REPORT.exists()
    with REPORT.open("a", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        if new:
            writer.writerow(COLUMNS)
        writer.writerow([test, case, datetime.date.today().isoformat(), json.dumps(result)])
