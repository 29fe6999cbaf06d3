"""Questions about videos, answered by a model and marked: right answers in per cent, with intervals of confidence.

There are three ways (`Way`) of asking:

- "answer": the bare question, answered greedily. Right is what is the right answer but for capital letters, white space
  and punctuation at its end (`questions.is_right`).
- "text": the bare question, and each option as its answer. Chosen is the option of the highest log-probability: the
  sum over its tokens, the end token included and not divided by their number.
- "letter": the question, the options with letters, one a line, and `questions.SENTENCE`. Chosen is the letter whose
  first token is the likeliest, as published benchmarks of options have it.

The options of all questions about a video are computed in one pass, packed behind what their prompts share, the video
above all (`prefix.py`; of a short one behind each question), and no option sees another. A server tells no
log-probabilities of options (`ServedExaminee`): by "letter" it is asked the same, and what it says is marked.

Axes: N label tokens, B packed prompts, O options of one at most.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import chain, groupby, islice
from operator import attrgetter
from pathlib import Path
from typing import Any, Literal

import torch

from kokanee.captions import Caption, Decoding, FileCaptioner, Request
from kokanee.conversations import shared_length
from kokanee.errors import KokaneeError, TooLittleMemory, memory_said
from kokanee.events import OTHER, Counts, right_difference, right_interval
from kokanee.exam import answers
from kokanee.losses import answer_log_probs
from kokanee.model import EMBED_INPUTS, Kokanee
from kokanee.prefix import Sample, branch_attention_in, collate_packed, pack, packed_log_probs
from kokanee.processor import Processor
from kokanee.prompt import IGNORED, Turn
from kokanee.questions import LETTERS, Question, Video, by_video, is_right, lettered, number_of, of_world
from kokanee.views import View, views
from kokanee.weights import fingerprint

Way = Literal["answer", "text", "letter"]
ANSWER_TOKENS, LETTER_TOKENS = 16, 4
SERVED_TOKENS = 4096  # some models of servers think before they answer
MARKS = r"[*_`\s]*"
ANNOUNCED = re.compile(rf"{MARKS}(the\s+)?((correct|final)\s+)?answer(\s+is)?{MARKS}:?{MARKS}", re.IGNORECASE)
LESS = "Ask fewer questions at once (--batch-size 1), or load the model in bfloat16 (--dtype bfloat16)."


@dataclass(frozen=True)
class Marked:
    """A question with what was said, or the text of the option that was chosen, and whether that is right.

    log_probs: of each option, where options were chosen from.
    """

    question: Question
    said: str
    right: bool
    log_probs: tuple[float, ...] = ()


@dataclass(frozen=True)
class Answered:
    """A video with its marked questions; with none, and the reason, where it could not be read or asked about.

    notes: what was unusual about its file.
    """

    video: Video
    answers: tuple[Marked, ...]
    error: str = ""
    notes: tuple[str, ...] = ()

    def by_one_name(self) -> list[Marked]:
        """The answers, to questions that all call the file as the video does, whatever names they have for it."""
        return [replace(one, question=replace(one.question, file=self.video.file)) for one in self.answers]


@dataclass(frozen=True)
class Share:
    """How many of the questions about some files were answered rightly.

    interval: in per cent, over files; see `events.right_interval`. chance: right answers in per cent where one of the
    options is drawn, None where not all questions have some.
    """

    right: int
    asked: int
    files: int
    interval: tuple[float, float]
    chance: float | None

    @property
    def percent(self) -> float:
        return 100.0 * self.right / max(1, self.asked)

    def as_dict(self) -> dict[str, Any]:
        """Ready for JSON. Where nothing was asked there is neither a share nor an interval."""
        nothing = {} if self.asked else {"percent": None, "interval": None}
        return {"percent": self.percent, **asdict(self), **nothing}


@dataclass(frozen=True)
class Accuracy:
    """Right answers, overall and by kind of question. unread: the videos that have no answers, and why; their `lost`
    questions count nowhere."""

    overall: Share
    kinds: dict[str, Share]
    unread: dict[str, str]
    lost: int

    def as_dict(self) -> dict[str, Any]:
        kinds = {kind: share.as_dict() for kind, share in self.kinds.items()}
        return {"overall": self.overall.as_dict(), "kinds": kinds, "unread": self.unread, "unread_questions": self.lost}


@dataclass(frozen=True)
class Lead:
    """How many points `more` of the questions that two were both asked one answers rightly than the other.

    interval: 95 %, over files, both drawn together; see `events.right_difference`.
    """

    more: float
    asked: int
    files: int
    interval: tuple[float, float]


class Examinee(ABC):
    """Whoever is asked, and in which way."""

    way: Way

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """What answers depend on beside the questions and the way, as runs keep it; `processor` holds settings."""

    @abstractmethod
    def each(self, videos: Sequence[Video]) -> Iterator[Answered]:
        """The videos as they are done, each with all its questions marked."""


@dataclass(frozen=True)
class ServedExaminee(Examinee):
    """A captioner that is asked in words and not looked into, as that of a server. batch_size: questions under way.

    A video of which a question got no answer has none. Raises `KokaneeError` for the way "text".
    """

    captioner: FileCaptioner
    way: Way
    batch_size: int = 8

    def __post_init__(self) -> None:
        if self.way == "text":
            raise KokaneeError(
                f"{self.captioner.name} does not tell how likely options are. Ask by letter (--by letter)."
            )

    def identity(self) -> dict[str, Any]:
        return self.captioner.identity()

    def each(self, videos: Sequence[Video]) -> Iterator[Answered]:
        """The videos as they are done. Equal questions about one are asked once."""
        about = {request: video for video in videos for request in self.requests(video)}
        made: dict[Request, list[Caption] | KokaneeError] = {}
        decoding = Decoding(max_new_tokens=SERVED_TOKENS)
        for request, found in self.captioner.each(about, decoding, batch_size=self.batch_size):
            made[request] = found
            video = about[request]
            asked = self.requests(video)
            if all(one in made for one in asked):
                yield self.answered(video, [made[one] for one in asked])

    def requests(self, video: Video) -> list[Request]:
        """What is asked about a video, question by question."""
        asked = lettered if self.way == "letter" else attrgetter("question")
        return [Request(video.path, asked(question)) for question in video.questions]

    def answered(self, video: Video, found: Sequence[list[Caption] | KokaneeError]) -> Answered:
        """A video with what was said to each question, marked."""
        error = next((str(one) for one in found if isinstance(one, KokaneeError)), "")
        if error:
            return Answered(video, (), error)
        said = [after_thought(one[0].text) for one in found if isinstance(one, list)]
        marked = (Marked(q, text, is_right(text, q)) for q, text in zip(video.questions, said, strict=True))
        notes = dict.fromkeys(note for one in found if isinstance(one, list) for note in one[0].notes)
        return Answered(video, tuple(marked), notes=tuple(notes))


@dataclass(frozen=True)
class ModelExaminee(Examinee):
    """A model that is computed here. batch_size: questions computed together. max_new_tokens: of an answer that is
    said."""

    model: Kokanee
    processor: Processor
    way: Way
    batch_size: int = 8
    max_new_tokens: int = ANSWER_TOKENS

    def identity(self) -> dict[str, Any]:
        return {
            "weights": fingerprint(self.model),
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "processor": self.processor.config.model_dump(mode="json"),
        }

    def each(self, videos: Sequence[Video]) -> Iterator[Answered]:
        """The videos in their order, each watched once and all its questions marked."""
        self.model.eval()
        watched = views(self.model, self.processor, ((video.path, None, None) for video in videos))
        for group in groups(videos, self.batch_size):
            try:
                made = self.together(group, list(islice(watched, len(group))))
            except TooLittleMemory:
                made = [self.alone(video) for video in group]
            yield from made

    def together(self, videos: Sequence[Video], seen: Sequence[View | KokaneeError]) -> list[Answered]:
        """Some videos, as they were seen, their questions computed together."""
        asked = [(view, q) for view, v in zip(seen, videos, strict=True) if isinstance(view, View) for q in v.questions]
        parts = [asked[at : at + self.batch_size] for at in range(0, len(asked), self.batch_size)]
        marked = iter([one for part in parts for one in self.marked(part)])
        found = []
        for video, view in zip(videos, seen, strict=True):
            if isinstance(view, KokaneeError):
                found.append(Answered(video, (), str(view)))
            else:
                found.append(Answered(video, tuple(next(marked) for _ in video.questions), notes=view.notes))
        return found

    def alone(self, video: Video) -> Answered:
        """A video by itself, question by question; without answers, where the memory does not suffice for that."""
        try:
            seen = list(views(self.model, self.processor, [(video.path, None, None)]))
            return replace(self, batch_size=1).together([video], seen)[0]
        except TooLittleMemory as error:
            return Answered(video, (), str(error))

    def marked(self, asked: Sequence[tuple[View, Question]]) -> list[Marked]:
        """One batch of questions, marked."""
        questions = [question for _, question in asked]
        if self.way == "answer":
            decoding = Decoding(max_new_tokens=self.max_new_tokens)
            bare = [(view, question.question) for view, question in asked]
            said = answers(self.model, self.processor, bare, decoding, batch_size=self.batch_size)
            return [Marked(q, text, is_right(text, q)) for q, text in zip(questions, said, strict=True)]
        found = []
        for question, log_probs in zip(questions, self.log_probs(asked), strict=True):
            chosen = question.options[log_probs.index(max(log_probs))]
            found.append(Marked(question, chosen, chosen == question.answer, log_probs))
        return found

    @memory_said(LESS)
    @torch.no_grad()
    def log_probs(self, asked: Sequence[tuple[View, Question]]) -> list[tuple[float, ...]]:
        """Of each question the log-probability of every option, from one pass. Questions about one video stand together
        in `asked`."""
        device = self.model.device
        packed = [pack for _, some in groupby(asked, key=lambda one: id(one[0])) for pack in self.packed(list(some))]
        batch = collate_packed([sample for _, sample in packed], self.processor.pad_id)
        batch = {name: value.to(device) for name, value in batch.items()}
        media = {}
        for name in EMBED_INPUTS:
            found = [view.media[name] for view, _ in packed if name in view.media]
            if found:
                media[name] = torch.cat(found).to(device)
        with branch_attention_in(self.model):
            log_probs_N, rows_N, options_N = packed_log_probs(self.model, batch, **media)
        n_options = int(batch["segments"].max())
        sums = answer_log_probs(log_probs_N, rows_N * n_options + options_N - 1, len(packed) * n_options)
        if not torch.isfinite(sums).all():
            raise KokaneeError(
                "The model's log-probabilities are not finite. Load it with dtype bfloat16 or float32; if they stay "
                "so, the checkpoint is damaged."
            )
        rows = zip(sums.view(len(packed), n_options).tolist(), packed, strict=True)
        told = chain.from_iterable(row[: int(sample["segments"].max())] for row, (_, sample) in rows)
        return [tuple(islice(told, len(question.options))) for _, question in asked]

    def packed(self, asked: Sequence[tuple[View, Question]]) -> list[tuple[View, Sample]]:
        """Questions about one video with all their options as answers, in their order; labels are the tokens whose
        log-probabilities count."""
        view = asked[0][0]
        options = [[self.sample(view, *one) for one in self.options(question)] for _, question in asked]
        return [(view, sample) for sample in packs(options)]

    def options(self, question: Question) -> list[tuple[str, str]]:
        """What is asked, with each option as it is answered."""
        if self.way == "letter":
            return [(lettered(question), letter) for letter in LETTERS[: len(question.options)]]
        return [(question.question, option) for option in question.options]

    def sample(self, view: View, asked: str, answer: str) -> Sample:
        """A question with an answer, with labels where that counts."""
        sample = self.processor.prepare_ids([Turn("user", asked), Turn("assistant", answer)], [view.block])
        told = (sample["labels"] != IGNORED).nonzero()[:, 0]
        newline = len(self.processor.writer.turn_end) - 1  # what follows the end token is never generated
        sample["labels"][told[1:] if self.way == "letter" else told[len(told) - newline :]] = IGNORED
        return sample


def packs(questions: Sequence[Sequence[Sample]]) -> list[Sample]:
    """Questions with their answers, each a sample, packed all behind what they begin with, or question by question:
    whichever has fewer tokens."""
    ways = [[answer for answers in questions for answer in answers]], questions
    made = [[pack(samples, shared_length(samples)) for samples in way] for way in ways]
    return min(made, key=lambda packed: sum(len(sample["input_ids"]) for sample in packed))


def after_thought(text: str) -> str:
    """What a server's model says after it has thought aloud, without the marks of emphasis around it and the words with
    which an answer is announced."""
    said = text.rpartition("</think>")[2].strip()
    announced = ANNOUNCED.match(said)
    return said[announced.end() if announced else 0 :].strip("*_` \n") or text


def groups(videos: Sequence[Video], size: int) -> Iterator[list[Video]]:
    """The videos in groups of at most `size` questions, or of one that has more."""
    group: list[Video] = []
    for video in videos:
        if group and number_of([*group, video]) > size:
            yield group
            group = []
        group.append(video)
    if group:
        yield group


def default_way(path: str | Path, questions: Sequence[Question]) -> Way:
    """ "letter" for a file of which all questions have options, "answer" for others and for clips of the world."""
    return "answer" if of_world(path) or not all(question.options for question in questions) else "letter"


def askable(videos: Sequence[Video], way: Way) -> list[Video]:
    """The videos with those of their questions that can be asked in this way. Raises `KokaneeError` where none can."""
    if way == "answer":
        return list(videos)
    kept = [replace(video, questions=tuple(q for q in video.questions if q.options)) for video in videos]
    kept = [video for video in kept if video.questions]
    longest = max((len(q.options) for video in kept for q in video.questions), default=0)
    if not kept:
        raise KokaneeError(f"No question has options, of which {way!r} chooses one. Ask by 'answer' (--by answer).")
    if way == "letter" and longest > len(LETTERS):
        raise KokaneeError(f"A question has {longest} options, but there are 26 letters. Ask by 'text' (--by text).")
    return kept


def answer_tokens(processor: Processor, questions: Sequence[Question]) -> int:
    """How long an answer may become: as long as the longest right one, with its option's letter before it."""
    longest = max(len(processor.tokenizer(question.answer)["input_ids"]) for question in questions)
    return max(ANSWER_TOKENS, longest + LETTER_TOKENS)


def examined(
    model: Kokanee,
    processor: Processor,
    questions: Sequence[Question],
    videos: str | Path,
    way: Way = "answer",
    *,
    batch_size: int = 8,
) -> list[Answered]:
    """All questions about the files of the folder `videos` that can be asked in this way, answered and marked."""
    examinee = ModelExaminee(model, processor, way, batch_size, answer_tokens(processor, questions))
    return list(examinee.each(askable(by_video(questions, Path(videos)), way)))


def accuracy(answered: Sequence[Answered]) -> Accuracy:
    """Right answers overall and by kind, with intervals over files: questions about one file are not independent."""
    unread = [one for one in answered if one.error]
    marked = {one.video.file: one.answers for one in answered if not one.error}
    kinds = sorted({answer.question.kind for some in marked.values() for answer in some})
    by_kind = {kind: {f: [a for a in some if a.question.kind == kind] for f, some in marked.items()} for kind in kinds}
    return Accuracy(
        share(marked),
        {kind or OTHER: share(some) for kind, some in by_kind.items()} if kinds != [""] else {},
        {one.video.file: one.error for one in unread},
        sum(len(one.video.questions) for one in unread),
    )


def beside(ours: Sequence[Answered], others: Sequence[Answered]) -> dict[str, Lead]:
    """How far ours are ahead of others' answers, by kind of question and "overall", on the questions about the same
    files that both have answers to; nothing where there are none."""
    right = {answer.question: answer.right for one in others for answer in one.by_one_name()}
    both = [
        (answer, right[answer.question])
        for one in sorted(ours, key=lambda one: one.video.file)  # by name, as a bootstrap draws places
        for answer in one.by_one_name()
        if answer.question in right
    ]
    kinds = sorted({answer.question.kind for answer, _ in both})
    by_kind = {kind or OTHER: [pair for pair in both if pair[0].question.kind == kind] for kind in kinds}
    groups = {**(by_kind if kinds != [""] else {}), "overall": both}
    return {name: lead(pairs) for name, pairs in groups.items() if pairs}


def lead(pairs: Sequence[tuple[Marked, bool]]) -> Lead:
    """Answers, and whether the other one is right there, file by file."""
    ours: dict[str, Counts] = {}
    other: dict[str, Counts] = {}
    for answer, there in pairs:
        for counts, right in ((ours, answer.right), (other, there)):
            file = answer.question.file
            counts[file] = counts.get(file, Counts(0, 0, 0, 0)) + Counts(not right, 0, 0, 1)
    more, low, high = right_difference(list(ours.values()), list(other.values()))
    return Lead(more, len(pairs), len(ours), (low, high))


def share(by_file: Mapping[str, Sequence[Marked]]) -> Share:
    """The share of right answers among those of each file."""
    # By name, as a bootstrap draws places. A wrong answer is what a missed event is: one of those that there are.
    marked = [by_file[file] for file in sorted(by_file) if by_file[file]]
    counts = [Counts(sum(not answer.right for answer in some), 0, 0, len(some)) for some in marked]
    asked, wrong = sum(count.n_events for count in counts), sum(count.missed for count in counts)
    sizes = [len(answer.question.options) for some in marked for answer in some]
    chance = 100.0 * sum(1 / size for size in sizes) / asked if sizes and all(sizes) else None
    return Share(asked - wrong, asked, len(marked), right_interval(counts), chance)
