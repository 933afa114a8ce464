"""Files written atomically, and their errors in one line."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from navit_clip.errors import UserError, one_line_errors, printable
from navit_clip.files import atomic_write, reading, replacing, sha256_of, write_output, writing


def test_a_failed_write_leaves_the_old_content(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    atomic_write(path, "old")

    def fail(self: Path, data: bytes) -> int:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", fail)
        with pytest.raises(UserError) as caught:
            write_output(path, "new")
    assert str(caught.value) == f"cannot write {path}: No space left on device"
    assert path.read_text() == "old"
    write_output(path, "é")
    assert path.read_bytes() == "é".encode()
    assert list(tmp_path.iterdir()) == [path]


def test_writers_of_one_file_do_not_meet(tmp_path):
    path = tmp_path / "a"
    with replacing(path) as one, replacing(path) as other:
        one.write_text("one")
        other.write_text("other")
    assert path.read_text() == "one"
    with pytest.raises(FileNotFoundError), replacing(path) as partial:
        partial.with_name("elsewhere").rename(partial)
    assert path.read_text() == "one"
    assert list(tmp_path.iterdir()) == [path]


def test_an_output_makes_its_folders_and_names_its_flag(tmp_path):
    write_output(tmp_path / "a" / "b" / "c", b"x")
    assert (tmp_path / "a" / "b" / "c").read_bytes() == b"x"
    with pytest.raises(UserError, match=r"cannot write --output: .*/b/c is a file"):
        write_output(tmp_path / "a" / "b" / "c" / "d", b"x", "--output")


@pytest.mark.parametrize("size", [0, 1, (1 << 22) + 1])
def test_the_hash_is_of_the_whole_file(tmp_path, size):
    path = tmp_path / "a"
    path.write_bytes(b"a" * size)
    assert sha256_of(path) == hashlib.sha256(b"a" * size).hexdigest()


def test_errors_of_a_parser_are_one_line():
    message = r"^cannot read x: 'kind' is missing; export it again$"
    with pytest.raises(UserError, match=message), reading("x", KeyError, hint="; export it again"):
        {}["kind"]
    with pytest.raises(UserError) as caught, reading("x", ValueError):
        raise ValueError("tensor\n" * 1000)
    assert len(str(caught.value)) < 400
    with pytest.raises(ZeroDivisionError), writing("x", ValueError):
        raise ZeroDivisionError
    # The message of a user's mistake is the more exact one.
    with pytest.raises(UserError, match=r"^the cause$"), writing("x", ValueError):
        raise UserError("the cause")


def test_ctrl_c_is_one_line(capsys):
    with pytest.raises(SystemExit) as stop, one_line_errors("train"):
        raise KeyboardInterrupt
    assert stop.value.code == 130
    assert capsys.readouterr().err == "train: interrupted\n"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("cannot read https://me:secret@host/a.tar: gone", "cannot read https://host/a.tar: gone"),
        ("HTTP://host/a.tar?X-Sig=secret&b=1 is cut", "HTTP://host/a.tar is cut"),
        ("a?b=c & d@e is no address", "a?b=c & d@e is no address"),
        ("key \x1b[2J\x1b]0;owned\x07\r\nlike a line", None),
        ("right to left \u202e, half \ud800", None),
        ("Grüße 東京 🐈", "Grüße 東京 🐈"),
    ],
)
def test_foreign_text_neither_moves_the_cursor_nor_gives_away_a_password(text, shown):
    found = printable(text)
    assert found.isprintable()
    found.encode()
    assert shown is None or found == shown
