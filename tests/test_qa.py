"""Laws of answering: packed options are as separate passes, batches and the options' order change nothing, and shares
have intervals over files."""

from __future__ import annotations

import random
import shutil
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from unittest import mock

import pytest
import torch

from kokanee.captioner import Captioner
from kokanee.captions import Decoding
from kokanee.endpoint import Endpoint
from kokanee.errors import KokaneeError, memory_said
from kokanee.exam import answers
from kokanee.prompt import IGNORED, Turn
from kokanee.qa import (
    LESS,
    Answered,
    Marked,
    ModelExaminee,
    ServedExaminee,
    accuracy,
    after_thought,
    askable,
    beside,
    default_way,
    examined,
    groups,
)
from kokanee.questions import SENTENCE, Question, Video, by_video, lettered, number_of
from kokanee.remote import FrameSettings, RemoteCaptioner
from kokanee.views import watch
from model_server import serving, status

FILES = ("first.mp4", "sound.wav", "silent.mp4")
OPTIONS = ("a dog", "a very large brown dog", "nobody")
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def asked(files=FILES) -> list[Question]:
    """Two questions about each file, with three options and with two."""
    return [
        Question(file, text, options[0], kind, options)
        for file in files
        for text, kind, options in (("What barks?", "who", OPTIONS), ("Is it loud?", "how", ("yes", "no")))
    ]


def separate(model, processor, view, prompt: str, answer: str) -> torch.Tensor:
    """The log-probabilities of an answer's label tokens, from a pass of its own."""
    sample = processor.prepare_ids([Turn("user", prompt), Turn("assistant", answer)], [view.block])
    batch = {"input_ids": sample["input_ids"][None], "position_ids": sample["position_ids"][:, None]}
    log_p = model(**batch, **view.media).logits[0, :-1].log_softmax(-1)
    targets = sample["labels"][1:]
    told = targets != IGNORED
    return log_p[told].gather(1, targets[told][:, None])[:, 0]


@torch.no_grad()
def test_packed_options_are_as_separate_passes(tiny, media):
    model, processor = tiny
    for way in ("text", "letter"):
        for answered in examined(model, processor, asked(), media, way, batch_size=4):
            view = watch(model, processor, answered.video.path)
            for one in answered.answers:
                question = one.question
                if way == "text":  # all but the newline after the end token, which is never generated
                    apart = [
                        separate(model, processor, view, question.question, o)[:-1].sum() for o in question.options
                    ]
                else:
                    letters = "ABC"[: len(question.options)]
                    apart = [separate(model, processor, view, lettered(question), letter)[0] for letter in letters]
                assert torch.allclose(torch.tensor(one.log_probs), torch.stack(apart), **CLOSE)
                best = question.options[int(torch.stack(apart).argmax())]
                assert one.said == best and one.right == (best == question.answer)


@torch.no_grad()
def test_an_options_log_probability_is_that_of_generating_it(tiny, media):
    """Token by token with the end, as `generation.steps` would go; nothing of what follows the end."""
    model, processor = tiny
    (answered,) = examined(model, processor, asked(["first.mp4"])[:1], media, "text")
    view = watch(model, processor, media / "first.mp4")
    prompt = processor.prepare_ids([Turn("user", "What barks?")], [view.block])
    end = model.config.eos_token_id
    for option, log_prob in zip(OPTIONS, answered.answers[0].log_probs, strict=True):
        sample = processor.with_answer(prompt, option)
        batch = {"input_ids": sample["input_ids"][None], "position_ids": sample["position_ids"][:, None]}
        log_p = model(**batch, **view.media).logits[0].log_softmax(-1)
        start, ids = len(prompt["input_ids"]), sample["input_ids"].tolist()
        stop = start + ids[start:].index(end) + 1
        assert sum(float(log_p[at - 1, ids[at]]) for at in range(start, stop)) == pytest.approx(log_prob, abs=1e-4)


def test_the_letters_are_those_of_the_options_and_only_their_first_token_counts(tiny, media):
    question = asked()[0]
    assert lettered(question) == f"What barks?\nA. a dog\nB. a very large brown dog\nC. nobody\n{SENTENCE}"
    model, processor = tiny
    view = watch(model, processor, media / "first.mp4")
    ((_, sample),) = ModelExaminee(model, processor, "letter").packed([(view, question)])
    assert processor.tokenizer.decode(sample["labels"][sample["labels"] != IGNORED]) == "ABC"


def test_a_video_is_computed_once_for_all_its_questions_where_that_is_less(tiny, media):
    """Of five seconds it is, but not of a still image, which is shorter than what is asked about it."""
    model, processor = tiny
    view, examinee = watch(model, processor, media / "first.mp4"), ModelExaminee(model, processor, "text")
    ((_, packed),) = examinee.packed([(view, question) for question in asked()[:2]])
    media_ids = torch.tensor([model.config.video_token_id, model.config.audio_token_id])
    shown = int(torch.isin(packed["input_ids"], media_ids).sum())
    assert shown == sum(len(states) for states in view.media.values()) and int(packed["segments"].max()) == 5
    computed = []
    hook = model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: computed.append(len(kwargs["inputs_embeds"])), with_kwargs=True
    )
    list(examinee.each(by_video(asked(("first.mp4", "still.png")), media)))
    hook.remove()
    assert computed == [1 + 2]


def test_answers_are_those_of_the_exam(tiny, media):
    model, processor = tiny
    views = [watch(model, processor, media / file) for file in FILES for _ in range(2)]
    pairs = [(view, question.question) for view, question in zip(views, asked(), strict=True)]
    said = answers(model, processor, pairs, Decoding(max_new_tokens=16))
    assert [one.said for found in examined(*tiny, asked(), media) for one in found.answers] == said
    told = [
        replace(question, answer=f" {text.upper()} ", options=()) for question, text in zip(asked(), said, strict=True)
    ]
    assert all(
        one.right for found in ModelExaminee(*tiny, "answer").each(by_video(told, media)) for one in found.answers
    )


@pytest.mark.parametrize("way", ["answer", "text", "letter"])
def test_the_batch_size_changes_nothing(tiny, media, way):
    one, four = (examined(*tiny, asked(), media, way, batch_size=size) for size in (1, 4))
    assert [found.video for found in one] == [found.video for found in four]
    for a, b in zip([m for f in one for m in f.answers], [m for f in four for m in f.answers], strict=True):
        assert (a.question, a.said, a.right) == (b.question, b.said, b.right)
        assert a.log_probs == pytest.approx(b.log_probs, abs=1e-4)


def test_the_order_of_the_options_changes_nothing_by_text(tiny, media):
    turned = [replace(question, options=question.options[::-1]) for question in asked()]
    for before, after in zip(*(examined(*tiny, some, media, "text") for some in (asked(), turned)), strict=True):
        assert [one.said for one in before.answers] == [one.said for one in after.answers]
        for a, b in zip(before.answers, after.answers, strict=True):
            assert a.log_probs == pytest.approx(b.log_probs[::-1], abs=1e-4)


def test_dropout_and_gradients_are_off(tiny_model, tiny_processor, media):
    found = [examined(tiny_model.train(), tiny_processor, asked(), media, "text") for _ in range(2)]
    assert found[0] == found[1] and all(parameter.grad is None for parameter in tiny_model.parameters())


def test_a_video_that_cannot_be_read_stops_nothing(tiny, media, tmp_path):
    for name in ("first.mp4", "sound.wav"):
        (tmp_path / name).write_bytes((media / name).read_bytes())
    (tmp_path / "silent.mp4").write_text("no video")
    found = examined(*tiny, asked((*FILES, "none.mp4")), tmp_path, "text", batch_size=3)
    assert [bool(one.error) for one in found] == [False, False, True, True]
    marks = accuracy(found)
    assert marks.overall.asked == 4 and marks.lost == 4 and list(marks.unread) == ["silent.mp4", "none.mp4"]


def test_scores_that_are_no_numbers_end_it(tiny_model, tiny_processor, media):
    with torch.no_grad():
        tiny_model.lm_head.weight.fill_(float("nan"))
    with pytest.raises(KokaneeError, match="not finite"):
        examined(tiny_model, tiny_processor, asked(), media, "text")


def test_only_questions_with_options_are_asked_where_one_is_chosen():
    opened = Question("first.mp4", "What?", "a dog")
    mixed = [Video("first.mp4", Path("first.mp4"), (asked()[0], opened)), Video("b.mp4", Path("b.mp4"), (opened,))]
    assert askable(mixed, "answer") == mixed
    assert askable(mixed, "text") == [replace(mixed[0], questions=(asked()[0],))]
    with pytest.raises(KokaneeError, match="No question has options"):
        askable(mixed[1:], "letter")
    many = replace(opened, options=tuple(f"dog {number}" for number in range(27)))
    assert askable([replace(mixed[1], questions=(many,))], "text")
    with pytest.raises(KokaneeError, match="26 letters"):
        askable([replace(mixed[1], questions=(many,))], "letter")


def test_the_way_follows_from_the_questions(tmp_path):
    (tmp_path / "q.json").write_text('[{"file": "0.mp4"}]')
    (tmp_path / "samples.jsonl").write_text('{"scene": {}}\n')
    opened = replace(asked()[0], options=())
    assert default_way(tmp_path / "q.json", asked()) == "letter"
    assert default_way(tmp_path / "q.json", [*asked(), opened]) == default_way(tmp_path, asked()) == "answer"


def test_groups_hold_all_videos_in_their_order():
    rng = random.Random(0)
    for size in (1, 3, 8):
        videos = [Video(f"{n}", Path(f"{n}"), (asked()[0],) * rng.randint(1, 5)) for n in range(20)]
        made = list(groups(videos, size))
        assert [video for group in made for video in group] == videos
        assert all(number_of(group) <= size or len(group) == 1 for group in made)
        assert all(number_of([*group, after[0]]) > size for group, after in pairwise(made)), "none could be larger"


def marked(rights: dict[str, list[bool]], kinds=("a", "b"), options=("x", "y")) -> list[Answered]:
    """Videos with answers of which it is known whether they are right; kinds take turns."""
    found = []
    for file, some in rights.items():
        questions = [Question(file, f"{n}?", "x", kinds[n % len(kinds)], options) for n in range(len(some))]
        video = Video(file, Path(file), tuple(questions))
        found.append(Answered(video, tuple(Marked(q, "x", r) for q, r in zip(questions, some, strict=True))))
    return found


def test_accuracy_is_worked_out_by_hand():
    found = accuracy(marked({"0": [True, False, True], "1": [False], "2": [True, True]}))
    assert (found.overall.right, found.overall.asked, found.overall.files) == (4, 6, 3)
    assert found.overall.percent == pytest.approx(100 * 4 / 6) and found.overall.chance == 50.0
    assert {kind: (share.right, share.asked, share.files) for kind, share in found.kinds.items()} == {
        "a": (3, 4, 3),
        "b": (1, 2, 2),
    }
    assert accuracy(marked({"0": [True]}, options=())).overall.chance is None
    mixed = [*marked({"0": [True]}), *marked({"1": [True]}, options=("w", "x", "y", "z"))]
    assert accuracy(mixed).overall.chance == pytest.approx(37.5)
    assert accuracy(marked({"0": [True]}, kinds=("",))).kinds == {} and set(
        accuracy(marked({"0": [True, True]}, kinds=("", "a"))).kinds
    ) == {"other", "a"}


def test_intervals_hold_the_accuracy_and_are_over_files():
    rng = random.Random(1)
    for _ in range(20):
        rights = {f"{n}": [rng.random() < 0.7 for _ in range(rng.randint(1, 6))] for n in range(rng.randint(2, 40))}
        answered = marked(rights)
        found = accuracy(answered)
        for share in (found.overall, *found.kinds.values()):
            assert share.interval[0] <= share.percent <= share.interval[1]
        rng.shuffle(answered)
        assert accuracy(answered) == found
    all_right, all_wrong = (accuracy(marked({f"{n}": [good] * 2 for n in range(20)})).overall for good in (True, False))
    assert all_right.interval == (pytest.approx(83.157, abs=1e-3), 100.0), "0.025 of 20 files, each right by 0.83157"
    assert all_wrong.interval == (0.0, pytest.approx(100 - all_right.interval[0]))
    one = accuracy(marked({"0": [True, False, False, True]})).overall
    assert one.files == 1 and one.interval == (one.percent, one.percent) == (50.0, 50.0)
    alike = {
        f"{n}": [n % 2 == 0] * 6 for n in range(40)
    }  # questions of a file fall together: no more than 40 are known
    apart = {f"{n}": [n % 2 == 0] for n in range(40)}
    assert accuracy(marked(alike)).overall.interval == accuracy(marked(apart)).overall.interval


def answered_by(rights: dict[str, str], error: str = "") -> list[Answered]:
    """Files with a question for each letter, answered rightly where it is a capital one; kinds by its place."""
    made = []
    for file, letters in rights.items():
        marked = [
            Marked(Question(file, f"{place}?", "yes", "even" if place % 2 == 0 else "odd"), "", letter.isupper())
            for place, letter in enumerate(letters)
        ]
        made.append(Answered(Video(file, Path(file), tuple(one.question for one in marked)), tuple(marked), error))
    return made


def test_a_lead_is_of_the_questions_that_both_answered():
    ours, other = answered_by({"a": "XX", "b": "Xx", "c": "xx"}), answered_by({"b": "xX", "a": "xX", "d": "XX"})
    found = beside(ours, other)
    assert {name: (lead.more, lead.asked, lead.files) for name, lead in found.items()} == {
        "even": (100.0, 2, 2),  # of a and b, two of two rightly and none
        "odd": (-50.0, 2, 2),
        "overall": (25.0, 4, 2),
    }
    back = beside(other, ours)
    for name, lead in found.items():
        assert back[name].more == -lead.more and back[name].interval == pytest.approx([-x for x in lead.interval[::-1]])
        assert lead.interval[0] <= lead.more <= lead.interval[1]
    assert list(beside(ours[::-1], other).items()) == list(found.items()) and beside(ours, []) == {}


def test_a_file_that_its_questions_call_by_two_names_is_one_file_of_a_lead():
    ours, other = answered_by({"a": "XX", "b": "Xx"}), answered_by({"a": "xX", "b": "xX"})
    some = ours[0].answers
    second = replace(some[1], question=replace(some[1].question, file="a.mp4"))
    renamed = [replace(ours[0], answers=(some[0], second)), ours[1]]
    assert beside(renamed, other) == beside(ours, other) and beside(ours, other)["overall"].asked == 4


def test_a_lead_is_known_better_than_either_share():
    """Of files that are hard for both: shares vary from file to file, the difference does not."""
    drawn = random.Random(0)
    hard = {str(number): drawn.choice(["xxxxx", "XXXXX"]) for number in range(40)}
    ours, other = (
        answered_by({file: f"{letters}X" for file, letters in hard.items()}),
        answered_by({file: f"{letters}x" for file, letters in hard.items()}),
    )
    lead, (low, high) = beside(ours, other)["overall"], accuracy(ours).overall.interval
    assert (
        lead.more == pytest.approx(100 / 6) and lead.interval == pytest.approx((100 / 6, 100 / 6)) and high - low > 10
    )


def test_nothing_answered_is_no_accuracy():
    lost = [Answered(video, (), "damaged") for video in by_video_of(asked())]
    found = accuracy(lost)
    assert found.overall.asked == 0 and found.kinds == {} and found.lost == 6 and set(found.unread) == set(FILES)


def by_video_of(questions: list[Question]) -> list[Video]:
    return [
        Video(f, Path(f), tuple(q for q in questions if q.file == f)) for f in dict.fromkeys(q.file for q in questions)
    ]


def test_names_are_found_as_everywhere(media):
    assert [video.path.name for video in by_video([Question("first", "What?", "x")], media)] == ["first.mp4"]


def last_text(request) -> str:
    """What a server was asked, after all that it was shown."""
    return request["messages"][0]["content"][-1]["text"]


def served(url: str, way="letter", batch_size=1) -> ServedExaminee:
    endpoint = Endpoint("m", url, wait_s=0.01, attempts=2)
    return ServedExaminee(RemoteCaptioner(endpoint, FrameSettings(max_frames=2)), way, batch_size)


def test_a_server_is_asked_the_same_words_and_what_it_says_is_marked(media):
    replies = {"What barks?": "(a) A dog.", "Is it loud?": "B"}  # right, by its letter and text; wrong
    for way, size in (("letter", 1), ("letter", 4), ("answer", 1)):
        with serving(lambda request: replies[last_text(request).split("\n")[0]]) as (server, url):
            found = {one.video.file: one for one in served(url, way, size).each(by_video(asked(), media))}
        assert [[one.right for one in found[file].answers] for file in FILES] == [[True, False]] * 3
        assert [one.said for one in found["first.mp4"].answers] == list(replies.values())
        words = [lettered(question) if way == "letter" else question.question for question in asked()]
        assert sorted(map(last_text, server.requests)) == sorted(words)
        assert all(one.log_probs == () for answered in found.values() for one in answered.answers)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("**B**", "B"),
        ("<think>\nA? No, it is (B).\n</think>\n\n(B)", "(B)"),
        ("Answer: B. a dog", "B. a dog"),
        ("**The correct answer is:** B", "B"),
        ("the final answer is `b`", "b"),
        ("an answer to B", "an answer to B"),
        ("A dog barks, the answer is B", "A dog barks, the answer is B"),
        ("answer", "answer"),
        ("", ""),
    ],
)
def test_what_a_server_says_is_read_after_its_thoughts_and_announcements(text, said):
    assert after_thought(text) == said


def no_memory(*words, **more):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB. GPU 0 is full.")


def test_a_video_too_large_for_the_memory_stops_no_other(tiny, media, monkeypatch):
    """Questions that do not fit together are asked one by one, and one that does not fit is told with the remedy."""
    examinee, videos = ModelExaminee(*tiny, "text", 4), by_video(asked(), media)
    whole, log_probs, encode = list(examinee.each(videos)), ModelExaminee.log_probs, tiny[0].encode_media

    def few(self, some):
        return no_memory() if len(some) > 1 else log_probs(self, some)

    monkeypatch.setattr(ModelExaminee, "log_probs", memory_said(LESS)(few))
    found = list(examinee.each(videos))
    assert [[one.right for one in answered.answers] for answered in found] == [
        [one.right for one in answered.answers] for answered in whole
    ]
    monkeypatch.setattr(tiny[0], "encode_media", lambda **media: encode(**media) if len(media) < 3 else no_memory())
    found = list(examinee.each(videos))
    assert [bool(one.error) for one in found] == [True, False, False], "only the first has pictures and sound"
    assert "too little memory" in found[0].error and "max_frames" in found[0].error


def test_a_still_image_is_shown_as_one(tiny, media):
    captioner = Captioner(*tiny)
    view = watch(*tiny, media / "still.png")
    assert view.block.kind == "image" and set(view.media) == {"image_embeds"}
    said = answers(*tiny, [(view, "What is it?")], Decoding(max_new_tokens=5))
    assert said == [captioner.caption(media / "still.png", "What is it?", max_new_tokens=5).text]
    with pytest.raises(KokaneeError, match="still image and has no intervals"):
        watch(*tiny, media / "still.png", 0.0, 1.0)


@pytest.mark.parametrize("size", [1, 4])
def test_a_video_is_read_once_for_all_its_questions_to_a_server_and_again_when_it_changed(media, tmp_path, size):
    shutil.copy(media / "first.mp4", tmp_path / "a.mp4")
    (tmp_path / "b.mp4").write_text("no video")
    read, alone = [], RemoteCaptioner.read_alone
    with (
        serving(lambda request: "A") as (_, url),
        mock.patch.object(
            RemoteCaptioner,
            "read_alone",
            lambda self, request: (read.append(request.path.name), alone(self, request))[1],
        ),
    ):
        examinee = served(url, "letter", size)
        found = {one.video.file: one for one in examinee.each(by_video(asked(["a.mp4", "b.mp4"]), tmp_path))}
        assert read.count("a.mp4") == 1 and "b.mp4" in found["b.mp4"].error and len(found["a.mp4"].answers) == 2
        shutil.copy(media / "second.mp4", tmp_path / "b.mp4")
        (found_b,) = examinee.each(by_video(asked(["b.mp4"]), tmp_path))
    assert len(found_b.answers) == 2 and not found_b.error


def test_equal_questions_are_asked_once_and_all_marked(media):
    question = asked(["silent.mp4"])[0]
    with serving(lambda request: "a dog") as (server, url):
        (found,) = served(url, "answer").each(by_video([question, question, replace(question, kind="other")], media))
    assert [one.right for one in found.answers] == [True] * 3 and len(server.requests) == 1


def test_a_video_with_a_question_that_has_no_answer_has_none(media, tmp_path):
    (tmp_path / "broken.mp4").write_text("no video")
    files = [*(str(media / file) for file in FILES), "broken.mp4"]
    with serving(lambda request: "A") as (server, url):
        server.trouble = [status(200), status(400)]  # the first question gets nothing of use, then is refused
        found = list(served(url).each(by_video(asked(files), tmp_path)))
    assert [bool(one.error) for one in found] == [True, False, False, True]
    assert "refuses a question" in found[0].error and "broken.mp4" in found[3].error
    assert accuracy(found).lost == 4 and accuracy(found).overall.right == 4


def test_a_server_is_not_asked_for_log_probabilities():
    with pytest.raises(KokaneeError, match="does not tell how likely options are"):
        served("http://localhost:1", "text")
