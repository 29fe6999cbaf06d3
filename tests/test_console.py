"""Laws of what is told on the way: where nobody watches a terminal, lines come when work is done, and each minute."""

from __future__ import annotations

import pytest

from kokanee import console
from kokanee.console import bar, counted, key_value, said_when_stopped


def test_without_a_terminal_the_end_of_each_piece_of_work_is_a_line(capsys):
    with bar("{task.fields[figures]}") as progress:
        first = progress.add_task("sample", total=3, figures="")
        for done in (1, 2, 3, 3):
            progress.update(first, completed=done, figures=f"loss {done}")
        second = progress.add_task("files", total=2, figures="")
        progress.advance(second)
        progress.update(second, advance=1)
        progress.reset(second, total=1)
        progress.advance(second)
    assert capsys.readouterr().err.splitlines() == ["sample: 3 of 3 loss 3", "files: 2 of 2", "files: 1 of 1"]


def test_ctrl_c_says_what_becomes_of_the_work_once(capsys, monkeypatch):
    for rank in (None, "0"):  # of several processes the launcher says it
        if rank is not None:
            monkeypatch.setenv("RANK", rank)
        with pytest.raises(KeyboardInterrupt), said_when_stopped("It goes on."):
            raise KeyboardInterrupt
    assert capsys.readouterr().err == "It goes on.\n"


def test_long_work_is_told_of_meanwhile_and_hidden_work_never(capsys, monkeypatch):
    monkeypatch.setattr(console, "LINE_EVERY_S", 0.0)
    for hidden in (False, True):
        with bar(hidden=hidden) as progress:
            progress.update(progress.add_task("clips"), completed=5)
    assert capsys.readouterr().err == "clips: 5\n"


def test_values_are_yaml_and_powers_of_ten_numbers():
    for text, value in (("4e-3", 0.004), ("-1E5", -1e5), ("0.0040", 0.004), ("1e", "1e"), ("e3", "e3"), ("[1]", [1])):
        assert key_value(f"a.b={text}") == ("a.b", value)


def test_one_is_no_plural():
    assert [counted(number, "video") for number in (0, 1, 2)] == ["0 videos", "1 video", "2 videos"]
