"""Laws of the plots: axes enclose what is drawn, bars stand upon each other, nothing is drawn of nothing."""

from __future__ import annotations

import re
from itertools import pairwise

import pytest

from kokanee.plots import Series, plot, stacked, ticks


@pytest.mark.parametrize(
    ("low", "high"), [(0, 53.1), (1.1, 9.2), (94.2, 94.7), (-1.3, 0.4), (5, 5), (0, 0), (0, 2394), (0.2, 0.3)]
)
def test_ticks_are_even_and_enclose_all_values(low, high):
    found = ticks(low, high)
    steps = {round(upper - lower, 9) for lower, upper in pairwise(found)}
    assert found[0] <= low + 1e-9 and found[-1] >= high - 1e-9
    assert len(steps) == 1 and 3 <= len(found) <= 7


def test_ticks_are_the_round_numbers_worked_out_by_hand():
    assert ticks(0, 53.1) == [0, 20, 40, 60]
    assert ticks(20, 29) == [20, 22.5, 25, 27.5, 30]


def test_bars_stand_upon_each_other():
    lower, upper = Series("a", "a", "bars", [(0, 2.0), (1, 3.0)]), Series("b", "b", "bars", [(1, 4.0)])
    assert stacked([lower, upper]) == [(lower, 0, 0, 2.0), (lower, 1, 0, 3.0), (upper, 1, 3.0, 7.0)]


def test_all_that_is_drawn_lies_inside_the_picture():
    text = plot(
        "t",
        "",
        [
            Series("bars", "a", "bars", [(0, 40.0), (3, 60.0)]),
            Series("more", "b", "bars", [(0, 5.0), (3, 7.5)]),
            Series("line", "c", "line", [(0, 70.0), (3, -2.0)]),
        ],
        3,
    )
    boxes = re.findall(r'<rect class="\w" x="(.+?)" y="(.+?)" width="(.+?)" height="(.+?)"', text)
    spots = re.findall(r'cx="(.+?)" cy="(.+?)"', text)
    assert len(boxes) == 4 and len(spots) == 2
    for x, y, width, height in ([float(value) for value in box] for box in boxes):
        assert 0 <= x <= x + width <= 360 and 0 <= y <= y + height <= 190
    assert all(0 <= float(x) <= 360 and 0 <= float(y) <= 190 for x, y in spots)


def test_a_curve_begins_anew_in_every_round_and_a_line_does_not():
    points = [(0.5, 1.0), (1.0, 2.0), (1.5, 1.0), (2.0, 2.0)]
    assert plot("t", "", [Series("a", "a", "curve", points)], 2).count("<polyline") == 2
    assert plot("t", "", [Series("a", "a", "line", points)], 2).count("<polyline") == 1


def test_series_without_points_are_left_out():
    empty = Series("nothing", "a", "line", [])
    assert plot("t", "", [empty], 3) == ""
    assert "nothing" not in plot("t", "", [empty, Series("a", "a", "dots", [(1, 1.0)])], 3)


def test_names_are_text():
    assert "<b>" not in plot("<b>", "<b>", [Series("<b>", "a", "dots", [(0, 1.0)])], 1)


def test_numbers_too_small_to_be_shown_are_nothing_and_have_no_sign():
    drawn = plot("KL", "", [Series("k", "k", "line", [(0, -1e-5), (1, 2e-5)])], 1, 2)
    assert "-0.00" not in drawn and max(map(len, re.findall(r'class="left"[^>]*>([^<]*)<', drawn))) <= 5


def test_a_scale_begins_at_nothing_where_it_is_to():
    line = [Series("k", "k", "line", [(0, 56.0), (1, 30.0)])]
    lowest = [re.findall(r'class="left"[^>]*>([^<]*)<', plot("t", "", line, 1, from_zero=zero))[0] for zero in (0, 1)]
    assert float(lowest[0]) > 0 and lowest[1] == "0"


def test_the_last_value_of_a_quiet_series_is_not_told():
    loud, quiet = Series("mean", "a", "line", [(1, 2.0)]), Series("each", "b", "dots", [(1, 1.0), (1, 3.0)], quiet=True)
    text = plot("t", "", [quiet, loud], 1)
    assert (
        text.count("<circle") == 3 and re.findall("<strong>(.*?)<", text) == ["2.0"] and 'label="t; mean 2.0"' in text
    )
