import errno
import json

import pytest

from vae.errors import VAEError
from vae.files import write_atomically, write_json


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO], ids=errno.errorcode.get)
def test_a_write_that_fails_leaves_the_previous_file_whole(tmp_path, number):
    path = tmp_path / "metrics.json"
    write_json(path, {"a": 1})

    def half(file):
        file.write(b"{")
        try:
            raise OSError(number, "cannot be written")
        except OSError:
            raise RuntimeError("unexpected position") from None  # as torch.save does in place of what went wrong

    full = number != errno.EIO
    with pytest.raises(
        VAEError if full else RuntimeError, match=f"left on the disk to write {path}" if full else "unexpected position"
    ):
        write_atomically(path, half)
    assert json.loads(path.read_text()) == {"a": 1}
    assert [entry.name for entry in tmp_path.iterdir()] == ["metrics.json"]


def test_a_value_that_is_not_json_leaves_nothing_behind(tmp_path):
    with pytest.raises(TypeError):
        write_json(tmp_path / "x.json", {"a": object()})
    assert list(tmp_path.iterdir()) == []
