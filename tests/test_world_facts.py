"""Laws of the exact facts: what is true of a scene and of stretches of it."""

from __future__ import annotations

import random

import pytest

from kokanee.errors import KokaneeError
from kokanee.world.facts import Fact, close, exact, facts_of, needs, only, prune, statement
from kokanee.world.language import parse
from kokanee.world.scene import Action, Ambient, Figure, Scene, Sound, sample_scene

CIRCLE, STAR = ("red", "circle"), ("blue", "star")
SCENE = Scene(
    8.0,
    "grey",
    (Figure("red", "circle", "small", "top left", 0.0), Figure("blue", "star", "big", "right", 0.0)),
    (
        Action(0, "jumps", "", 0.5, 1.5),
        Action(0, "moves", "right", 2.0, 4.0),
        Action(1, "appears", "", 4.5, 5.5),
        Action(0, "turns", "green", 6.0, 7.0),
        Action(0, "grows", "", 7.0, 8.0),
    ),
    (Sound("bell", "high", 3, 2.0), Sound("drum", "low", 1, 5.5)),
    Ambient("background", "white", 6.5),
)


def facts(start_s: float = 0.0, end_s: float | None = None) -> tuple[Fact, ...]:
    return facts_of(exact(SCENE, start_s, end_s))


def test_a_whole_scene_has_these_facts_in_time_order():
    assert facts() == (
        Fact("background", (), "grey"),
        Fact("figure", CIRCLE, ""),
        Fact("size", CIRCLE, "small"),
        Fact("place", CIRCLE, "top left"),
        Fact("action", CIRCLE, "jumps"),
        Fact("action", CIRCLE, "moves right"),
        Fact("sound", ("bell",), ""),
        Fact("pitch", ("bell",), "high"),
        Fact("count", ("bell",), "3"),
        Fact("sync", ("bell",), "red circle moves right"),
        Fact("figure", STAR, ""),
        Fact("size", STAR, "big"),
        Fact("place", STAR, "right"),
        Fact("action", STAR, "appears"),
        Fact("sound", ("drum",), ""),
        Fact("pitch", ("drum",), "low"),
        Fact("count", ("drum",), "1"),
        Fact("action", CIRCLE, "turns green"),
        Fact("background change", (), "white"),
        Fact("action", CIRCLE, "grows"),
    )


def test_an_interval_starts_from_the_state_at_its_start():
    green = ("green", "circle")
    assert facts(7.0) == (
        Fact("background", (), "white"),
        Fact("figure", green, ""),
        Fact("size", green, "small"),
        Fact("place", green, "top right"),
        Fact("action", green, "grows"),
        Fact("figure", STAR, ""),
        Fact("size", STAR, "big"),
        Fact("place", STAR, "right"),
    )


def test_an_action_cut_in_half_belongs_to_the_first_part_alone():
    moves, turns = Fact("action", CIRCLE, "moves right"), Fact("action", CIRCLE, "turns green")
    assert moves in facts(0.0, 3.0) and moves not in facts(3.0)
    assert moves in facts(2.5) and moves not in facts(0.0, 2.5)
    assert turns in facts(0.0, 6.5) and Fact("figure", ("green", "circle"), "") in facts(6.5)


def test_strokes_are_counted_inside_the_interval():
    assert Fact("count", ("bell",), "2") in facts(0.0, 3.0)
    assert Fact("count", ("bell",), "1") in facts(3.0)
    assert Fact("sound", ("bell",), "") not in facts(3.5)


def test_a_simultaneity_needs_both_starts_inside():
    sync = Fact("sync", ("bell",), "red circle moves right")
    assert sync in facts(2.0, 3.5)
    assert sync not in facts(0.0, 2.5)
    assert sync not in facts(2.5)


def test_a_figure_is_seen_only_where_it_has_appeared_and_not_disappeared():
    assert Fact("figure", STAR, "") not in facts(0.0, 4.5)
    assert Fact("figure", STAR, "") in facts(0.0, 5.0)
    gone = Scene(4.0, "grey", SCENE.figures[:1], (Action(0, "disappears", "", 1.0, 2.0),), (), None)
    assert Fact("figure", CIRCLE, "") in facts_of(exact(gone, 1.0, 4.0))
    assert len(exact(gone, 1.5, 4.0)) == 1


def test_a_change_at_the_start_of_an_interval_has_been_made():
    assert Fact("background", (), "white") in facts(6.5)
    assert Fact("background change", (), "white") not in facts(6.5)


def test_an_interval_outside_the_scene_is_refused():
    for start_s, end_s in ((3.0, 3.0), (4.0, 2.0), (-1.0, 2.0), (0.0, 9.0), (float("nan"), 2.0)):
        with pytest.raises(KokaneeError, match="interval"):
            exact(SCENE, start_s, end_s)


@pytest.mark.parametrize("whole", [True, False])
def test_facts_are_closed_distinct_and_inside_their_interval_in_time_order(whole: bool):
    for seed in range(400):
        rng, scene = random.Random(seed), sample_scene("train", seed, 1)
        start_s = 0.0 if whole else rng.uniform(0.0, scene.duration_s - 0.1)
        end_s = scene.duration_s if whole else rng.uniform(start_s + 0.1, scene.duration_s)
        events = exact(scene, start_s, end_s)
        told = facts_of(events)
        assert prune(told) == told and len(set(told)) == len(told)
        assert set(close(told)) == set(told)
        assert all(start_s <= event.start_s <= event.end_s <= end_s for event in events)
        assert [event.start_s for event in events] == sorted(event.start_s for event in events)


def test_every_fact_of_a_scene_is_in_one_of_two_halves_or_follows_from_the_first():
    for seed in range(300):
        scene = sample_scene("train", seed, 2)
        middle_s = random.Random(seed).randrange(2, round(scene.duration_s * 2) - 1) / 2
        first, second = exact(scene, 0.0, middle_s), exact(scene, middle_s)
        acts = [sum(event.fact.kind == "action" for event in events) for events in (exact(scene), first, second)]
        assert acts[0] == acts[1] + acts[2]
        strokes = [
            sum(int(event.fact.value) for event in events if event.fact.kind == "count")
            for events in (exact(scene), first, second)
        ]
        assert strokes[0] == strokes[1] + strokes[2]


def test_a_statement_says_its_fact_and_what_that_needs_and_nothing_else():
    for seed in range(200):
        for event in exact(sample_scene("train", seed, 3)):
            parsed = parse(event.text)
            assert event.text == statement(event.fact)
            assert set(parsed.facts) == {event.fact, *needs(event.fact)} and not parsed.unparsed


def test_eyes_and_ears_alone_tell_closed_parts_that_share_nothing():
    for seed in range(200):
        events = exact(sample_scene("train", seed, 4))
        seen, heard = only(events, "seen"), only(events, "heard")
        assert only(events, "both") == events
        assert not set(seen) & set(heard)
        for part in (facts_of(seen), facts_of(heard)):
            assert prune(part) == part


def test_prune_drops_a_simultaneity_with_its_action():
    told = facts()
    without = prune(fact for fact in told if fact != Fact("action", CIRCLE, "moves right"))
    assert set(told) - set(without) == {
        Fact("action", CIRCLE, "moves right"),
        Fact("sync", ("bell",), "red circle moves right"),
    }
