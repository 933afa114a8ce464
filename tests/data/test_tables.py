"""Tables of captions: quotes, and values that are no texts."""

from __future__ import annotations

from pathlib import Path

import pytest
from source_cases import write

from navit_clip.data.annotations.labels import read_label_file
from navit_clip.data.annotations.rows import usable_captions
from navit_clip.data.annotations.tables import open_table
from navit_clip.errors import UserError


def captions(path: str) -> list[tuple[str | None, ...]]:
    return [row.captions for row in open_table(Path(path), Path(), "path", ["caption"]).rows]


PLAIN = ['"Sunset over the bay', "two", 'a television of 42"', "x", '"The" end', '"', '""""']


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_tsv_without_quoting_keeps_every_row(end, tmp_path):
    lines = ["path\tcaption", *(f"{i}.jpg\t{text}" for i, text in enumerate(PLAIN))]
    (tmp_path / "t.tsv").write_bytes((end.join(lines) + end).encode())
    assert captions(str(tmp_path / "t.tsv")) == [(text,) for text in PLAIN[:-1]] + [('"',)]


def test_a_tsv_with_quoting_is_read_as_csv_is(tmp_path):
    text = 'path\tcaption\na.jpg\t"says ""hello"""\nb.jpg\t"over\ntwo lines"\n'
    assert captions(write(tmp_path / "t.tsv", text)) == [('says "hello"',), ("over\ntwo lines",)]


@pytest.mark.parametrize("delimiter", [",", "\t"])
def test_rows_that_a_quote_swallows_are_found(delimiter, tmp_path):
    rows = ["path|caption|n", 'a.jpg|"one|1', "b.jpg|two|2", 'c.jpg|three"|3', "d.jpg|four"]
    text = "\n".join(rows).replace("|", delimiter)
    path = write(tmp_path / ("t.csv" if delimiter == "," else "t.tsv"), text + "\n")
    with pytest.raises(UserError, match=r"line 4: a field in quotes .* the row of b\.jpg"):
        captions(path)
    text = 'path,caption\na.jpg,"Hello,\nfoo, bar"\n'
    assert captions(write(tmp_path / "t.csv", text)) == [("Hello,\nfoo, bar",)]


@pytest.mark.parametrize("name", ["l.csv", "l.tsv"])
def test_quotes_in_label_files_swallow_nothing(name, tmp_path):
    text = 'a.jpg|"cat\nb.jpg|dog\nc.jpg|bird"\n'.replace("|", "," if "csv" in name else "\t")
    path = write(tmp_path / name, text)
    if name == "l.tsv":
        assert read_label_file(path) == {"a.jpg": '"cat', "b.jpg": "dog", "c.jpg": 'bird"'}
    else:
        with pytest.raises(UserError, match="line 3 is"):
            read_label_file(path)


def test_two_columns_of_one_name_are_refused(tmp_path):
    with pytest.raises(UserError, match="two columns 'caption': rename one"):
        captions(write(tmp_path / "t.csv", "path,caption,caption\na.jpg,x,y\n"))


def test_only_texts_are_captions(tmp_path):
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    for values in ([b"one", b"\xff", None], [1.5, float("nan"), None], [{"a": 1}, None, None]):
        table = arrow.table({"path": ["a", "b", "c"], "caption": values})
        parquet.write_table(table, tmp_path / "t.parquet")
        found = [usable_captions(texts) for texts in captions(str(tmp_path / "t.parquet"))]
        assert [text for text, _ in found] in ([("one",), (), ()], [("1.5",), (), ()], [(), (), ()])
        assert sum(sum(skipped.values()) for _, skipped in found) == 3 - sum(map(len, dict(found)))
