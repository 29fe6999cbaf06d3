"""Questions about videos with their right answers, read from files: open ones, and those with options to choose from.

- a folder of `kokanee world make`, or its samples.jsonl;
- JSON lines, or a list in JSON, of {"file", "question", "answer"}, with "options" where there are any and a "kind"
  where it is known, under these names or those that benchmarks have for them; or an entry a video, with "questions".
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import ascii_uppercase
from typing import Any

from kokanee.errors import KokaneeError
from kokanee.files import SAMPLES, by_names
from kokanee.formats import read_jsonl

LETTERS = ascii_uppercase
SENTENCE = "Answer with the option's letter from the given choices directly."
QUESTIONS = "questions"
FILE = ("file", "video", "video_path", "video_file", "video_name", "file_name", "filename", "videoid", "video_id")
ANSWER = ("answer", "correct_answer", "correct_choice")
OPTIONS = ("options", "choices", "candidates", "choice")
KIND = ("kind", "task_type", "question_type", "question_category", "type", "category")
FORM = (
    'It must be like {"file": "0.mp4", "question": "What barks?", "answer": "a dog"}, with "options" if there are any.'
)
LETTERED = re.compile(r"\(?([A-Za-z])(?:[.):]+\s*|\s+|$)(.*)", re.DOTALL)
PREFIXED = re.compile(r"[(\[]?([A-Za-z])(?:[.):\]、]+\s*|\s+[-–]\s+)(.*)", re.DOTALL)
NUMBERED = re.compile(r"[(\[]?(\d+)(?:[.):\]、]+\s|\s+[-–]\s).*", re.DOTALL)
TIMES = ("start_s", "end_s", "start", "end", "start_time", "end_time")
FINAL = ".,;:!? "


@dataclass(frozen=True)
class Question:
    """A question about a file, and its right answer: where there are options, the text of the right one.

    kind: what sort of question it is, "" if not known. options: the texts to choose from, none for an open question.
    """

    file: str
    question: str
    answer: str
    kind: str = ""
    options: tuple[str, ...] = ()


@dataclass(frozen=True)
class Video:
    """A file, and all questions about it. `file`: its name as the questions have it."""

    file: str
    path: Path
    questions: tuple[Question, ...]


def number_of(videos: Sequence[Video]) -> int:
    """How many questions there are about these."""
    return sum(len(video.questions) for video in videos)


def read_questions(path: str | Path) -> list[Question]:
    """All questions of a file, or of a folder of the world's clips. Raises `KokaneeError` for what is no question."""
    found = []
    for where, entry in entries(path):
        inside = entry.get(QUESTIONS)
        if inside is None:
            found.append(of_entry(entry, where))
            continue
        if not isinstance(inside, list) or not all(isinstance(one, dict) for one in inside):
            raise KokaneeError(f"{where}: its questions are no list of questions. {FORM}")
        found += [of_entry(entry | keyed(one), f"{where}, question {number}") for number, one in enumerate(inside)]
    if not found:
        raise KokaneeError(f"{path} holds no questions. Give a file that does.")
    return found


def number_with_times(path: str | Path) -> int:
    """How many entries are about a part of a video, by their times."""
    return sum(first_of(entry, TIMES) is not None for _, entry in entries(path))


def of_world(path: str | Path) -> bool:
    """Whether these are clips of the world."""
    _, first = next(entries(path), ("", {}))
    return "scene" in first


def entries(path: str | Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Where each entry of a file stands, and the entry, its keys in one spelling."""
    path = Path(path)
    path = path / SAMPLES if path.is_dir() else path
    if not path.is_file():
        raise KokaneeError(f"{path} is not there. Give a file of questions, or a folder of `kokanee world make`.")
    items: Any
    if path.suffix == ".json":
        try:
            items = json.loads(path.read_text(encoding="utf-8-sig"))
        except ValueError as error:
            raise KokaneeError(f"{path} is not JSON ({error}). Give JSON, or let JSON lines end in .jsonl.") from error
        items = [items] if isinstance(items, dict) else items
    else:
        items = read_jsonl(path, whole=path.name != SAMPLES)
    if not isinstance(items, list):
        raise KokaneeError(f"{path} holds no list of questions. {FORM}")
    for number, item in enumerate(items):
        where = f"{path}, item {number}" if path.suffix == ".json" else f"{path}, line {number + 1}"
        if not isinstance(item, dict):
            raise KokaneeError(f"{where} is no question. {FORM}")
        yield where, keyed(item)


def keyed(item: dict[str, Any]) -> dict[str, Any]:
    """An entry whose keys are in small letters, their words joined by underscores."""
    return {re.sub(r"[\s-]+", "_", key.strip().lower()): value for key, value in item.items()}


def of_entry(entry: dict[str, Any], where: str) -> Question:
    """One question. A mistake is told with its place."""
    file, question, answer = (text_of(first_of(entry, names)) for names in (FILE, ("question",), ANSWER))
    missing = [name for name, text in (("file", file), ("question", question), ("answer", answer)) if not text]
    if missing:
        raise KokaneeError(f"{where} is no question: it has no {missing[0]} that is a text. {FORM}")
    kind = first_of(entry, KIND)
    options = options_of(first_of(entry, OPTIONS), where)
    if options:
        answer = option_meant(first_of(entry, ANSWER), options, where)
    return Question(file, question, answer, kind.strip() if isinstance(kind, str) else "", options)


def first_of(entry: dict[str, Any], names: Sequence[str]) -> Any:
    """The value of the first of these keys that has one."""
    return next((entry[name] for name in names if entry.get(name) is not None), None)


def text_of(value: Any) -> str:
    """A text or number as a text, "" for anything else."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return value.strip() if isinstance(value, str) else str(value) if is_number else ""


def options_of(found: Any, where: str) -> tuple[str, ...]:
    """The options' texts without the letters before them."""
    if isinstance(found, dict):
        named = {str(key).strip("(). ").upper(): value for key, value in found.items()}
        if sorted(named) != list(LETTERS[: len(found)]):
            raise KokaneeError(f"{where}: its options are called {', '.join(found)}. Call them A, B, C and so on.")
        found = [named[letter] for letter in sorted(named)]
    if found is None or found == []:
        return ()
    texts = [text_of(option) for option in found] if isinstance(found, list) else []
    if len(texts) < 2 or not all(texts):
        raise KokaneeError(f"{where}: its options are not two or more texts. Give such a list, or none.")
    prefixed = [PREFIXED.fullmatch(text) for text in texts]
    letters = "".join(match[1].upper() for match in prefixed if match)
    if letters == LETTERS[: len(texts)]:
        texts = [match[2].strip() for match in prefixed if match]
    if not all(texts):
        raise KokaneeError(f"{where}: its options are letters without texts. Give the options' texts.")
    return tuple(texts)


def option_meant(answer: Any, options: Sequence[str], where: str) -> str:
    """The text of the option that a file gives as the right one: by its text, its letter, or its number, which is from
    0 on, or that before the options.

    Raises `KokaneeError` where it is none of them, and where it may be several.
    """
    text = text_of(answer)
    found = meanings(text, options)
    if text.isdecimal() and not (isinstance(answer, str) and found):  # a text of digits is first of all a text
        place = int(text) - first_number(options)
        found |= set(options[place : place + 1]) if place >= 0 else set()
    other = [option for option in options if option not in found and is_letter_of(text, option)]
    if found and other:
        raise KokaneeError(
            f"{where}: the answer {text!r} is {found.pop()!r} by its place and {other[0]!r} by the letter before it. "
            "Put the options in the order of their letters."
        )
    if not found:
        raise KokaneeError(f"{where}: the answer {text!r} is none of its options. Give an option's text or letter.")
    if len(found) > 1:
        names = " or ".join(repr(option) for option in options if option in found)
        raise KokaneeError(f'{where}: the answer {text!r} may be {names}. Give its letter in brackets, such as "(A)".')
    return found.pop()


def first_number(options: Sequence[str]) -> int:
    """What the options are counted from: 1 where they are numbered so, else 0."""
    numbers = [int(match[1]) for match in map(NUMBERED.fullmatch, options) if match]
    return 1 if numbers == list(range(1, len(options) + 1)) else 0


def is_letter_of(said: str, option: str) -> bool:
    """Whether this is a letter alone, and the one before an option's text."""
    letter, printed = LETTERED.fullmatch(said.strip()), PREFIXED.fullmatch(option)
    return letter is not None and printed is not None and (letter[1].upper(), letter[2]) == (printed[1].upper(), "")


def meanings(said: str, options: Sequence[str]) -> set[str]:
    """The options that an answer can mean: by the text, the letter ("B", "(B)", "B."), or both ("B. a dog")."""
    found = {option for option in options if same(said, option)}
    match = LETTERED.fullmatch(said.strip())
    place = LETTERS.index(match[1].upper()) if match else len(options)
    if match and place < len(options) and plain(match[2]) in ("", plain(options[place])):
        found.add(options[place])
    return found


def plain(text: str) -> str:
    """A text without what makes no other answer of it: capital letters, spare white space, punctuation at its end."""
    text = " ".join(text.casefold().split())
    return text.rstrip(FINAL) or text


def same(said: str, answer: str) -> bool:
    """Whether an open question was given this answer."""
    return plain(said) == plain(answer)


def is_right(said: str, question: Question) -> bool:
    """Whether this is the right answer. Where it is no option's text, it may be the right one's letter."""
    if any(same(said, text) for text in (question.answer, *question.options)):
        return same(said, question.answer)
    return meanings(said, question.options) == {question.answer}


def lettered(question: Question) -> str:
    """A question with its options and what to do with them."""
    options = [f"{letter}. {option}" for letter, option in zip(LETTERS, question.options, strict=False)]
    return "\n".join([question.question, *options, SENTENCE])


def in_words(question: Question) -> tuple[str, str]:
    """What is asked and the right answer: where there are options, these with letters, and the letter of the right one.

    Raises `KokaneeError` for more options than letters.
    """
    if not question.options:
        return question.question, question.answer
    if len(question.options) > len(LETTERS):
        raise KokaneeError(
            f"{question.question!r} has {len(question.options)} options, but there are {len(LETTERS)} letters. "
            "Take the question out."
        )
    return lettered(question), LETTERS[question.options.index(question.answer)]


def in_folder(folder: Path) -> Callable[[str], Path]:
    """Finds the files that questions are about, as `files.by_names` does. Raises `KokaneeError` for a second name of a
    file that starts from another place: one of the two may be of a file that is not there."""
    path_of = by_names(folder)
    names: dict[Path, str] = {}

    def found(name: str) -> Path:
        path = path_of(name)
        both = (names.setdefault(path, name), name)
        if len({(folder / one).parent.resolve() for one in both}) > 1:
            raise KokaneeError(f"{' and '.join(both)} both mean {path}. Name files by their paths below {folder}.")
        return path

    return found


def by_video(questions: Sequence[Question], folder: Path) -> list[Video]:
    """The questions of each file of a folder, in the order in which files are first asked about.

    Files are found by `in_folder`. Raises `KokaneeError` where that does, and where none of the files is there; single
    files that are missing are told when they are read.
    """
    path_of = in_folder(folder)
    found: dict[Path, list[Question]] = {}
    named: dict[Path, Path] = {}
    for question in questions:
        path = path_of(question.file)
        first = named.setdefault(path.resolve(), path)  # of a file by several names or links
        found.setdefault(first, []).append(question)
    if not any(path.is_file() for path in found):
        raise KokaneeError(
            f"None of the {len(found)} videos is there (such as {questions[0].file}, looked for in {folder}). "
            "Give the folder that their names start from (--videos)."
        )
    return [Video(some[0].file, path, tuple(some)) for path, some in found.items()]
