"""Laws of the annotators: how much they miss, what they prefer to tell, and that they stay within what can be said."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace

import pytest

from kokanee.errors import KokaneeError
from kokanee.events import rates
from kokanee.world.annotators import Bias, annotate
from kokanee.world.facts import exact, facts_of, prune
from kokanee.world.language import write
from kokanee.world.scene import sample_scene
from kokanee.world.score import judge

PERFECT = Bias(*[0.0] * 15)


def recall(verdicts, scenes, kind: str) -> float:
    told = sum(fact.kind == kind for verdict in verdicts for fact in verdict.told)
    return told / sum(event.fact.kind == kind for scene in scenes for event in exact(scene))


def test_without_bias_an_annotator_tells_the_truth():
    for seed in range(200):
        scene = sample_scene("train", seed)
        assert annotate(scene, PERFECT, random.Random(seed)) == facts_of(exact(scene))


def test_the_usual_annotators_miss_a_third_and_half_of_the_sounds():
    scenes = [sample_scene("train", index) for index in range(1000)]
    verdicts = []
    for index, scene in enumerate(scenes):
        rng = random.Random(index)
        verdicts.append(judge(exact(scene), write(annotate(scene, Bias(), rng), rng)))
    found = rates(verdict.counts for verdict in verdicts)
    assert 31.0 < found.missed < 36.0
    assert 3.0 < found.hall < 5.0
    assert 0.45 < recall(verdicts, scenes, "sound") < 0.55
    assert 0.82 < recall(verdicts, scenes, "action") < 0.90


def test_what_is_told_can_always_be_said():
    for seed in range(300):
        rng = random.Random(seed)
        bias = Bias(*[rng.random() for _ in range(13)], salience=rng.random() * 3, care=rng.random() * 3)
        told = annotate(sample_scene("train", seed), bias, rng)
        assert prune(told) == told and len(set(told)) == len(told)


def test_certain_omissions_leave_nothing_out_of_place():
    for seed in range(100):
        scene, rng = sample_scene("train", seed), random.Random(seed)
        assert not any(
            fact.kind in ("sound", "pitch", "count", "sync")
            for fact in annotate(scene, replace(PERFECT, unheard=1.0), rng)
        )
        alone = annotate(scene, replace(PERFECT, figure=1.0), rng)
        assert not {"figure", "size", "place", "action", "sync"} & {fact.kind for fact in alone}


def test_a_swap_changes_values_but_never_how_much_is_told():
    for seed in range(300):
        scene = sample_scene("train", seed)
        told = annotate(scene, replace(PERFECT, swapped=1.0), random.Random(seed))
        assert Counter(f.kind for f in told) == Counter(e.fact.kind for e in exact(scene))
        verdict = judge(exact(scene), write(told, random.Random(seed)))
        if len(scene.figures) > 1:  # two figures with new names may pass for one another
            continue
        assert verdict.incorrect and not verdict.missed and not verdict.hallucinated


def test_an_invention_adds_only_what_never_happened():
    added = 0
    for seed in range(200):
        truth = facts_of(exact(sample_scene("train", seed)))
        told = annotate(sample_scene("train", seed), replace(PERFECT, invented=1.0), random.Random(seed))
        assert set(truth) <= set(told) and len(told) - len(truth) <= 3
        assert [fact for fact in told if fact in set(truth)] == list(truth)
        added += len(told) > len(truth)
    assert added > 180


def test_what_stands_out_less_is_passed_over_more():
    told, there = Counter(), Counter()
    for seed in range(1500):
        scene = sample_scene("train", seed)
        facts = set(annotate(scene, replace(PERFECT, sound=0.4, salience=1.0), random.Random(seed)))
        for sound in scene.sounds:
            there[sound.count] += 1
            told[sound.count] += any(fact.kind == "sound" and fact.subject == (sound.kind,) for fact in facts)
    assert told[1] / there[1] < told[2] / there[2] < told[3] / there[3]


def test_the_same_random_state_gives_the_same_facts():
    scene = sample_scene("train", 5)
    assert annotate(scene, Bias(), random.Random(1)) == annotate(scene, Bias(), random.Random(1))
    assert len({annotate(scene, Bias(), random.Random(seed)) for seed in range(50)}) > 10


def test_a_probability_outside_0_to_1_is_refused():
    with pytest.raises(KokaneeError, match=r"Bias\.swapped is 1\.5"):
        Bias(swapped=1.5)
    with pytest.raises(KokaneeError, match=r"Bias\.care"):
        Bias(care=-0.1)
