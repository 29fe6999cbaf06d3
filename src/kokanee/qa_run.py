"""Questions about many videos: a record of each video's answers as they are made, so that a run can be killed any time.

The folder holds state.json (all that the answers depend on), answers.jsonl (which only grows; of several records of a
video the last one counts) and, from when all is done, scores.json.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from kokanee.conversations import digest
from kokanee.errors import KokaneeError
from kokanee.formats import (
    alone_in,
    append_jsonl,
    differences,
    drop_half_start,
    read_json,
    read_jsonl,
    refuse_foreign,
    write_json,
)
from kokanee.qa import Answered, Examinee, Marked, accuracy, beside
from kokanee.questions import Question, Video
from kokanee.views import version_of

VERSION = 1
HASHED = ("questions", "weights")
STATE, ANSWERS, SCORES = "state.json", "answers.jsonl", "scores.json"


def settings_of(examinee: Examinee, questions: Sequence[Question], videos: Path) -> dict[str, Any]:
    """All that the answers depend on."""
    return {
        "version": VERSION,
        "questions": digest(questions),
        "videos": videos.resolve().as_posix(),
        "way": examinee.way,
        **examinee.identity(),
    }


def run(
    out: Path,
    examinee: Examinee,
    videos: Sequence[Video],
    settings: dict[str, Any],
    on_video: Callable[[int], None] | None = None,
    others: Mapping[str, Sequence[Answered]] | None = None,
) -> list[Answered]:
    """The videos with their marked questions, each also a record in `out` as soon as it is done, and their scores.

    Goes on where an earlier run stopped; videos that have no answers or have changed are tried again. `on_video` is
    told how many are done. `others`: runs of the same questions by name, which the scores are held against. Raises
    `KokaneeError` for a folder that was made with other settings.
    """
    refuse_foreign(out, STATE)
    with alone_in(out):
        check_same(out, settings)
        path = out / ANSWERS
        drop_half_start(path)
        before = {record["file"]: record for record in read_jsonl(path)} if path.is_file() else {}
        known = {video: kept(video, before.get(video.file)) for video in videos}
        found = {video: answered for video, answered in known.items() if answered is not None}
        (out / SCORES).unlink(missing_ok=True)
        if found and on_video is not None:
            on_video(len(found))
        # What was never tried does not wait for what failed.
        waiting = sorted((video for video in videos if video not in found), key=lambda video: video.file in before)
        for answered in examinee.each(waiting):
            record = record_of(answered)
            if record != before.get(answered.video.file):
                append_jsonl(path, [record])
            found[answered.video] = answered
            if on_video is not None:
                on_video(len(found))
        everything = [found[video] for video in videos]
        leads = {name: beside(everything, other) for name, other in (others or {}).items()}
        held = {name: {kind: asdict(lead) for kind, lead in found.items()} for name, found in leads.items()}
        scores = {**settings, "files": len(videos), **accuracy(everything).as_dict(), "beside": held}
        write_json(out / SCORES, scores)
    return everything


def answered_in(out: Path, videos: Sequence[Video]) -> list[Answered]:
    """What an earlier run answered about these videos, as they were then. Raises `KokaneeError` where there is none."""
    path = out / ANSWERS
    if not path.is_file():
        raise KokaneeError(f"{path} is not there. Give a folder that kokanee qa has written to with --out.")
    records = {record["file"]: record for record in read_jsonl(path)}
    asked = {replace(question, file=video.file) for video in videos for question in video.questions}
    found = []
    for video in videos:
        entries = records.get(video.file, {}).get("answers", [])
        marked = [Marked(question_of(video.file, entry), entry["said"], entry["right"]) for entry in entries]
        found.append(Answered(video, tuple(one for one in marked if one.question in asked)))
    if not any(one.answers for one in found):
        raise KokaneeError(f"{out} answers none of these questions. Give a run of the same file of questions.")
    return found


def check_same(out: Path, settings: dict[str, Any]) -> None:
    """Note the settings of a new folder. Raises `KokaneeError` where an earlier run had others, saying which."""
    state = out / STATE
    if not state.is_file():
        write_json(state, settings)
    was, now = map(compared, (read_json(state), settings))
    differing = [f"other {name} than before" for name in HASHED if was.pop(name, None) != now.pop(name, None)]
    differing += differences(was, now)
    if differing:
        raise KokaneeError(
            f"{out} was made with other settings ({'; '.join(differing)}). Use the same, or another folder."
        )


def compared(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings with each of the processor's by its own name. A server's address is none, nor is a model's name: both
    may move."""
    apart = ("processor", "server", "name")
    return {name: value for name, value in settings.items() if name not in apart} | settings.get("processor", {})


def record_of(answered: Answered) -> dict[str, Any]:
    """One video in answers.jsonl."""
    video = answered.video
    made: dict[str, Any] = {"answers": [entry_of(one) for one in answered.answers]}
    made |= {"notes": list(answered.notes)} if answered.notes else {}
    made = {"error": answered.error} if answered.error else made
    return {"version": VERSION, "file": video.file, "version_of_file": version_of(video.path), **made}


def entry_of(answer: Marked) -> dict[str, Any]:
    """One question in answers.jsonl."""
    question = answer.question
    found = {"question": question.question, "kind": question.kind, "answer": question.answer}
    more = {"options": list(question.options), "log_probs": list(answer.log_probs)}
    return found | {"said": answer.said, "right": answer.right} | {name: some for name, some in more.items() if some}


def question_of(file: str, entry: dict[str, Any]) -> Question:
    """The question of an entry of answers.jsonl."""
    return Question(file, entry["question"], entry["answer"], entry["kind"], tuple(entry.get("options", ())))


def kept(video: Video, record: dict[str, Any] | None) -> Answered | None:
    """The answers of an earlier run about the file as it is now; None where there are none."""
    if record is None or "error" in record or record["version_of_file"] != version_of(video.path):
        return None
    if [asked.question for asked in video.questions] != [answer["question"] for answer in record["answers"]]:
        return None  # another name was found to be this file since
    rows = zip(video.questions, record["answers"], strict=True)
    marked = tuple(Marked(q, a["said"], a["right"], tuple(a.get("log_probs", ()))) for q, a in rows)
    return Answered(video, marked, notes=tuple(record.get("notes", ())))
