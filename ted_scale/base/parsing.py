"""Parsing JSON and TOML from unknown authors: the result is a value or a ValueError, whatever the text is.

The caller checks the value and writes the sentence. Note: Python's own parsers may also raise RecursionError, at a
thousand nested brackets.
"""

import json
import tomllib
from collections.abc import Callable, Mapping

COUNT_LIMIT = 1 << 62  # of tokens, bytes, steps: a larger number is a mistake, and sums of it overflow int64


def parse_json(text: str | bytes):
    return parsed(json.loads, text)


def parse_toml(text: str) -> dict:
    return parsed(tomllib.loads, text)


def parsed(parse: Callable, text):
    """A text from outside; what is nested too deeply for the parser is a ValueError, as any other fault of it."""
    try:
        return parse(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def is_count(value) -> bool:
    return type(value) is int and 0 <= value < COUNT_LIMIT


def fits(values, required: Mapping[str, type], optional: Mapping[str, type] | None = None) -> bool:
    """Whether a table has the required keys, each of its type. An int must be a count. Other keys are not checked."""
    if not isinstance(values, dict) or not required.keys() <= values.keys():
        return False
    kinds = {**required, **(optional or {})}
    held = ((values[key], kind) for key, kind in kinds.items() if key in values)
    return all(is_count(value) if kind is int else isinstance(value, kind) for value, kind in held)
