"""Which errors of a file system a user must correct, and which may pass."""

import errno
import os

import pytest

from ted_scale.base.errors import Gone, UserError, files_at


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
