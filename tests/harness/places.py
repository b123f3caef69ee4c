"""Where the repository and the tests' own programs are."""

from pathlib import Path

HARNESS = Path(__file__).resolve().parent
ROOT = HARNESS.parents[1]
