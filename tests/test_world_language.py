"""Laws of writing and reading: what is written is read back, and anything can be read."""

from __future__ import annotations

import random
import re
import string

import pytest

from kokanee.errors import KokaneeError
from kokanee.world.annotators import Bias, annotate
from kokanee.world.facts import Event, Fact, close, exact, facts_of, only, prune
from kokanee.world.language import parse, write
from kokanee.world.scene import sample_scene

CIRCLE = ("red", "circle")
WILD = Bias(unheard=0.0, action=0.3, sound=0.2, swapped=0.7, invented=1.0, care=2.0)


def assert_read_back(facts: tuple[Event | Fact, ...], rng: random.Random) -> None:
    caption = write(facts, rng)
    parsed = parse(caption)
    assert set(parsed.facts) == set(facts_of(facts)), caption
    assert not parsed.unparsed, caption


def an_interval(scene, rng: random.Random) -> tuple[Event, ...]:
    start_s = rng.uniform(0.0, scene.duration_s - 0.2)
    return exact(scene, start_s, rng.uniform(start_s + 0.1, scene.duration_s))


@pytest.mark.parametrize("seed", range(4))
def test_everything_written_is_read_back_exactly(seed: int):
    for index in range(250):
        rng, scene = random.Random(f"{seed} {index}"), sample_scene("train", index, seed)
        for events in (exact(scene), an_interval(scene, rng)):
            assert_read_back(events, rng)
            assert_read_back(only(events, "seen"), rng)
            assert_read_back(only(events, "heard"), rng)
            assert_read_back(annotate(events, Bias(), rng), rng)
            assert_read_back(annotate(events, WILD, rng), rng)


def test_any_closed_set_in_any_order_is_read_back():
    for seed in range(500):
        rng = random.Random(seed)
        facts = list(facts_of(exact(sample_scene("train", seed, 5))))
        rng.shuffle(facts)
        some = facts[: rng.randint(0, len(facts))]
        assert_read_back(close(some), rng)
        assert_read_back(prune(some), rng)


def test_reading_ignores_case_spaces_and_the_last_full_stop():
    for seed in range(200):
        caption = write(exact(sample_scene("train", seed, 6)), random.Random(seed))
        read = parse(caption)
        assert parse(caption.upper()) == read
        assert parse("  " + caption.replace(" ", " \t ").replace(".", " . \n")) == read
        assert parse(caption.rstrip(".")) == read


def test_facts_are_read_in_order_of_mention_with_repetitions():
    circle, jumps = Fact("figure", CIRCLE, ""), Fact("action", CIRCLE, "jumps")
    assert parse("A red circle hops. The red circle jumps.").facts == (circle, jumps, circle, jumps)


@pytest.mark.parametrize(
    ("caption", "facts"),
    [
        ("There is a small red circle.", [("figure", CIRCLE, ""), ("size", CIRCLE, "small")]),
        ("The light goes out", [("light", (), "out")]),
        (
            "While the red circle jumps, a low horn sounds once.",
            [
                ("figure", CIRCLE, ""),
                ("action", CIRCLE, "jumps"),
                ("sound", ("horn",), ""),
                ("pitch", ("horn",), "low"),
                ("count", ("horn",), "1"),
                ("sync", ("horn",), "red circle jumps"),
            ],
        ),
        (
            "Then two high knocks are heard.",
            [("sound", ("knock",), ""), ("pitch", ("knock",), "high"), ("count", ("knock",), "2")],
        ),
        ("Someone knocks.", [("sound", ("knock",), "")]),
        ("The background turns brown.", [("background change", (), "brown")]),
        ("Nothing happens.", []),
    ],
)
def test_these_sentences_mean_these_facts(caption: str, facts: list):
    parsed = parse(caption)
    assert set(parsed.facts) == {Fact(*fact) for fact in facts}
    assert not parsed.unparsed


@pytest.mark.parametrize(
    "caption",
    [
        "A bell beats.",
        "A red drum jumps.",
        "While the red circle jumps, the red circle spins.",
        "While a bell rings, a drum beats.",
        "The circle jumps.",
        "A red circle jumps jumps.",
        "The background turns blue.",
        "A dog barks.",
        "There is a red circle and",
        "as as as",
        "Then,",
        "On a grey background,",
    ],
)
def test_what_makes_no_sense_is_set_apart(caption: str):
    parsed = parse(caption)
    assert parsed.facts == ()
    assert len(parsed.unparsed) == 1


def test_every_string_can_be_read():
    vocabulary = sorted(
        {w for i in range(50) for w in write(exact(sample_scene("train", i)), random.Random(i)).split()}
    )
    for seed in range(3000):
        rng = random.Random(seed)
        if seed % 3:
            text = " ".join(rng.choice(vocabulary) for _ in range(rng.randint(0, 40)))
        else:
            text = "".join(rng.choice(string.printable + "éß中\u2028\x00") for _ in range(rng.randint(0, 200)))
        parsed = parse(text)
        assert all(isinstance(fact, Fact) for fact in parsed.facts)
        assert all(re.search(r"\S", sentence) for sentence in parsed.unparsed)
    assert len(parse("a red circle " * 100_000).unparsed) == 1
    assert parse("") == parse(" . \n. ") == parse("Nothing happens")


def test_the_same_random_state_gives_the_same_words_and_others_give_others():
    events = exact(sample_scene("train", 3))
    assert write(events, random.Random(1)) == write(events, random.Random(1))
    assert len({write(events, random.Random(seed)) for seed in range(50)}) >= 45


def test_events_and_their_facts_are_written_alike():
    events = exact(sample_scene("train", 4))
    assert write(events, random.Random(2)) == write(facts_of(events), random.Random(2))


def test_captions_are_short_and_of_few_words():
    lengths, vocabulary = [], set()
    for seed in range(600):
        caption = write(exact(sample_scene("train", seed, 8)), random.Random(seed))
        lengths.append(len(caption.split()))
        vocabulary |= set(re.findall("[a-z]+", caption.lower()))
    assert 25 <= sum(lengths) / len(lengths) <= 50 and max(lengths) <= 90
    assert len(vocabulary) < 140


def test_sets_that_cannot_be_said_are_refused():
    with pytest.raises(KokaneeError, match="cannot be told without"):
        write([Fact("size", CIRCLE, "small")], random.Random(0))
    with pytest.raises(KokaneeError, match="more than one place"):
        write(close(Fact("place", CIRCLE, place) for place in ("top", "left")), random.Random(0))
