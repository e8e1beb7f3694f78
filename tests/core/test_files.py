"""Writes are whole or not at all."""

import pytest

from qat.core.errors import UserError
from qat.core.files import atomic_directory, atomic_path, read_json, sha256, write_json


def test_a_failed_write_leaves_the_earlier_file(tmp_path):
    target = tmp_path / "a.txt"
    target.write_text("before")
    with pytest.raises(RuntimeError), atomic_path(target) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert target.read_text() == "before"
    assert list(tmp_path.iterdir()) == [target]


def test_a_folder_is_replaced_whole(tmp_path):
    target = tmp_path / "out"
    for text in ("one", "two"):
        with atomic_directory(target) as folder:
            (folder / f"{text}.txt").write_text(text)
    assert [path.name for path in target.iterdir()] == ["two.txt"]
    with pytest.raises(RuntimeError), atomic_directory(target) as folder:
        (folder / "three.txt").write_text("3")
        raise RuntimeError
    assert [path.name for path in target.iterdir()] == ["two.txt"]
    assert list(tmp_path.iterdir()) == [target]


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write here"), atomic_path(tmp_path / "file" / "x"):
        pass


def test_json_round_trip_and_damage(tmp_path):
    write_json(tmp_path / "a.json", {"x": [1, 2.5]})
    assert read_json(tmp_path / "a.json") == {"x": [1, 2.5]}
    (tmp_path / "a.json").write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        read_json(tmp_path / "a.json")
    with pytest.raises(UserError, match="cannot be read"):
        read_json(tmp_path / "b.json")


def test_sha256_of_nothing(tmp_path):
    (tmp_path / "empty").write_bytes(b"")
    assert sha256(tmp_path / "empty").startswith("e3b0c44298fc1c14")
