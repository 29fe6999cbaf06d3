"""Laws of the files: a file is the old one or the new one, lines only grow, half lines are never read."""

from __future__ import annotations

import os
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from kokanee import formats
from kokanee.errors import KokaneeError
from kokanee.formats import (
    alone_at,
    alone_in,
    append_jsonl,
    check_writable,
    differences,
    read_json,
    read_jsonl,
    replaced_file,
    write_json,
    write_text,
)


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


def test_a_last_line_that_lacks_only_its_end_is_a_record_and_is_kept(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"n": 1}\n{"n": 2}')
    assert read_jsonl(path) == [{"n": 1}, {"n": 2}]
    append_jsonl(path, [{"n": 3}])
    assert read_jsonl(path) == [{"n": 1}, {"n": 2}, {"n": 3}]


@pytest.mark.parametrize("text", ["my thesis", "my thesis\nin two lines", '{"n"', "[1]\n", "\n"])
def test_a_file_that_does_not_begin_with_a_record_is_left_as_it_is(tmp_path, text):
    path = tmp_path / "a.jsonl"
    path.write_text(text)
    with pytest.raises(KokaneeError, match="does not begin with a record"):
        append_jsonl(path, [{"n": 3}])
    assert path.read_text() == text


def test_a_file_of_one_line_that_is_no_json_is_no_empty_file_of_records(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("my thesis")
    with pytest.raises(KokaneeError, match="line 1 is not JSON"):
        read_jsonl(path)
    path.write_text("")
    assert read_jsonl(path) == []


def test_names_that_are_no_utf8_are_kept_byte_by_byte(tmp_path):
    path, name = tmp_path / "a.jsonl", os.fsdecode(b"caf\xe9.mp4")
    append_jsonl(path, [{"file": name}])
    append_jsonl(path, [{"file": "b.mp4"}])
    assert read_jsonl(path) == [{"file": name}, {"file": "b.mp4"}]
    write_text(tmp_path / "a.txt", name)
    assert b"caf\xe9.mp4" in path.read_bytes() and (tmp_path / "a.txt").read_bytes() == b"caf\xe9.mp4"


def test_what_a_link_points_to_is_replaced_not_the_link(tmp_path):
    (tmp_path / "deep").mkdir()
    link, there = tmp_path / "link.txt", tmp_path / "deep" / "there.txt"
    link.symlink_to(there)
    for text in ("new", "newer"):
        write_text(link, text)
        assert link.is_symlink() and there.read_text() == text and not there.is_symlink()
    assert [path.name for path in there.parent.iterdir()] == ["there.txt"]


def test_names_that_are_no_text_are_read_as_they_were_written(tmp_path):
    value = {"videos": os.fsdecode(b"caf\xe9")}
    write_json(tmp_path / "state.json", value)
    assert read_json(tmp_path / "state.json") == value


def test_a_file_that_an_editor_marked_as_utf8_is_added_to(tmp_path):
    path = tmp_path / "marked.jsonl"
    path.write_text('{"n": 1}\n{"n": 2}', encoding="utf-8-sig")
    append_jsonl(path, [{"n": 3}])
    assert read_jsonl(path) == [{"n": 1}, {"n": 2}, {"n": 3}]


@pytest.mark.parametrize(
    "write", [lambda path: write_text(path, "text\n"), lambda path: append_jsonl(path, [{"n": 1}])]
)
def test_a_pipe_is_written_to_and_stays_a_pipe(tmp_path, write):
    pipe, told = tmp_path / "pipe", []
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: told.append(pipe.read_text()), daemon=True)
    reader.start()
    write(pipe)
    reader.join(timeout=20)
    assert told in (["text\n"], ['{"n": 1}\n']) and pipe.is_fifo()
    assert list(tmp_path.iterdir()) == [pipe]


def test_where_nothing_can_be_written_is_known_before(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    for place in ("new.txt", "deep/er/new.txt", "file"):
        check_writable(tmp_path / place)
    for place, named in (("file/a.txt", "file is in the way"), ("folder", "folder is in the way")):
        with pytest.raises(KokaneeError, match=f"cannot be written: .*{named}"):
            check_writable(tmp_path / place)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]


def test_a_write_protected_place_is_known_before(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(KokaneeError, match="write-protected"):
        check_writable(tmp_path / "a.txt")


def test_a_file_system_that_takes_no_files_is_known_before(tmp_path, monkeypatch):
    def refuse(dir):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    (tmp_path / "a.txt").touch()
    for name in ("a.txt", "b.txt"):
        with pytest.raises(KokaneeError, match=r"cannot be written: .*No space left"):
            check_writable(tmp_path / name)


@pytest.mark.parametrize(
    ("text", "reason"), [(None, "missing"), ("{", "not readable JSON"), ("[]", "list, not an object")]
)
def test_json_that_cannot_be_used_is_named(tmp_path, text, reason):
    path = tmp_path / "config.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(KokaneeError, match=reason):
        read_json(path)


def test_a_broken_line_is_named(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"n": 1}\n{"n": \n{"n": 3}\n')
    with pytest.raises(KokaneeError, match="line 2 is not JSON"):
        read_jsonl(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(KokaneeError, match=r"none.jsonl is not there"):
        read_jsonl(tmp_path / "none.jsonl")


@pytest.mark.parametrize("alone", [alone_in, alone_at])
def test_one_at_a_time_works_in_a_place_and_no_lock_is_left(tmp_path, monkeypatch, alone):
    monkeypatch.setattr(formats, "LOCK_WAIT_S", 0.1)
    place, again = tmp_path / "place", pytest.raises(KokaneeError, match=r"Another process works in .*place\. Wait")
    with alone(place), again, alone(place):
        pass
    with alone(place):
        assert len(list(tmp_path.iterdir())) == 1
    assert list(tmp_path.iterdir()) == []


def test_a_file_is_locked_under_all_its_names_and_a_pipe_under_none(tmp_path, monkeypatch):
    monkeypatch.setattr(formats, "LOCK_WAIT_S", 0.1)
    (tmp_path / "link").symlink_to("file")
    with alone_at(tmp_path / "file"), pytest.raises(KokaneeError, match="Another process"), alone_at(tmp_path / "link"):
        pass
    os.mkfifo(tmp_path / "pipe")
    with alone_at(tmp_path / "pipe"), alone_at(tmp_path / "pipe"):
        assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "pipe"]


def test_a_folder_is_removed_where_it_was_made_for_nothing(tmp_path):
    (tmp_path / "before").mkdir()
    for name in ("before", "new", "used"):
        with pytest.raises(RuntimeError), alone_in(tmp_path / name):
            if name == "used":
                write_text(tmp_path / name / "a.txt", "made")
            raise RuntimeError
    assert sorted(path.name for path in tmp_path.iterdir()) == ["before", "used"]
    assert [path.name for path in tmp_path.glob("*/*")] == ["a.txt"]


def test_locks_that_are_removed_still_let_one_in_at_a_time(tmp_path):
    """Folder and lock go and come again each time, while others wait for them."""
    inside, most = [0], []

    def work(_: int) -> None:
        with alone_in(tmp_path / "folder"):
            inside[0] += 1
            most.append(inside[0])
            os.stat(tmp_path)  # others may run now
            inside[0] -= 1

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(60)))
    assert most == [1] * 60 and list(tmp_path.glob("*/*")) == []


def test_no_lock_waits_for_a_folder_where_there_is_a_file(tmp_path):
    (tmp_path / "a.txt").touch()
    with pytest.raises(FileExistsError, match=r"a\.txt"), alone_in(tmp_path / "a.txt"):
        pass


def test_differences_name_both_sides():
    assert differences({"a": 1, "b": 2}, {"a": 1, "b": 3, "c": None}) == ["b: 2 before, 3 now"]


def test_differences_inside_settings_are_named_alone_and_in_full():
    before, now = ({"data": {"train": {"videos": "x", "unreadable": share}, "seed": 0}} for share in (0.02, 0.3))
    assert differences(before, now) == ["data.train.unreadable: 0.02 before, 0.3 now"]
    assert differences({"data": {}}, {"data": {"prompts": ["a"]}}) == ["data.prompts: None before, ['a'] now"]
