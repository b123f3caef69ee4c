"""Which errors of a file system a user must correct, and which may pass."""

import errno
import os
import tomllib

import pytest

from ted_scale.base.errors import Gone, UserError, files_at, shown


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        *((code, UserError) for code in (errno.ENOENT, errno.EACCES, errno.ENOSPC, errno.EDQUOT)),
        *((code, Gone) for code in (errno.ESTALE, errno.EIO, errno.ETIMEDOUT, None)),
    ],
)
def test_a_fault_of_a_file_server_is_no_mistake_and_a_wrong_name_or_a_full_disk_is_one(code, kind):
    said = os.strerror(code) if code else "it is shorter than before"
    with pytest.raises(kind, match=f"^/corpus must be .*{said}.* start the same command again$"), files_at("/corpus"):
        raise OSError(code, said) if code else OSError(said)


def test_a_value_is_in_the_words_of_the_file_it_came_from():
    """Python's words are no TOML: who copies them gets another mistake."""
    value = {"a": True, "b": (0, 1.5, [False]), "c": "text"}
    assert shown(value) == "{a = true, b = [0, 1.5, [false]], c = 'text'}"
    assert tomllib.loads(f"value = {shown(value)}") == {"value": {"a": True, "b": [0, 1.5, [False]], "c": "text"}}
    assert shown(None) == "null"
