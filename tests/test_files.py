import json

import pytest

from vae.files import write_atomically, write_json


def test_a_write_that_fails_leaves_the_previous_file_whole(tmp_path):
    path = tmp_path / "metrics.json"
    write_json(path, {"a": 1})

    def half(file):
        file.write(b"{")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        write_atomically(path, half)
    assert json.loads(path.read_text()) == {"a": 1}
    assert [entry.name for entry in tmp_path.iterdir()] == ["metrics.json"]


def test_a_value_that_is_not_json_leaves_nothing_behind(tmp_path):
    with pytest.raises(TypeError):
        write_json(tmp_path / "x.json", {"a": object()})
    assert list(tmp_path.iterdir()) == []
