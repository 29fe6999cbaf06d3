"""Laws of clips: what is known of them was told, what is kept was encoded, what cannot be read is said."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from kokanee.adapting import apart
from kokanee.checkpoints import load
from kokanee.clips import FileClips, FileData, WorldClips, WorldData
from kokanee.errors import KokaneeError, TooLittleMemory
from kokanee.formats import read_jsonl
from kokanee.mrdpo import run_mrdpo
from kokanee.mrdpo_recipe import MrdpoRecipe
from kokanee.preferences import Lesson
from kokanee.prompt import Turn
from kokanee.protocol import LISTS
from kokanee.rebirth import RebirthRecipe, run_rebirth
from kokanee.views import keep_view, open_prompt, read_view, watch
from kokanee.world.language import parse
from model_server import serving
from mrdpo_runs import SMALL, quiet, run, small_recipe, weights


def told(files: list[str]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Captions and events of files."""
    captions = [{"file": file, "caption": f"In {file} something moves and sounds."} for file in files]
    events = [
        {"version": 1, "file": file, "events": [{"text": "Something moves.", "kind": "seen"}, {"text": "It sounds."}]}
        for file in files
    ]
    return captions, events


def write(path: Path, records: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


@pytest.fixture
def data(media, tmp_path):
    def build(*files: str, **more: Any) -> FileData:
        captions, events = told(list(files))
        return FileData(
            videos=str(media),
            captions=write(tmp_path / "captions.jsonl", captions),
            events=write(tmp_path / "events.jsonl", events),
            **more,
        )

    return build


def nothing(done: int, total: int) -> None:
    pass


def test_a_world_clip_is_asked_for_what_its_annotator_told(tiny, tiny_stores):
    clips = WorldClips(*tiny, WorldData(features=tiny_stores["train"]), "train")
    exact = WorldClips(*tiny, WorldData(features=tiny_stores["train"], ground_truth="exact"), "train")
    for number in range(len(clips)):
        task, full = clips.task(number, 2, "a"), exact.task(number, 2, "a")
        assert task == clips.task(number, 2, "a") and len(task.questions) <= 2
        assert task.truth.facts is not None
        assert set(parse(full.ground_truth).facts) == set(task.truth.facts)
        assert parse(task.ground_truth).unparsed == ()
    others = [clips.task(number, 2, "b").ground_truth for number in range(len(clips))]
    assert others != [clips.task(number, 2, "a").ground_truth for number in range(len(clips))]


def test_files_are_encoded_as_the_captioner_reads_them_and_once(tiny, data, media, tmp_path, monkeypatch):
    model, processor = tiny
    clips = FileClips(model, processor, data("first.mp4", "sound.wav"), tmp_path / "store", "What happens?")
    clips.readable([0, 1], nothing, (0, 1))
    assert not clips.failed() and len(clips) == 2
    task, view = clips.task(0, 0, "key"), clips.view(0)
    sample = processor.prepare(processor.read(media / "first.mp4"), [Turn("user", task.prompt)])
    made = open_prompt(processor, view, task.prompt)
    assert torch.equal(made["input_ids"], sample["input_ids"])
    assert torch.equal(made["position_ids"], sample["position_ids"])
    with torch.no_grad():
        visual = model.encode_video(sample["pixel_values_videos"], sample["video_grid_thw"])
    assert torch.equal(view.media["video_embeds"], visual)
    assert clips.n_tokens(0) == len(view.media["video_embeds"]) + len(view.media["audio_embeds"])
    assert set(clips.view(1).media) == {"audio_embeds"}
    monkeypatch.setattr(clips, "read", lambda number: pytest.fail("encoded twice"))
    clips.readable([0, 1], nothing, (0, 1))


def test_an_interval_is_that_part_of_the_file(tiny, media):
    whole, part = watch(*tiny, media / "first.mp4"), watch(*tiny, media / "first.mp4", 1.0, 3.0)
    assert len(part.media["video_embeds"]) < len(whole.media["video_embeds"])


def test_a_file_that_cannot_be_read_is_recorded_with_its_reason(tiny, data, tmp_path):
    clips = FileClips(*tiny, data("first.mp4", "missing.mp4"), tmp_path / "store", "What happens?")
    clips.readable([0, 1], nothing, (0, 1))
    assert list(clips.failed()) == [1] and "missing.mp4" in clips.failed()[1]
    clips.readable([0, 1], nothing, (0, 1))
    assert len(read_jsonl(tmp_path / "store" / "unreadable-0.jsonl")) == 1


def test_a_file_that_memory_did_not_suffice_for_is_tried_again_and_a_broken_one_is_not(
    tiny, data, tmp_path, monkeypatch
):
    clips = FileClips(*tiny, data("first.mp4", "missing.mp4", "second.mp4"), tmp_path / "store", "What happens?")
    with monkeypatch.context() as meanwhile:
        full = TooLittleMemory("The device has too little memory.")
        meanwhile.setattr("kokanee.clips.seen", lambda _, shown: shown if isinstance(shown, KokaneeError) else full)
        clips.readable([0, 1], nothing, (0, 1))
    assert list(clips.failed()) == [0, 1]
    clips.try_again(memory=True)
    assert list(clips.failed()) == [1]
    clips.readable([0, 1], nothing, (0, 1))
    assert list(clips.failed()) == [1] and clips.view(0).block.kind == "video"
    clips.try_again()
    assert not clips.failed()


def test_an_interval_that_the_file_does_not_have_to_its_end_is_unusual(tiny, media):
    assert not watch(*tiny, media / "first.mp4", 0.5, 1.5).notes
    assert "before the end that was asked for" in watch(*tiny, media / "first.mp4", 0.5, 100.0).notes[-1]


def test_what_is_unusual_about_files_is_told_once(tiny, data, tmp_path, caplog):
    clips = FileClips(*tiny, data("first.mp4", "silent.mp4", "sound.wav"), tmp_path / "store", "What happens?")
    clips.readable([0, 1, 2], nothing, (0, 1))
    (told,) = caplog.messages
    assert "2 of 3 files are unusual, such as silent.mp4: no sound track" in told
    records = read_jsonl(tmp_path / "store" / "unusual-0.jsonl")
    assert [(record["file"], record["notes"]) for record in records] == [
        ("silent.mp4", ["no sound track"]),
        ("sound.wav", ["no picture"]),
    ]
    clips.readable([0, 1, 2], nothing, (0, 1))
    assert len(caplog.messages) == 1


def test_a_file_that_was_mended_is_read(tiny, data, media, tmp_path):
    found = data("mended.mp4")
    clips = FileClips(*tiny, found.model_copy(update={"videos": str(tmp_path)}), tmp_path / "store", "What happens?")
    clips.readable([0], nothing, (0, 1))
    assert list(clips.failed()) == [0]
    (tmp_path / "mended.mp4").write_bytes((media / "silent.mp4").read_bytes())
    clips.readable([0], nothing, (0, 1))
    assert not clips.failed() and clips.view(0).block.kind == "video"


def test_a_file_that_was_replaced_is_encoded_again_and_one_that_is_gone_or_kept_without_a_version_is_not(
    tiny, data, media, tmp_path, monkeypatch
):
    path, found = tmp_path / "clip.mp4", data("clip.mp4").model_copy(update={"videos": str(tmp_path)})
    clips = FileClips(*tiny, found, tmp_path / "store", "What happens?")
    shutil.copy(media / "first.mp4", path)
    clips.readable([0], nothing, (0, 1))
    first = clips.n_tokens(0)
    shutil.copy(media / "silent.mp4", path)
    clips.readable([0], nothing, (0, 1))
    assert clips.n_tokens(0) < first and clips.view(0).block.kind == "video"
    monkeypatch.setattr(clips, "read", lambda number: pytest.fail("encoded twice"))
    path.rename(tmp_path / "away.mp4")
    clips.readable([0], nothing, (0, 1))
    keep_view(clips.place(0), clips.view(0), None)
    shutil.copy(media / "second.mp4", path)
    clips.readable([0], nothing, (0, 1))
    assert not clips.failed()


def test_a_run_that_too_many_files_stopped_tries_them_again(tiny_checkpoint, data, tmp_path, monkeypatch):
    found = data("first.mp4", "second.mp4", "silent.mp4", "sound.wav")

    def away(self: FileClips, number: int) -> tuple[None, KokaneeError]:
        return None, KokaneeError("The disk is away.")

    with serving(judged) as (_, url):
        recipe = recipe_of(found, tiny_checkpoint, url)
        with monkeypatch.context() as patch, pytest.raises(KokaneeError, match=r"2 of 2 files.*The disk is away"):
            patch.setattr(FileClips, "read", away)
            run(recipe, tmp_path / "run")
        assert len(run(recipe, tmp_path / "run")) == 2


def test_processes_that_share_the_work_leave_no_clip_out(tiny, data, tmp_path):
    clips = FileClips(*tiny, data("first.mp4", "second.mp4", "silent.mp4"), tmp_path / "store", "What happens?")
    for share in (0, 1):  # the second starts when the first is done
        clips.readable([0, 1, 2], nothing, (share, 2))
    assert all(clips.place(number).is_file() for number in range(3))


def test_a_bias_that_annotators_do_not_have_is_named():
    with pytest.raises(ValidationError, match="bias has no sleepy"):
        WorldData(features="x", bias={"sleepy": 1.0})


def test_questions_prompts_and_captions_are_those_of_the_files(tiny, data, tmp_path):
    asked = [{"file": "first.mp4", "question": f"Question {n}?", "answer": "yes"} for n in range(3)]
    found = data("first.mp4", "second.mp4", questions=write(tmp_path / "q.jsonl", asked), prompts=("Tell all.",))
    clips = FileClips(*tiny, found, tmp_path / "store", "What happens?")
    first, second = (clips.task(number, 2, "key") for number in (0, 1))
    assert len(first.questions) == 2 and second.questions == ()
    assert first.prompt == "Tell all." and first.ground_truth == "In first.mp4 something moves and sounds."
    assert [event.text for event in first.truth.events] == ["Something moves.", "It sounds."]


def test_files_are_found_by_the_names_that_captions_made_elsewhere_have(tiny, data, media, tmp_path):
    """Captions of `kokanee caption media/`, of absolute paths, and of paths on another machine."""
    for names in ("media/first.mp4", "second.mp4"), (str(media / "first.mp4"), "/elsewhere/media/second.mp4"):
        asked = [{"file": name, "question": "Who?", "answer": name} for name in ("first", "second.mp4", "silent.mp4")]
        found = data(*names, questions=write(tmp_path / "q.jsonl", asked))
        clips = FileClips(*tiny, found, tmp_path / "store", "What happens?")
        assert clips.files() == [media / "first.mp4", media / "second.mp4"]
        assert [clips.task(number, 1, "key").questions for number in (0, 1)] == [
            (("Who?", "first"),),
            (("Who?", "second.mp4"),),
        ]
        assert [question.file for question in clips.asked_of_others] == ["silent.mp4"]
    with pytest.raises(KokaneeError, match=r"one/first.mp4 and two/first.mp4 both mean .*media.*/first.mp4"):
        FileClips(*tiny, data("one/first.mp4", "two/first.mp4"), tmp_path / "store", "What happens?")


def test_questions_about_no_clip_are_counted_and_told(tiny_checkpoint, data, tmp_path, caplog):
    names = ("first.mp4", "second.mp4", "silent.mp4", "sound.wav")
    asked = [{"file": name, "question": "Who?", "answer": "me"} for name in ("first", "fist", "third.mp4")]
    found = data(*names, questions=write(tmp_path / "q.jsonl", asked))
    with serving(judged) as (_, url):
        run(recipe_of(found, tiny_checkpoint, url), tmp_path / "run")
    assert "data.train: 2 questions of" in caplog.text and "such as one about fist, and are left out" in caplog.text


def test_a_question_finds_its_file_by_any_path_and_others_are_left_alone(tiny, data, tmp_path):
    asked = [{"file": f"/videos/{file}", "question": "Who?", "answer": "me"} for file in ("second.mp4", "other.mp4")]
    found = data("first.mp4", "second.mp4", questions=write(tmp_path / "q.jsonl", asked))
    clips = FileClips(*tiny, found, tmp_path / "store", "What happens?")
    assert [clips.task(number, 1, "key").questions for number in (0, 1)] == [(), (("Who?", "me"),)]
    choice = {"video": "first.mp4", "question": "What?", "options": ["A. a cat", "B. a dog"], "answer": "B"}
    found = data("first.mp4", questions=write(tmp_path / "mc.jsonl", [choice]))
    clips = FileClips(*tiny, found, tmp_path / "store", "What happens?")
    ((text, answer),) = clips.task(0, 1, "key").questions
    assert text.startswith("What?\nA. a cat\nB. a dog\n") and answer == "B", "as kokanee qa asks by letter"


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ({"file": "first.mp4", "question": "Who?"}, "line 1 is no question"),
        ({"file": "first.mp4", "question": "Who?", "answer": ["me"]}, "line 1 is no question"),
        ({"file": "other.mp4", "question": "Who?", "answer": "me"}, "No question of .* is about a file"),
    ],
)
def test_questions_that_cannot_be_used_are_told(tiny, data, tmp_path, line, told):
    found = data("first.mp4", questions=write(tmp_path / "q.jsonl", [line]))
    with pytest.raises(KokaneeError, match=told):
        FileClips(*tiny, found, tmp_path / "store", "What happens?")


@pytest.mark.parametrize(
    "events", [told(["second.mp4"])[1], [*told(["second.mp4"])[1], {"version": 1, "file": "first.mp4", "events": []}]]
)
def test_captions_without_events_are_told(tiny, data, tmp_path, events):
    found = data("first.mp4", "second.mp4")
    write(tmp_path / "events.jsonl", events)
    with pytest.raises(KokaneeError, match=r"1 of 2 captions of .* no events in .*, such as first.mp4"):
        FileClips(*tiny, found, tmp_path / "store", "What happens?")


def recipe_of(found: FileData, checkpoint: Path, url: str, clips: int = 4) -> MrdpoRecipe:
    apart = Path(str(found.captions)).parent / "apart"  # the same to look at, but other files
    apart.mkdir(exist_ok=True)
    for path in Path(found.videos).iterdir():
        if path.suffix in (".mp4", ".wav"):
            shutil.copy(path, apart)
    data = {"train": found.model_dump(), "validation": {**found.model_dump(), "videos": str(apart)}}
    more = {"judge": "openai:m", "judging": {"base_url": url}, "rounds": 1, "clips": clips, "validation_clips": 2}
    return MrdpoRecipe(**{**SMALL, **more, "model": str(checkpoint), "data": data})


def judged(request: dict[str, Any]) -> str:
    """A verdict that depends on the caption, as a language model's does."""
    text = request["messages"][-1]["content"]
    missed = ["Something moves."] if len(text) % 2 else []
    invented = ["A cat."] if len(text) % 3 == 0 else []
    lists = {"Missed Event": missed, "Incorrect Event": [], "Hallucination Event": invented}
    return json.dumps({name: len(lists[listing]) for name, listing in LISTS.items()} | lists)


@pytest.mark.parametrize("checkpoint", ["tiny_checkpoint", "salmonn2_checkpoint"])
def test_rounds_run_on_files_with_a_language_model_as_judge(checkpoint, request, data, tmp_path):
    tiny_checkpoint = request.getfixturevalue(checkpoint)
    found = data("first.mp4", "second.mp4", "silent.mp4", "sound.wav")
    with serving(judged) as (server, url):
        rounds = run(recipe_of(found, tiny_checkpoint, url), tmp_path / "run")
        asked = len(server.requests)
        assert rounds[1]["pairs"]["pairs"] > 0 and rounds[1]["pairs"]["unjudged"] == 0
        run(recipe_of(found, tiny_checkpoint, url), tmp_path / "run")
        assert len(server.requests) == asked
    assert {path.name for path in (tmp_path / "run" / "media" / "train").glob("clip-*")} == {
        f"clip-{number:06d}.safetensors" for number in range(4)
    }
    assert read_view(tmp_path / "run" / "media" / "train" / "clip-000000.safetensors").block.kind == "video"


def test_a_recipe_may_show_less_of_files_and_the_model_that_it_leaves_is_shown_as_much(
    tiny_checkpoint, tiny_stores, data, tmp_path
):
    found = data("first.mp4", "second.mp4", "silent.mp4", "sound.wav")
    with serving(judged) as (_, url):
        recipe = recipe_of(found, tiny_checkpoint, url).model_copy(update={"processor": {"max_frames": 4}})
        run(recipe, tmp_path / "run")
        for changed, told in (({}, "processor.max_frames"), ({"frames": 4}, "unknown setting 'frames'")):
            with pytest.raises(KokaneeError, match=told):
                run(recipe.model_copy(update={"processor": changed}), tmp_path / "run")
    grid_thw = read_view(tmp_path / "run" / "media" / "train" / "clip-000000.safetensors").block.grid_thw
    assert grid_thw is not None and grid_thw[0] == 2
    assert load(tmp_path / "run" / "model")[1].config.max_frames == 4
    with pytest.raises(KokaneeError, match="features of the world's clips were made with"):
        run(small_recipe(tiny_checkpoint, tiny_stores, processor={"max_frames": 4}), tmp_path / "world")


def test_media_are_given_up_after_their_round_where_that_is_asked_for(tiny_checkpoint, data, tmp_path):
    found = data("first.mp4", "second.mp4", "silent.mp4", "sound.wav")
    with serving(judged) as (_, url):
        recipe = recipe_of(found, tiny_checkpoint, url)
        kept = run(recipe, tmp_path / "kept")
        given_up = run(recipe.model_copy(update={"keep_media": False}), tmp_path / "given up")
    assert (tmp_path / "given up" / "model" / "model.safetensors").read_bytes() == (
        tmp_path / "kept" / "model" / "model.safetensors"
    ).read_bytes()
    assert kept[1]["greedy"] == given_up[1]["greedy"]
    assert not list((tmp_path / "given up" / "media" / "train").glob("*.safetensors"))
    assert len(list((tmp_path / "given up" / "media" / "validation").glob("*.safetensors"))) == 2


def test_too_many_unreadable_files_stop_the_run_until_more_are_allowed_for(tiny_checkpoint, data, media, tmp_path):
    names = ("first.mp4", "second.mp4", "silent.mp4", "sound.wav")
    for name in names:
        shutil.copy(media / name, tmp_path)
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    found = data(*names, "broken.mp4").model_copy(update={"videos": str(tmp_path)})
    told = r"1 of 5 files cannot be read, such as: .*broken.mp4.*higher data.train.unreadable, and start again"
    with serving(judged) as (_, url):
        with pytest.raises(KokaneeError, match=told):
            run(recipe_of(found, tiny_checkpoint, url, clips=5), tmp_path / "run")
        more = found.model_copy(update={"unreadable": 0.2})
        assert len(run(recipe_of(more, tiny_checkpoint, url, clips=5), tmp_path / "run")) == 2


def test_a_round_goes_on_with_the_clips_that_it_began_with(tiny_checkpoint, data, media, tmp_path):
    """A file that was left out and is mended meanwhile is left out of this round; one that was broken is told."""
    names = ("first.mp4", "second.mp4", "silent.mp4", "sound.wav")
    for name in names:
        shutil.copy(media / name, tmp_path)
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    found = data(*names, "broken.mp4").model_copy(update={"videos": str(tmp_path), "unreadable": 0.2})

    def stop(what: str, done: int, total: int, figures: dict[str, float]) -> None:
        if what == "round 1, judge":
            raise RuntimeError("stopped")

    with serving(judged) as (_, url):
        recipe = recipe_of(found, tiny_checkpoint, url, clips=5)
        for name in ("whole", "parts"):
            with pytest.raises(RuntimeError, match="stopped"):
                run_mrdpo(recipe, tmp_path / name, stop)
        shutil.copy(media / "second.mp4", tmp_path / "first.mp4")
        (tmp_path / "first.mp4").write_bytes(b"no video either")
        with pytest.raises(KokaneeError, match=r"1 of 4 files cannot be read.*first.mp4.* has begun with them"):
            run(recipe, tmp_path / "parts")
        shutil.copy(media / "first.mp4", tmp_path)
        run(recipe, tmp_path / "whole")
        shutil.copy(media / "first.mp4", tmp_path / "broken.mp4")
        run(recipe, tmp_path / "parts")
    assert weights(tmp_path / "parts") == weights(tmp_path / "whole")
    said = read_jsonl(tmp_path / "parts" / "round-01" / "samples.jsonl")
    assert sorted(record["clip"] for record in said) == sorted(names)


def test_files_that_are_held_out_are_not_learnt_from_in_another_clip(tiny_checkpoint, data, tmp_path, caplog):
    """Two captions of each file: what is checked by and what is learnt have no file in common."""
    found = data("first.mp4", "second.mp4", "silent.mp4", "sound.wav", "first.mp4", "second.mp4", "silent.mp4")
    settings = {name: SMALL[name] for name in ("max_new_tokens", "lora", "workers", "device")}
    settings |= {"stage": "rebirth", "model": str(tiny_checkpoint), "steps": 2, "batch_size": 1, "learning_rate": 0.01}
    settings |= {"evaluate_batches": 2, "data": {"train": found.model_dump(exclude={"events"})}}
    run_rebirth(RebirthRecipe(**settings), tmp_path / "run", quiet)
    captions = [{"file": "first.mp4", "caption": f"Number {number}."} for number in range(7)]
    write(tmp_path / "captions.jsonl", captions)
    assert "5 of 7" not in caplog.text  # with two captions of a file one is left out at most
    with pytest.raises(KokaneeError, match=r"2 captions are kept \(5: of a file that is held out\), but it takes 3"):
        run_rebirth(RebirthRecipe(**settings), tmp_path / "other", quiet)


def test_a_run_that_has_learnt_does_not_need_its_files_again(tiny_checkpoint, data, media, tmp_path):
    names = ("first.mp4", "second.mp4", "silent.mp4")
    for name in names:
        shutil.copy(media / name, tmp_path)
    found = data(*names).model_copy(update={"videos": str(tmp_path)})
    settings = {name: SMALL[name] for name in ("lora", "workers", "device")} | {"stage": "rebirth", "steps": 1}
    settings |= {"model": str(tiny_checkpoint), "batch_size": 1, "learning_rate": 0.01, "evaluate_batches": 1}
    recipe = RebirthRecipe(**settings, data={"train": found.model_dump(exclude={"events"})})
    made = run_rebirth(recipe, tmp_path / "run", quiet)
    before = weights(tmp_path / "run")
    (tmp_path / "second.mp4").write_bytes(b"no video")
    assert run_rebirth(recipe, tmp_path / "run", quiet) == made and weights(tmp_path / "run") == before


@pytest.mark.parametrize("wanted", [1, 2, 3, 5])
def test_no_file_is_learnt_from_and_checked_by(wanted):
    """Of clips (named by their files) in an order; where each has a file of its own, the order is as it was."""

    def made(files: str) -> str:
        clips = SimpleNamespace(origin=lambda number: files[number])
        run: Any = SimpleNamespace(
            recipe=SimpleNamespace(n_held_out=wanted), clips=clips, team=SimpleNamespace(is_main=True)
        )
        lessons = [Lesson(number, file, "", None) for number, file in enumerate(files)]
        return "".join(lesson.name for lesson in apart(run, lessons))

    assert made("abcdefgh") == "abcdefgh"
    found = made("abacbdaebc")
    assert not set(found[:wanted]) & set(found[wanted:]) and len(found[:wanted]) == wanted
    assert found == {1: "abcbdebc", 2: "aabcbdebc", 3: "aaabcbdebc", 5: "aaabbcdec"}[wanted]


def test_what_was_not_checked_before_a_run_was_stopped_is_checked(tiny_checkpoint, data, tmp_path, monkeypatch):
    """A folder of which nothing is done is begun with other settings as a new one is."""
    found = data("first.mp4", "second.mp4", "silent.mp4", "sound.wav")
    with serving(judged) as (_, url):
        recipe = recipe_of(found, tiny_checkpoint, url)
        with monkeypatch.context() as meanwhile:
            meanwhile.setattr("kokanee.mrdpo.remove_unfinished", lambda _: pytest.fail("stopped"))
            with pytest.raises(pytest.fail.Exception):
                run(recipe, tmp_path / "run")
        assert (tmp_path / "run" / "state.json").is_file()
        same = recipe.data.model_copy(update={"validation": recipe.data.train})
        with pytest.raises(KokaneeError, match=r"4 of 4 files of data.train are in data.validation too"):
            run(recipe.model_copy(update={"data": same}), tmp_path / "run")


def test_a_judge_that_nobody_is_at_is_told_before_anything_is_captioned(tiny_checkpoint, data, tmp_path):
    with serving(judged) as (_, url):
        pass
    with pytest.raises(KokaneeError, match=r"127.0.0.1:\d+/v1 cannot be reached"):
        run(recipe_of(data("first.mp4"), tiny_checkpoint, url), tmp_path / "run")
    assert not (tmp_path / "run" / "media").exists()


def test_files_that_are_not_there_are_told_before_anything_is_captioned(tiny_checkpoint, data, tmp_path):
    found = data("first.mp4", "second.mp4", "gone.mp4")
    told = r"data.train: 1 of 3 files are not there, such as .*gone.mp4.*data.train.videos"
    with serving(judged) as (server, url), pytest.raises(KokaneeError, match=told):
        run(recipe_of(found, tiny_checkpoint, url, clips=3), tmp_path / "run")
    assert not server.requests and not (tmp_path / "run" / "round-00").exists()


@pytest.mark.parametrize("kind", ["mrdpo", "rebirth"])
def test_clips_to_be_measured_by_that_are_learnt_from_are_told_before_anything_is_captioned(
    tiny_checkpoint, data, tmp_path, kind
):
    found = data("first.mp4", "second.mp4", "silent.mp4", "sound.wav")
    with serving(judged) as (server, url):
        recipe = recipe_of(found, tiny_checkpoint, url)
        apart = Path(recipe.data.validation.videos)  # pyright: ignore[reportAttributeAccessIssue]
        (apart / "sound.wav").unlink()
        (apart / "sound.wav").symlink_to(Path(found.videos) / "sound.wav")
        shared = recipe.model_dump(include=set(RebirthRecipe.model_fields) - {"stage", "keep"})
        with pytest.raises(KokaneeError, match=r"1 of 4 files of data.train are in data.validation too, such as .*wav"):
            if kind == "mrdpo":
                run(recipe, tmp_path / "run")
            else:
                run_rebirth(RebirthRecipe(stage="rebirth", **shared), tmp_path / "run", quiet)
        assert not server.requests and not (tmp_path / "run" / "state.json").exists()


def test_clips_of_the_world_are_heard_together_as_alone(tiny, tiny_stores, monkeypatch):
    monkeypatch.setattr("kokanee.clips.HEARD_TOGETHER", 2)
    clips, alone = (WorldClips(*tiny, WorldData(features=tiny_stores["train"]), "train") for _ in range(2))
    clips.readable(range(len(clips)), nothing, (0, 1))
    heard = {number: clips.heard[number] for number in range(len(clips))}
    assert len(clips) > 2 and all(clips.view(number).media["audio_embeds"] is heard[number] for number in heard)
    assert all(torch.allclose(alone.view(number).media["audio_embeds"], heard[number], atol=1e-6) for number in heard)
    clips.forget([1])
    assert set(clips.heard) == set(heard) - {1}
