"""Items to train on and items held out, where only one set of items is there.

Note: items that share a text, also by way of others, are on one side. Else a passage that was trained on would be asked about.
The side is a hash of such a group's first text in the alphabet: it depends on no order and no seed.
"""

import hashlib

HELD_OUT = 20  # percent of the groups


def is_held_out(groups: list[list[str]]) -> list[bool]:
    """For the texts of each item."""
    first: dict[str, str] = {}  # of texts that are alike, an earlier one in the alphabet; the first leads to itself
    for texts in groups:
        for text in texts[1:]:
            one, other = sorted((root(first, texts[0]), root(first, text)))
            first[other] = one
    return [hashed(root(first, texts[0])) < HELD_OUT for texts in groups]


def root(first: dict[str, str], text: str) -> str:
    while (above := first.setdefault(text, text)) != text:
        first[text] = text = first.setdefault(above, above)
    return text


def hashed(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) % 100
