"""Laws of the questions: one exact answer each, both answers of a yes/no question equally likely, few words."""

from __future__ import annotations

import random
import re
from collections import Counter, defaultdict

import pytest

from kokanee.errors import KokaneeError
from kokanee.world.facts import exact
from kokanee.world.language import write
from kokanee.world.questions import CAPTION_PROMPTS, KINDS, YES_NO, Question, ask
from kokanee.world.scene import Action, Figure, Scene, Sound, sample_scene

SCENE = Scene(
    6.0,
    "grey",
    (Figure("red", "circle", "small", "top left", 0.0), Figure("blue", "star", "big", "right", 0.0)),
    (Action(0, "moves", "right", 1.0, 3.0), Action(1, "jumps", "", 4.0, 5.0)),
    (Sound("bell", "high", 2, 1.0), Sound("drum", "low", 1, 5.5)),
    None,
)


def an_interval(scene, rng: random.Random) -> tuple[float, float]:
    start_s = rng.choice((0.0, rng.uniform(0.0, scene.duration_s - 0.5)))
    return start_s, rng.uniform(start_s + 0.3, scene.duration_s)


def all_questions(scene: Scene, *interval: float) -> dict[str, Question]:
    found = {}
    for seed in range(60):
        found.update({q.text: q for q in ask(scene, random.Random(seed), 20, *interval)})
    return found


def test_these_questions_have_these_answers():
    found = {text: question.answer for text, question in all_questions(SCENE).items()}
    assert (
        found.items()
        >= {
            "What colour is the circle?": "red",
            "What is blue?": "star",
            "How many figures are there?": "two",
            "How many different sounds can be heard?": "two",
            "Is the blue star small or big?": "big",
            "Where is the red circle at first?": "top left",
            "What does the blue star do?": "jumps",
            "What jumps?": "blue star",
            "Which way does the red circle move?": "right",
            "What sound is heard first?": "bell",
            "How many times is the bell heard?": "twice",
            "Is the drum low or high?": "low",
            "What sound is heard when the red circle moves right?": "bell",
            "What happens just as the bell sounds?": "red circle moves right",
            "What colour is the background?": "grey",
            "Is the drum heard just as the blue star jumps?": "no",
            "Is it true that the blue star moves right?": "no",
        }.items()
    )


def test_nothing_is_asked_about_what_the_interval_cuts():
    for text in all_questions(SCENE, 0.0, 1.5):
        assert not re.search("circle.*(do|move|size|Where|place|small)", text) and "bell" not in text
    assert "What sound is heard?" not in all_questions(SCENE, 1.25, 6.0)


def test_the_answer_to_a_question_is_the_same_whoever_asks():
    for seed in range(150):
        rng, scene = random.Random(seed), sample_scene("train", seed)
        interval = an_interval(scene, rng)
        for stretch in ((), interval):
            answers = defaultdict(set)
            for _ in range(10):
                for question in ask(scene, rng, 12, *stretch):
                    answers[question.text].add(question.answer)
            assert all(len(given) == 1 for given in answers.values())


def test_answers_are_short_and_among_the_options():
    for seed in range(300):
        rng, scene = random.Random(seed), sample_scene("train", seed)
        for question in (*ask(scene, rng, 30), *ask(scene, rng, 30, *an_interval(scene, rng))):
            assert 1 <= len(question.answer.split()) <= 4
            assert question.answer in question.options or (question.kind == "sync" and not question.options)
            assert len(set(question.options)) == len(question.options)


def test_every_kind_is_asked_and_yes_is_as_likely_as_no():
    kinds, answers = Counter(), Counter()
    for seed in range(2500):
        for question in ask(sample_scene("train", seed), random.Random(seed), 6):
            kinds[question.kind] += 1
            if question.options == YES_NO:
                answers[question.text.split()[0], question.answer] += 1
    assert set(kinds) == set(KINDS)
    assert min(kinds.values()) > 0.02 * kinds.total()
    assert abs(sum(n for (_, answer), n in answers.items() if answer == "yes") / answers.total() - 0.5) < 0.03


def test_the_wording_of_a_yes_no_question_does_not_give_its_answer_away():
    answers = defaultdict(Counter)
    for seed in range(2500):
        for question in ask(sample_scene("train", seed), random.Random(seed), 6):
            if question.options == YES_NO:
                opening = "action" if "true" in question.text else "sound" if "heard" in question.text else "figure"
                answers[opening, question.kind][question.answer] += 1
    for counts in answers.values():
        assert abs(counts["yes"] / counts.total() - 0.5) < 4 * 0.5 / counts.total() ** 0.5


def test_questions_differ_and_come_in_the_number_asked_for():
    for seed in range(200):
        scene = sample_scene("train", seed)
        for n in (0, 1, 5):
            questions = ask(scene, random.Random(seed), n)
            assert len(questions) == len({question.text for question in questions}) == n
        five = ask(scene, random.Random(seed), 5)
        assert len({question.kind for question in five}) == 5
        assert five == ask(scene, random.Random(seed), 5)
    assert len(ask(SCENE, random.Random(0), 10_000)) < 200


def test_a_negative_number_of_questions_is_refused():
    with pytest.raises(KokaneeError, match="-1 questions"):
        ask(SCENE, random.Random(0), -1)


def test_captions_questions_and_prompts_share_a_small_vocabulary():
    texts = [prompt for prompts in CAPTION_PROMPTS.values() for prompt in prompts]
    for seed in range(600):
        rng, scene = random.Random(seed), sample_scene("train", seed)
        texts += [write(exact(scene), rng), *(f"{q.text} {q.answer}" for q in ask(scene, rng, 8))]
    assert len(set(re.findall("[a-z]+", " ".join(texts).lower()))) < 180


def test_prompts_differ_and_name_each_sense():
    assert set(CAPTION_PROMPTS) == {"both", "seen", "heard"}
    prompts = [prompt for some in CAPTION_PROMPTS.values() for prompt in some]
    assert len(set(prompts)) == len(prompts)
