"""Laws of questions: one question in many spellings is one question, and what is none is told with its place."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kokanee.errors import KokaneeError
from kokanee.formats import append_jsonl
from kokanee.questions import (
    Question,
    by_video,
    in_words,
    is_right,
    lettered,
    number_with_times,
    of_world,
    plain,
    read_questions,
)
from kokanee.world.make import MakeSettings, record
from kokanee.world.scene import sample_scene

BARKS = Question("0.mp4", "What barks?", "a dog", "animals", ("a cat", "a dog", "Bob"))
TEXTS = ["a cat", "a dog", "Bob"]


def written(path: Path, entries: object) -> Path:
    if path.suffix == ".json":
        path.write_text(json.dumps(entries))
    else:
        path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return path


def entry(**more) -> dict:
    return {"file": "0.mp4", "question": "What barks?", "answer": "a dog", "kind": "animals", **more}


def test_the_worlds_questions_are_read_from_its_folder_or_its_file(tmp_path):
    samples = [record(sample_scene("test", i), i, MakeSettings(0, "test"), f"{i:05d}.mp4") for i in range(4)]
    append_jsonl(tmp_path / "samples.jsonl", samples)
    found = read_questions(tmp_path)
    assert found == read_questions(tmp_path / "samples.jsonl") and of_world(tmp_path)
    wanted = [
        (s["file"], q["question"], q["answer"], q["kind"], tuple(q["options"])) for s in samples for q in s["questions"]
    ]
    assert [(q.file, q.question, q.answer, q.kind, q.options) for q in found] == wanted
    assert not of_world(written(tmp_path / "own.json", [entry()]))


@pytest.mark.parametrize("answer", ["a dog", "A dog.", "B", "b", "(B)", "B.", "B)", "B. a dog", "(b) A DOG", 1, "1"])
@pytest.mark.parametrize(
    "options",
    [
        TEXTS,
        ["A. a cat", "B. a dog", "C. Bob"],
        ["(A) a cat", "(B) a dog", "(C) Bob"],
        ["A) a cat", "B) a dog", "C) Bob"],
        ["[A] a cat", "[B] a dog", "[C] Bob"],
        ["A - a cat", "B - a dog", "C - Bob"],
        ["A、a cat", "B、a dog", "C、Bob"],
        {"A": "a cat", "B": "a dog", "C": "Bob"},
        {"c": "Bob", "a": "a cat", "b": "a dog"},
    ],
)
def test_a_letter_a_text_and_a_number_are_the_same_answer(tmp_path, options, answer):
    path = written(tmp_path / "q.json", [entry(options=options, answer=answer)])
    assert read_questions(path) == [BARKS]


@pytest.mark.parametrize(
    "found",
    [
        {"video_id": "001", "videoID": "0.mp4", "task_type": "animals", "options": ["A. a cat", "B. a dog", "C. Bob"]},
        {"video": "0.mp4", "type": "animals", "candidates": TEXTS, "answer": "a dog"},
        {
            "video_path": "0.mp4",
            "question_category": "animals",
            "candidates": TEXTS,
            "correct_choice": 1,
            "answer": None,
        },
        {"video ID": "0.mp4", "Question Type": "animals", "Options": {"A": "a cat", "B": "a dog", "C": "Bob"}},
        {"Video_Name": "0.mp4", "Category": "animals", "Choice": ["A. a cat", "B. a dog", "C. Bob"]},
    ],
)
def test_names_that_benchmarks_have_for_fields_are_known(tmp_path, found):
    assert read_questions(written(tmp_path / "q.jsonl", [{"Question": "What barks?", "Answer": "B"} | found])) == [
        BARKS
    ]


def test_an_entry_may_hold_all_questions_of_a_video(tmp_path):
    inside = [
        {"Question": "What barks?", "answer": "a dog", "kind": "animals", "choices": TEXTS},
        {"question": "Who?", "answer": 3},
    ]
    found = read_questions(written(tmp_path / "q.json", {"videoID": "0.mp4", "duration": "short", "questions": inside}))
    assert found == [BARKS, Question("0.mp4", "Who?", "3")]


def test_letters_before_some_options_only_are_part_of_their_texts(tmp_path):
    options = ["A. Miller", "B. Smith", "somebody else"]
    (found,) = read_questions(written(tmp_path / "q.json", [entry(options=options, answer="A. Miller")]))
    assert found.options == tuple(options) and found.answer == "A. Miller"


def test_a_text_of_digits_is_an_options_text_where_it_is_one(tmp_path):
    (found,) = read_questions(written(tmp_path / "q.json", [entry(options=["2", "3", "4"], answer="2")]))
    assert found.answer == "2"
    (found,) = read_questions(written(tmp_path / "q.json", [entry(options=[4, 3, 2], answer="A")]))
    assert found.answer == "4"


@pytest.mark.parametrize("answer", [2, "2", "2. a dog", "B"])
def test_options_that_are_numbered_from_1_are_called_by_these_numbers(tmp_path, answer):
    options = ["1. a cat", "2. a dog", "3. Bob"]
    (found,) = read_questions(written(tmp_path / "q.json", [entry(options=options, answer=answer)]))
    assert found.answer == "2. a dog"


def test_letters_in_options_do_not_matter_where_the_answer_is_a_text(tmp_path):
    options = ["E. coli", "C. elegans"]
    (found,) = read_questions(written(tmp_path / "q.json", [entry(options=options, answer="C. elegans")]))
    assert found.options == tuple(options) and found.answer == "C. elegans"


def test_times_of_questions_are_counted(tmp_path):
    path = written(tmp_path / "q.json", [entry(), {**entry(), "start_s": 0}, {**entry(), "End time": 4.5}])
    assert number_with_times(path) == 2 and len(read_questions(path)) == 3


def test_a_file_from_windows_may_begin_with_a_mark_and_a_half_line_is_named(tmp_path):
    line = json.dumps(entry())
    for name, text in (("q.json", f"[{line}]"), ("q.jsonl", f"{line}\n")):
        (tmp_path / name).write_text(text, encoding="utf-8-sig")
        assert len(read_questions(tmp_path / name)) == 1
    (tmp_path / "q.jsonl").write_text(f"{line}\n{line[:-1]}")
    with pytest.raises(KokaneeError, match=r"q\.jsonl, line 2 is not JSON"):
        read_questions(tmp_path / "q.jsonl")


@pytest.mark.parametrize(
    ("one", "problem"),
    [
        ({"file": "0.mp4", "question": "What?"}, "it has no answer that is a text"),
        ({"question": "What?", "answer": "a dog"}, "it has no file"),
        ({"file": "0.mp4", "answer": "a dog", "question": ""}, "it has no question"),
        (entry(answer=["a dog"]), "it has no answer"),
        (entry(options=TEXTS, answer="a cow"), "'a cow' is none of its options"),
        (entry(options=TEXTS, answer="D"), "'D' is none of its options"),
        (entry(options=TEXTS, answer="A. a dog"), "is none of its options"),
        (entry(options=TEXTS, answer=3), "'3' is none of its options"),
        (entry(options=["2", "1", "0"], answer=2), "may be '2' or '0'"),
        (entry(options=["B", "A"], answer="A"), "may be 'B' or 'A'"),
        (entry(options=["a dog", "A dog."], answer="a dog"), "may be 'a dog' or 'A dog.'"),
        (entry(options=["B. a cat", "A. a dog"], answer="A"), "in the order of their letters"),
        (entry(options=["A. a cat", "C. a dog", "B. Bob"], answer="(B)"), "in the order of their letters"),
        (entry(options=["1. a cat", "2. a dog"], answer=0), "'0' is none of its options"),
        (entry(options=["a dog"]), "two or more texts"),
        (entry(options=["a dog", None]), "two or more texts"),
        (entry(options="a dog, a cat"), "two or more texts"),
        (entry(options=["A.", "B."]), "letters without texts"),
        (entry(options={"A": "a cat", "C": "a dog"}), "Call them A, B, C"),
        ({"file": "0.mp4", "questions": "What?"}, "no list of questions"),
        ("What?", "is no question"),
    ],
)
def test_what_is_no_question_is_told_with_its_place(tmp_path, one, problem):
    with pytest.raises(KokaneeError, match=r"q\.json, item 1") as told:
        read_questions(written(tmp_path / "q.json", [entry(), one]))
    assert problem in str(told.value)
    with pytest.raises(KokaneeError, match=r"q\.jsonl, line 2"):
        read_questions(written(tmp_path / "q.jsonl", [entry(), one]))


def test_an_ambiguous_answer_is_settled_by_brackets(tmp_path):
    (found,) = read_questions(written(tmp_path / "q.json", [entry(options=["B", "A"], answer="(A)")]))
    assert found.answer == "B"


def test_files_without_questions_are_refused(tmp_path):
    for path, problem in (
        (written(tmp_path / "none.json", []), "holds no questions"),
        (written(tmp_path / "none.jsonl", []), "holds no questions"),
        (written(tmp_path / "text.json", "What?"), "holds no list"),
        (tmp_path / "missing.json", "is not there"),
        (tmp_path, "is not there"),
    ):
        with pytest.raises(KokaneeError, match=problem):
            read_questions(path)
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(KokaneeError, match="not JSON"):
        read_questions(tmp_path / "broken.json")


@pytest.mark.parametrize(
    "said", ["a dog", "A Dog", " a  dog.\n", "a dog!", "B", "b", "(B)", "B.", "B. a dog", "(B) A dog."]
)
def test_a_right_answer_is_right_however_it_is_written(said):
    assert is_right(said, BARKS)


@pytest.mark.parametrize("said", ["", "dog", "a dog barks", "A", "A. a dog", "B. a cat", "Bob", "bob", "D", "1", "AB"])
def test_other_answers_are_wrong(said):
    assert not is_right(said, BARKS)


def test_an_options_text_goes_before_its_letter():
    letters = Question("0.mp4", "Which letter is written?", "A", "", ("B", "A"))
    assert is_right("A", letters) and not is_right("B", letters)
    opened = Question("0.mp4", "What barks?", "a dog")
    assert is_right("A dog.", opened) and not is_right("A", opened) and not is_right("B", opened)


def test_a_plain_text_stays_plain_and_is_never_emptied():
    for text in ("  A\tDog ?!", "...", "", "yes"):
        assert plain(plain(text)) == plain(text)
    assert plain("...") == "..." and plain("A\n dog.") == "a dog"


def test_names_without_an_ending_are_of_the_one_file_so_called(tmp_path):
    for name in ("abc.mp4", "abc.txt", "a.b.mp4", "two.mp4", "two.mkv"):
        (tmp_path / name).touch()
    questions = [Question(file, "What?", "x") for file in ("abc", "abc.mp4", "a.b", "none")]
    found = by_video(questions, tmp_path)
    assert [(video.file, video.path.name, len(video.questions)) for video in found] == [
        ("abc", "abc.mp4", 2),
        ("a.b", "a.b.mp4", 1),
        ("none", "none", 1),
    ]
    (elsewhere,) = by_video([Question("/elsewhere/videos/abc", "What?", "x")], tmp_path)
    assert elsewhere.path == tmp_path / "abc.mp4"
    with pytest.raises(KokaneeError, match=r"may be two\.mkv or two\.mp4"):
        by_video([Question("two", "What?", "x")], tmp_path)
    with pytest.raises(KokaneeError, match=r"None of the 1 videos is there \(such as none, looked for in"):
        by_video(questions[-1:], tmp_path)


def test_a_file_by_several_names_and_links_is_one_video(tmp_path):
    (tmp_path / "a.mp4").touch()
    (tmp_path / "b.mp4").symlink_to("a.mp4")
    names = ["a", "b.mp4", "./a.mp4", f"../{tmp_path.name}/a.mp4", str(tmp_path / "a.mp4")]
    (found,) = by_video([Question(name, "What?", "x") for name in names], tmp_path)
    assert (found.file, found.path, len(found.questions)) == ("a", tmp_path / "a.mp4", 5)


def test_a_name_from_elsewhere_and_another_of_the_same_file_are_told(tmp_path):
    (tmp_path / "a.mp4").touch()
    for names in (("x/a.mp4", "a.mp4"), ("a.mp4", "x/a.mp4"), ("x/a.mp4", "y/a.mp4")):
        with pytest.raises(KokaneeError, match=r"both mean .*a\.mp4\. Name files by their paths below"):
            by_video([Question(name, "What?", "x") for name in names], tmp_path)
    (found,) = by_video([Question(name, "What?", "x") for name in ("x/a.mp4", "x/a", "x/a.mp4")], tmp_path)
    assert found.path == tmp_path / "a.mp4"


def test_options_that_are_learnt_have_letters():
    question = Question("a.mp4", "What barks?", "a dog", options=("a cat", "a dog"))
    assert in_words(question) == (lettered(question), "B")
    assert in_words(Question("a.mp4", "What barks?", "a dog")) == ("What barks?", "a dog")
    with pytest.raises(KokaneeError, match="has 27 options, but there are 26 letters"):
        in_words(Question("a.mp4", "What barks?", "0", options=tuple(map(str, range(27)))))
