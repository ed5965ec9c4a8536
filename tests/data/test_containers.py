"""Records out of files of every kind, held to Python's own readers, and what cannot be read."""

import bz2
import csv
import gzip
import json
import lzma
import sys

import datasets
import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet
import pytest
import zstandard
from transformers.utils import logging

from minillm.data import CorpusError, read_records

ROWS = [{"prompt": f"{n} 加 1\u2028 等于", "completion": f"{n + 1}\n"} for n in range(2500)]
COMPRESSORS = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress, "zst": zstandard.compress}


def fields(source, **options):
    return [dict(record.fields) for record in read_records(source, **options)]


def json_lines(rows=ROWS):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def write_csv(path, rows=ROWS, **options):
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), **options)
        writer.writeheader()
        writer.writerows(rows)


def write_arrow(path, kind):
    table = pa.Table.from_pylist(ROWS)
    if kind == "stream":
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
            writer.write_table(table, max_chunksize=1100)
    elif kind == "file":
        pyarrow.feather.write_feather(table, path, chunksize=1100)
    else:
        pyarrow.parquet.write_table(table, path, row_group_size=1100)


WRITERS = {
    "a.jsonl": lambda path: path.write_text(json_lines(), "utf-8"),
    "a.ndjson": lambda path: path.write_text("\n" + json_lines().replace("\n", "\r\n"), "utf-8-sig"),
    "list.json": lambda path: path.write_text(json.dumps(ROWS, indent=1), "utf-8"),
    "lines.json": lambda path: path.write_text(json_lines(), "utf-8"),
    "a.csv": write_csv,
    "quoted.csv": lambda path: write_csv(path, quoting=csv.QUOTE_ALL, lineterminator="\n"),
    "a.tsv": lambda path: write_csv(path, delimiter="\t"),
    "a.parquet": lambda path: write_arrow(path, "parquet"),
    "a.arrow": lambda path: write_arrow(path, "stream"),
    "a.feather": lambda path: write_arrow(path, "file"),
}


@pytest.mark.parametrize("name", WRITERS)
def test_each_kind_of_file_gives_the_same_records(name, tmp_path):
    path = tmp_path / name
    WRITERS[name](path)
    assert fields(path) == ROWS
    records = list(read_records(path))
    assert len({record.name for record in records}) == len(ROWS) and not any(record.is_file for record in records)
    assert all(str(path) in record.place for record in records)


@pytest.mark.parametrize("ending", COMPRESSORS)
@pytest.mark.parametrize("name", ["a.jsonl", "list.json", "a.csv", "a.tsv"])
def test_each_compression(name, ending, tmp_path):
    WRITERS[name](tmp_path / name)
    packed = tmp_path / f"{name}.{ending.upper() if ending == 'gz' else ending}"
    packed.write_bytes(COMPRESSORS[ending]((tmp_path / name).read_bytes()))
    assert fields(packed) == ROWS


@pytest.mark.parametrize("ending", ["", *COMPRESSORS])
def test_text(ending, tmp_path):
    data = "eins\r\nzwei 二\n".encode()
    path = tmp_path / (f"a.txt.{ending}" if ending else "a.txt")
    path.write_bytes(COMPRESSORS[ending](data) if ending else data)
    (record,) = read_records(path)
    assert record == (str(path), path.name, {"text": "eins\nzwei 二\n"}, True)


def test_cells_of_csv_stay_strings(tmp_path):
    (tmp_path / "a.csv").write_text('prompt,completion\n007,NA\n1e3,""\n" ",null\n', "utf-8")
    assert fields(tmp_path / "a.csv") == [
        {"prompt": "007", "completion": "NA"},
        {"prompt": "1e3", "completion": ""},
        {"prompt": " ", "completion": "null"},
    ]
    assert datasets.load_dataset("csv", data_files=str(tmp_path / "a.csv"), cache_dir=str(tmp_path / "cache"))[
        "train"
    ][0] != {"prompt": "007", "completion": "NA"}, "if this fails, the library reads cells as they are by now"


def test_long_cells_and_the_line_of_a_row_with_breaks(tmp_path):
    rows = [{"prompt": "a\nb\nc", "completion": "x" * 300_000}, {"prompt": "d", "completion": "e"}]
    write_csv(tmp_path / "a.csv", rows)
    assert [record.place.rpartition(" ")[2] for record in read_records(tmp_path / "a.csv")] == ["2", "5"]
    assert fields(tmp_path / "a.csv") == rows


@pytest.mark.parametrize("encoding", ["gbk", "utf-16", "big5", "utf-32-le", "shift_jis"])
def test_encodings(encoding, tmp_path):
    rows = [{"prompt": "一加一", "completion": "二"}, {"prompt": "日本", "completion": "三"}]
    (tmp_path / "a.jsonl").write_bytes(json_lines(rows).encode(encoding))
    (tmp_path / "a.txt").write_bytes("中文".encode(encoding))
    write_csv(tmp_path / "utf-8.csv", rows)
    (tmp_path / "a.csv").write_bytes((tmp_path / "utf-8.csv").read_text("utf-8").encode(encoding))
    assert fields(tmp_path / "a.jsonl", encoding=encoding) == fields(tmp_path / "a.csv", encoding=encoding) == rows
    assert fields(tmp_path / "a.txt", encoding=encoding) == [{"text": "中文"}]
    with pytest.raises(CorpusError, match=r"a\.(txt|jsonl).*is (not UTF-8 text|binary).*"):
        fields(tmp_path / "a.txt"), fields(tmp_path / "a.jsonl")


def test_folders_mix_kinds_and_leave_out_what_is_no_text(tmp_path, caplog):
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "1.jsonl.gz").write_bytes(gzip.compress(json_lines(ROWS[:2]).encode()))
    (tmp_path / "a.txt").write_text("eins", "utf-8")
    (tmp_path / "package.json").write_text('{"name": "x", "version": 3}', "utf-8")
    (tmp_path / "README.md").write_text("# Card", "utf-8")
    (tmp_path / ".hidden.jsonl").write_text("no json", "utf-8")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\x00")
    logging.enable_propagation()
    try:
        records = list(read_records(tmp_path))
    finally:
        logging.disable_propagation()
    assert [record.name for record in records] == ["a.txt", "b/1.jsonl.gz#1", "b/1.jsonl.gz#2"]
    assert "3 files of the corpus" in caplog.text and "README.md describes the files of records" in caplog.text
    # Without files of records a README is a text like another.
    (tmp_path / "b" / "1.jsonl.gz").unlink()
    (tmp_path / "package.json").unlink()
    assert [record.name for record in read_records(tmp_path)] == ["README.md", "a.txt"]


def test_what_datasets_saved(tmp_path):
    data = datasets.Dataset.from_list(ROWS[:3])
    data.save_to_disk(tmp_path / "one")
    datasets.DatasetDict(train=data, test=data.select([0])).save_to_disk(tmp_path / "several")
    for name in ("one", "several"):
        assert fields(tmp_path / name) == ROWS[:3]
    (tmp_path / "one" / "state.json").write_text("{", "utf-8")
    with pytest.raises(CorpusError, match="one holds no data set that `datasets` can load"):
        fields(tmp_path / "one")


def test_a_data_set_by_name(tmp_path, monkeypatch):
    """Of the hub only the call is seen: `datasets` is asked for name and configuration, and a split is chosen."""
    data = datasets.DatasetDict(train=datasets.Dataset.from_list(ROWS[:2]), test=datasets.Dataset.from_list(ROWS[2:3]))
    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *arguments: asked.append(arguments) or data)
    assert fields("user/name") == fields("user/name:small") == ROWS[:2]
    assert fields("user/name:small:test") == fields("name::test") == ROWS[2:3]
    assert asked == [("user/name", None), ("user/name", "small"), ("user/name", "small"), ("name", None)]
    assert next(read_records("user/name")).place == "user/name row 1"
    with pytest.raises(CorpusError, match=r"user/name::dev has no split 'dev'; it has \['test', 'train'\]"):
        fields("user/name::dev")


def test_a_name_that_is_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CorpusError, match="no/where is no file or folder here, and no data set that `datasets` can"):
        fields("no/where")
    for name in ("missing.jsonl", "a/b/c", str(tmp_path / "nowhere"), "b.csv.gz"):
        with pytest.raises(FileNotFoundError, match="does not exist"):
            fields(name)


BROKEN = {
    "line.jsonl": (b'{"a": 1}\n{"a": \n', "line.jsonl line 2 is no JSON: Expecting value"),
    "number.jsonl": (b'{"a": 1}\n\n7\n', "number.jsonl line 3 holds 7; needed: an object"),
    "bytes.jsonl": (b'{"a": 1}\n{"a": "\xff"}\n', r"bytes.jsonl line 2 is not UTF-8 text \(byte 16\).*--encoding"),
    "zero.jsonl": (b'{"a": "\x00"}\n', r"zero.jsonl line 1 is binary \(a zero byte at 7\)"),
    "deep.jsonl": (b"[" * 100_000, "deep.jsonl line 1 is no JSON"),
    "empty.jsonl": (b" \n\n", "empty.jsonl is empty"),
    "value.json": (b"[1, 2", "value.json is no JSON"),
    "object.json": (b'{"name": 1}', r"object.json holds one object with the keys \['name'\]; needed: a list"),
    "list.json": (b'[{"a": 1}, 2]', "list.json record 2 holds 2; needed: an object"),
    "none.json": (b"[]", "none.json holds .*; needed: a list of records"),
    "cells.csv": (b"a,b\n1,2\n1,2,3\n", "cells.csv line 3 has 3 cells under the 2 of line 1"),
    "twice.csv": (b"a,a\n1,2\n", "twice.csv line 1 names a column twice"),
    "quote.csv": (b'a,b\n1,"2\n', "quote.csv line 2: unexpected end of data"),
    "pretty.jsonl": (b'[\n{"a": 1}\n]', r"pretty.jsonl line 1 is no JSON.*needed: an object on each line; a list of"),
    "semicolons.csv": (b"a;b\n1;2\n", "semicolons.csv line 1 separates cells by semicolons; needed: commas"),
    "empty.csv": (b"", "empty.csv is empty"),
    "text.parquet": (b"a,b\n1,2\n", "text.parquet is damaged, or is not what its name says"),
    "text.arrow": (b"a,b\n1,2\n" * 8, "text.arrow is damaged, or is not what its name says"),
    "a.jsonl.gz": (b'{"a": 1}\n', "a.jsonl.gz is damaged, or is not what its name says"),
    "cut.jsonl.gz": (gzip.compress(json_lines().encode())[:5000], "cut.jsonl.gz is damaged"),
    "cut.txt.xz": (lzma.compress(json_lines().encode())[:500], "cut.txt.xz is damaged"),
    "a.jsonl.zst": (b'{"a": 1}\n', "a.jsonl.zst is damaged"),
    "a.parquet.gz": (gzip.compress(b"a"), "a.parquet.gz: files of Arrow and Parquet compress themselves"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_cannot_be_read_is_named(name, tmp_path):
    data, words = BROKEN[name]
    (tmp_path / name).write_bytes(data)
    with pytest.raises(CorpusError, match=words):
        fields(tmp_path / name)


def test_an_unknown_encoding_and_a_missing_library(tmp_path, monkeypatch):
    with pytest.raises(CorpusError, match="the encoding 'klingon' is unknown"):
        fields(tmp_path, encoding="klingon")
    (tmp_path / "a.jsonl.zst").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(ImportError, match=r"needs zstandard: pip install 'minillm-hf\[train\]'"):
        fields(tmp_path / "a.jsonl.zst")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(
        ImportError, match=r"no/where is no file or folder here; this kind of data needs datasets: pip"
    ):
        fields("no/where")


def test_lines_are_read_as_they_are_asked_for(tmp_path):
    """What is wrong further down is not seen before, and nothing is held."""
    (tmp_path / "a.jsonl").write_text(json_lines() + "{", "utf-8")
    records = read_records(tmp_path / "a.jsonl")
    assert next(records).fields == ROWS[0]
    with pytest.raises(CorpusError, match="line 2501"):
        list(records)
