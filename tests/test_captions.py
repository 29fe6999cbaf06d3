"""Laws of what all captioners share: intervals, groups, and that one file's failure is its own."""

from __future__ import annotations

import subprocess
import sys
import threading
from itertools import pairwise

import pytest

from kokanee.captions import Caption, Decoding, FileCaptioner, Request, ahead, groups, intervals
from kokanee.defaults import Defaults
from kokanee.errors import KokaneeError


class Echo(FileCaptioner):
    """Says its question; a batch that holds what it does not answer fails as a whole."""

    name, defaults = "echo", Defaults("What?")

    def __init__(self, refused=()):
        self.refused, self.batches = refused, []

    def identity(self):
        return {"processor": {}}

    def read(self, request):
        raise KokaneeError(f"{request.path} cannot be read")

    def sample(self, medium, question, notes):
        return question

    def answer(self, prepared, decoding, n_samples=1):
        self.batches.append([part.sample for part in prepared])
        if set(self.batches[-1]) & set(self.refused):
            raise KokaneeError(f"no answer to {self.batches[-1]}")
        return [[Caption(part.sample, part.start_s, part.end_s, k) for k in range(n_samples)] for part in prepared]


def test_the_next_is_made_while_one_is_used_and_nothing_beyond_it():
    begun = [threading.Event() for _ in range(5)]

    def work(number):
        begun[number].set()
        return number

    found = ahead(range(5), work)
    for number in range(3):
        assert next(found) == number and begun[number + 1].wait(60)
    found.close()
    assert not begun[4].is_set()


def test_what_goes_wrong_ahead_is_raised_in_its_turn():
    found = ahead([2, 1, 0, 4], lambda number: 8 // number)
    assert [next(found), next(found)] == [4, 8]
    with pytest.raises(ZeroDivisionError):
        next(found)
    assert list(ahead([], str)) == [] and list(ahead([7], str)) == ["7"]


def test_what_one_file_lacks_no_other_misses(media, tmp_path):
    still, echo = media / "still.png", Echo(refused="b")
    requests = [Request(still, "a"), Request(tmp_path / "none.mp4"), Request(still, "b"), Request(still, "c")]
    found = list(echo.each(requests, Decoding(), 2, 3))
    assert [request for request, _ in found] == requests
    said = [str(made) if isinstance(made, KokaneeError) else [caption.text for caption in made] for _, made in found]
    assert said == [["a", "a"], f"{tmp_path / 'none.mp4'} cannot be read", "no answer to ['b']", ["c", "c"]]
    assert echo.batches == [["a", "b"], ["a"], ["b"], ["c"]]


def test_a_stream_may_come_in_one_piece(media):
    stream = Echo().stream(media / "still.png", "a")
    assert list(stream) == ["a"] and stream.caption == Caption("a", 0.0, 0.0)


def test_a_captioner_needs_no_torch():
    code = "import sys, kokanee.caption_run; assert not {'torch', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("start_s", "end_s", "expected"),
    [
        (0, None, [(0, 10), (10, 20), (20, 25)]),
        (0, 22.4, [(0, 10), (10, 22.4)]),
        (0, 20.0, [(0, 10), (10, 20)]),
        (3, None, [(3, 13), (13, 25)]),
        (20, 99, [(20, 25)]),
        (0, 2, [(0, 2)]),
    ],
)
def test_intervals_cover_the_time_without_gaps_and_a_short_rest_joins_the_last(start_s, end_s, expected):
    assert intervals(start_s, 25.0, 10.0, end_s) == expected


def test_intervals_of_a_tenth_are_not_lost_to_rounding():
    found = intervals(0.0, 1.0, 0.1)
    assert len(found) == 10 and found[-1][1] == 1.0
    assert all(before[1] == after[0] for before, after in pairwise(found))


@pytest.mark.parametrize(("start_s", "every_s"), [(0, 0), (0, float("nan")), (0, -1), (25, 10), (30, 10)])
def test_intervals_that_cannot_be_are_refused(start_s, every_s):
    with pytest.raises(KokaneeError, match=r"cannot be|There is nothing from"):
        intervals(start_s, 25.0, every_s)


def test_groups_keep_the_order():
    assert list(groups("abcde", 2)) == [["a", "b"], ["c", "d"], ["e"]]
    with pytest.raises(KokaneeError, match="batch_size"):
        list(groups("abc", 0))
