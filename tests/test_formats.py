"""Laws of the files: a file is the old one or the new one, lines only grow, half lines are never read."""

from __future__ import annotations

import pytest

from kokanee.errors import KokaneeError
from kokanee.formats import append_jsonl, differences, read_jsonl, replaced_file, write_json, write_text


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "a.txt"
    write_text(path, "old")
    with pytest.raises(RuntimeError), replaced_file(path) as unfinished:
        unfinished.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_folders_are_made_and_text_is_utf8(tmp_path):
    path = tmp_path / "deep" / "er" / "a.json"
    write_json(path, {"text": "狗 é"})
    assert "狗 é" in path.read_bytes().decode("utf-8")


def test_records_that_are_added_are_read_in_order(tmp_path):
    path = tmp_path / "a.jsonl"
    records = [{"n": 1}, {"text": "line\nbreak, \u2028 and 狗"}, {"n": 3}]
    append_jsonl(path, records[:1])
    append_jsonl(path, records[1:])
    assert read_jsonl(path) == records


def test_the_half_line_of_a_killed_writer_is_not_read_and_is_cut_off_by_the_next(tmp_path):
    path = tmp_path / "a.jsonl"
    append_jsonl(path, [{"n": 1}])
    with path.open("a") as file:
        file.write('{"n": 2')
    assert read_jsonl(path) == [{"n": 1}]
    append_jsonl(path, [{"n": 3}])
    assert read_jsonl(path) == [{"n": 1}, {"n": 3}]


def test_a_half_line_alone_is_cut_off_too(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"n"')
    append_jsonl(path, [{"n": 3}])
    assert read_jsonl(path) == [{"n": 3}]


def test_a_broken_line_is_named(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"n": 1}\n{"n": \n{"n": 3}\n')
    with pytest.raises(KokaneeError, match="line 2 is not JSON"):
        read_jsonl(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(KokaneeError, match=r"none.jsonl is not there"):
        read_jsonl(tmp_path / "none.jsonl")


def test_differences_name_both_sides():
    assert differences({"a": 1, "b": 2}, {"a": 1, "b": 3, "c": None}) == ["b: 2 before, 3 now"]
