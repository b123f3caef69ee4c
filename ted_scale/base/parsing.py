"""Text that anybody may have written, parsed: a value or a ValueError, whatever the text is.

What the value must hold is its reader's part, and the sentence too. The surprise: Python's own parsers have other ends
than ValueError: they run out of stack at a thousand brackets.
"""

import json
import tomllib
from collections.abc import Callable, Mapping

COUNT_LIMIT = 1 << 62  # of tokens, bytes, steps: what is above is no number of anything, and overflows int64 in sums


def parse_json(text: str | bytes):
    return parsed(json.loads, text)


def parse_toml(text: str) -> dict:
    return parsed(tomllib.loads, text)


def parsed(parse: Callable, text):
    try:
        return parse(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def is_count(value) -> bool:
    return type(value) is int and 0 <= value < COUNT_LIMIT


def fits(values, required: Mapping[str, type], optional: Mapping[str, type] | None = None) -> bool:
    """A table that has the keys asked for, each of its kind; numbers are counts. Other keys are not looked at."""
    if not isinstance(values, dict) or not required.keys() <= values.keys():
        return False
    kinds = {**required, **(optional or {})}
    held = ((values[key], kind) for key, kind in kinds.items() if key in values)
    return all(is_count(value) if kind is int else isinstance(value, kind) for value, kind in held)
