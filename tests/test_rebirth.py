"""Laws of rebirth tuning: the student learns the captions that are kept, whoever made them; a run can be stopped."""

from __future__ import annotations

import copy
import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from kokanee.adapters import load_adapter, merge
from kokanee.captioner import Captioner
from kokanee.checkpoints import load
from kokanee.defaults import Defaults
from kokanee.errors import KokaneeError
from kokanee.events import Counts
from kokanee.formats import read_json, read_jsonl
from kokanee.protocol import LISTS
from kokanee.rebirth import Keep, RebirthRecipe, kept_line, run_rebirth, table
from kokanee.runs import defaults_of
from model_server import serving
from mrdpo_runs import quiet
from together import run_together

SMALL: dict[str, Any] = {
    "stage": "rebirth",
    "steps": 3,
    "max_new_tokens": 8,
    "caption_batch": 2,
    "keep": {"cut_off": True, "min_words": 0},
    "lora": {"r": 4, "alpha": 8, "dropout": 0.1},
    "questions": 2,
    "validation_clips": 3,
    "batch_size": 1,
    "evaluate_batches": 1,
    "learning_rate": 0.01,
    "save_every": 1,
    "log_every": 1,
    "workers": 0,
    "device": "cpu",
}


@pytest.fixture
def recipe(tiny_checkpoint, tiny_stores):
    def build(**replaced: Any) -> RebirthRecipe:
        data = {split: {"features": folder} for split, folder in tiny_stores.items()}
        settings = {**SMALL, "model": str(tiny_checkpoint), "teacher": str(tiny_checkpoint), "data": data, **replaced}
        return RebirthRecipe(**copy.deepcopy(settings))

    return build


def weights(folder: Path) -> bytes:
    return (folder / "model" / "model.safetensors").read_bytes()


def test_what_is_learnt_is_what_the_teacher_says_of_the_training_clips(recipe, tmp_path):
    made = run_rebirth(recipe(), tmp_path, quiet)
    said = {record["clip"]: record["captions"][0] for record in read_jsonl(tmp_path / "captions.jsonl")}
    kept = {record["clip"]: record for record in read_jsonl(tmp_path / "kept.jsonl")}
    assert len(said) == 6 and {clip: record["caption"] for clip, record in kept.items()} == said
    assert made["captions"]["captions"] == made["captions"]["kept"] == 6 and made["captions"]["dropped"] == {}
    assert made["captions"]["questions"] > 6 and made["captions"]["total"] > 0
    assert made["before"]["clips"] == made["after"]["clips"] == 3 and made["after"]["kl"] != 0
    assert "before" in "".join(table(made)) and "6 of 6" in kept_line(made)


def test_the_student_is_its_base_with_the_adapter_merged(recipe, tiny_checkpoint, tmp_path):
    run_rebirth(recipe(), tmp_path, quiet)
    model, _ = load(tiny_checkpoint, dtype="float32")
    merged = merge(load_adapter(model, tmp_path / "adapter"))
    left, _ = load(tmp_path / "model", dtype="float32")
    before, _ = load(tiny_checkpoint, dtype="float32")
    pairs = zip(merged.named_parameters(), left.named_parameters(), before.named_parameters(), strict=True)
    changed = {name for (name, one), (_, two), (_, old) in pairs if torch.equal(one, two) and not torch.equal(two, old)}
    assert {name.split(".")[-2] for name in changed} == {"q_proj", "k_proj", "v_proj"}
    assert read_json(tmp_path / "model" / "captioner.json") == read_json(tiny_checkpoint / "captioner.json")


def test_a_run_that_is_stopped_anywhere_ends_with_the_same_weights(recipe, tmp_path):
    run_rebirth(recipe(), tmp_path / "whole", quiet)
    asked: Counter[str] = Counter()

    def stopping(what: str, done: int, total: int, figures: dict[str, float]) -> None:
        asked[f"{what} {done}"] += 1
        if asked[f"{what} {done}"] == 1:
            raise InterruptedError

    for _ in range(60):
        try:
            made = run_rebirth(recipe(), tmp_path / "often", stopping)
            break
        except InterruptedError:
            pass
    assert len(asked) > 10 and weights(tmp_path / "often") == weights(tmp_path / "whole")
    whole = read_json(tmp_path / "whole" / "metrics.json")
    for figures in (made, whole):  # how long it took is another matter
        del figures["training"]
    assert made == whole
    assert run_rebirth(recipe(), tmp_path / "often", quiet)["after"] == made["after"]


def test_a_run_in_bfloat16_that_recomputes_activations_learns_without_complaints(recipe, tmp_path, recwarn):
    made = run_rebirth(recipe(dtype="bfloat16", gradient_checkpointing=True), tmp_path, quiet)
    assert made["training"]["loss"] > 0 and made["after"]["greedy"]["total"] > 0
    assert load(tmp_path / "model")[0].dtype == torch.bfloat16
    assert not [one for one in recwarn if "use_reentrant" in str(one.message)]


def test_two_processes_learn_what_one_does_with_twice_the_batches(recipe, tmp_path):
    still = {"r": 4, "alpha": 8, "dropout": 0.0}
    run_rebirth(recipe(accumulate=2, evaluate_batches=2, lora=still), tmp_path / "one", quiet)
    one, two = (read_jsonl(tmp_path / "one" / name) for name in ("captions.jsonl", "kept.jsonl"))
    script = tmp_path / "script.py"
    script.write_text(
        "import sys\nfrom pathlib import Path\nfrom kokanee.launch import as_worker\n"
        "from kokanee.rebirth import RebirthRecipe, run_rebirth\nfrom mrdpo_runs import quiet\n"
        "with as_worker():\n"
        "    run_rebirth(RebirthRecipe.model_validate_json(sys.argv[1]), Path(sys.argv[2]), quiet)\n"
    )
    settings = recipe(processes=2, evaluate_batches=2, lora=still)
    run_together(script, settings.model_dump_json(), str(tmp_path / "two"))
    assert read_jsonl(tmp_path / "two" / "captions.jsonl") == one and read_jsonl(tmp_path / "two" / "kept.jsonl") == two
    alone, shared = (load(tmp_path / name / "model", dtype="float32")[0] for name in ("one", "two"))
    for (name, weight), (_, other) in zip(alone.named_parameters(), shared.named_parameters(), strict=True):
        assert torch.allclose(weight, other, rtol=1e-4, atol=1e-5), name


def test_without_a_teacher_the_captions_of_the_data_are_learnt(recipe, tmp_path):
    run_rebirth(recipe(teacher=None), tmp_path, quiet)
    assert not (tmp_path / "captions.jsonl").exists()
    told = [record["caption"] for record in read_jsonl(tmp_path / "kept.jsonl")]
    assert len(told) == 6 and all(caption.endswith(".") for caption in told)


def test_a_clip_whose_caption_is_not_kept_still_asks_its_questions(recipe, tmp_path):
    made = run_rebirth(recipe(teacher=None, keep={"max_words": 30, "min_words": 5}), tmp_path, quiet)
    captions = made["captions"]
    assert 0 < captions["kept"] < 6 and sum(captions["dropped"].values()) == 6 - captions["kept"]
    dropped = [record for record in read_jsonl(tmp_path / "kept.jsonl") if record["dropped"]]
    assert dropped and all(not 5 <= len(record["caption"].split()) <= 30 for record in dropped)
    assert captions["questions"] > 2 * captions["kept"]


@pytest.mark.parametrize(
    ("rules", "caption", "finished", "counts", "why"),
    [
        ({}, "a dog runs", True, None, ""),
        ({}, "a dog runs", False, None, "cut off"),
        ({"cut_off": True}, "a dog runs", False, None, ""),
        ({}, "", True, None, "too short"),
        ({"min_words": 4}, "a dog runs", True, None, "too short"),
        ({"max_words": 2}, "a dog runs", True, None, "too long"),
        ({"max_repetition": 0.5}, "a dog runs over here now " * 3, True, None, "repeats itself"),
        ({"max_repetition": 0.5}, "a dog runs over here now", True, None, ""),
        ({"max_error": 0.5}, "a dog runs", True, Counts(1, 1, 0, 4), ""),
        ({"max_error": 0.5}, "a dog runs", True, Counts(1, 1, 1, 4), "too much missed or wrong"),
        ({"max_hall": 0.25}, "a dog runs", True, Counts(3, 1, 0, 4), ""),
        ({"max_hall": 0.25}, "a dog runs", True, Counts(0, 1, 1, 4), "too much wrong"),
        ({"max_hall": 0.25}, "a dog runs", True, None, "not judged"),
    ],
)
def test_captions_are_kept_by_rules(rules, caption, finished, counts, why):
    assert Keep(**rules).reason(caption, finished, True, counts) == why


def test_a_caption_of_which_nothing_is_known_is_not_held_against_events():
    assert Keep(max_error=0.1).reason("a dog runs", True, False, None) == ""


def test_another_teacher_or_setting_is_refused_in_the_same_folder(recipe, tiny_model, tiny_processor, tmp_path):
    from kokanee.checkpoints import save

    with torch.no_grad():
        tiny_model.lm_head.weight.add_(0.01)
    other = save(tiny_model, tiny_processor, tmp_path / "other")
    run_rebirth(recipe(), tmp_path / "run", quiet)
    with pytest.raises(KokaneeError, match=r"qa_weight: 1\.0 before, 0\.5 now"):
        run_rebirth(recipe(qa_weight=0.5), tmp_path / "run", quiet)
    with pytest.raises(KokaneeError, match="other teacher than before"):
        run_rebirth(recipe(teacher=str(other)), tmp_path / "run", quiet)


def test_too_few_captions_are_told_with_the_reasons(recipe, tmp_path):
    with pytest.raises(KokaneeError, match=r"0 captions are kept \(6: too short\), but it takes 2"):
        run_rebirth(recipe(keep={"min_words": 1000, "cut_off": True}), tmp_path, quiet)


def test_too_few_clips_are_told_before_anything_is_begun(recipe, tmp_path):
    for replaced, message in (
        ({"batch_size": 9}, r"There are 6 clips, but it takes 18: 9 for one step and 9 to check by"),
        ({"clips": 7}, r"clips: 7, but there are 6\. Lower it"),
        ({"clips": 1}, r"There are 1 clips, but it takes 2"),
    ):
        with pytest.raises(KokaneeError, match=message):
            run_rebirth(recipe(**replaced), tmp_path / "run", quiet)
    assert run_rebirth(recipe(clips=2), tmp_path / "run", quiet)["captions"]["captions"] == 2


@pytest.fixture
def videos(media, tmp_path) -> Path:
    """A folder with three videos, one of them deeper, a picture, and what is no video."""
    folder = tmp_path / "videos"
    (folder / "inside").mkdir(parents=True)
    links = {"a.mp4": "first.mp4", "inside/b.mp4": "second.mp4", "c.mp4": "silent.mp4", "thumbnail.png": "still.png"}
    for name, target in links.items():
        (folder / name).symlink_to(media / target)
    (folder / "broken.mp4").write_bytes(b"no video")
    return folder


def lines(path: Path, *records: dict[str, Any]) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def test_videos_are_captioned_by_the_teacher_and_learnt_by_a_student_that_sees_otherwise(
    recipe, tiny_checkpoint, videos, tmp_path
):
    """Files instead of features; the student looks at fewer frames. What cannot be read is left out and told, and what
    was noted of the student before is not said of what came of it."""
    asked = lines(tmp_path / "q.jsonl", {"file": "inside/b.mp4", "question": "What moves?", "answer": "dots"})
    student = tmp_path / "student"
    Captioner.from_pretrained(tiny_checkpoint, max_frames=8).save_pretrained(student)
    Defaults("What?", 8, "knows nothing").save(student)
    data = {"train": {"videos": str(videos), "questions": asked, "unreadable": 0.25}}
    made = run_rebirth(recipe(model=str(student), data=data), tmp_path / "run", quiet)
    assert (made["captions"]["captions"], made["captions"]["questions"]) == (3, 1) and "before" not in made
    assert {Defaults.of(tmp_path / "run" / name) for name in ("model", "adapter")} == {Defaults("What?", 8)}
    of_world = recipe(model=str(student))
    assert defaults_of(of_world, of_world.data.train) == Defaults.of(student)
    said = {record["file"]: record["caption"] for record in read_jsonl(tmp_path / "run" / "captions.jsonl")}
    teacher = Captioner.from_pretrained(tiny_checkpoint)
    assert said == {
        name: teacher.caption(videos / name, max_new_tokens=8).text for name in ("a.mp4", "c.mp4", "inside/b.mp4")
    }
    with pytest.raises(KokaneeError, match=r"1 of 4 files have no caption, such as: .*broken"):
        run_rebirth(recipe(data={"train": {**data["train"], "unreadable": 0.0}}), tmp_path / "strict", quiet)
    (videos / "broken.mp4").unlink()
    with pytest.raises(KokaneeError, match="other videos than before"):
        run_rebirth(recipe(model=str(student), data=data), tmp_path / "run", quiet)


def test_what_the_teacher_told_serves_on_where_too_many_files_cannot_be_read(recipe, videos, tmp_path, monkeypatch):
    """In the same folder with a higher share, and in another as data.train.captions."""

    def of(unreadable: float, captions: str | None = None) -> RebirthRecipe:
        train = {"videos": str(videos), "unreadable": unreadable, "captions": captions}
        return recipe(data={"train": train}, **({"teacher": None} if captions else {}))

    run_rebirth(of(0.25), tmp_path / "whole", quiet)
    with pytest.raises(KokaneeError, match=r"1 of 4 files have no caption.*higher data.train.unreadable, and start"):
        run_rebirth(of(0.0), tmp_path / "run", quiet)
    monkeypatch.setattr("kokanee.rebirth.teacher_of", lambda *_: pytest.fail("captioned twice"))
    made = run_rebirth(of(0.25), tmp_path / "run", quiet)
    assert made["captions"]["captions"] == 3 and weights(tmp_path / "run") == weights(tmp_path / "whole")
    run_rebirth(of(0.0), tmp_path / "run", quiet)  # what is learnt stays as it is
    captions = str(tmp_path / "run" / "captions.jsonl")
    run_rebirth(of(0.0, captions), tmp_path / "other", quiet)
    assert weights(tmp_path / "other") == weights(tmp_path / "whole")


def test_a_file_that_was_mended_after_the_run_stopped_is_captioned(recipe, videos, media, tmp_path):
    data = {"train": {"videos": str(videos), "unreadable": 0.0}}
    with pytest.raises(KokaneeError, match="none is no folder here"):
        run_rebirth(recipe(data={"train": {"videos": str(tmp_path / "none")}}), tmp_path / "run", quiet)
    with pytest.raises(KokaneeError, match="1 of 4 files have no caption"):
        run_rebirth(recipe(data=data), tmp_path / "run", quiet)
    (videos / "broken.mp4").write_bytes((media / "first.mp4").read_bytes())
    assert run_rebirth(recipe(data=data), tmp_path / "run", quiet)["captions"]["captions"] == 4


def test_a_teacher_does_not_caption_what_the_student_is_measured_by_nor_more_than_is_wanted(recipe, videos, tmp_path):
    (videos / "broken.mp4").unlink()
    captions = lines(tmp_path / "captions.jsonl", {"file": "c.mp4", "caption": "Something moves."})
    events = lines(tmp_path / "events.jsonl", {"version": 1, "file": "c.mp4", "events": [{"text": "Something moves."}]})
    validation = {"videos": str(videos), "captions": captions, "events": events}
    data = {"train": {"videos": str(videos)}, "validation": validation}
    with serving(lambda request: '{"Missed events": []}') as (_, url):
        how = {"judge": "openai:m", "judging": {"base_url": url}, "unjudged": 1.0, "data": data}
        with pytest.raises(KokaneeError, match="has a verdict, so nothing can be measured"):
            run_rebirth(recipe(**how), tmp_path / "run", quiet)
    assert [record["file"] for record in read_jsonl(tmp_path / "run" / "captions.jsonl")] == ["a.mp4", "inside/b.mp4"]
    run_rebirth(recipe(data={"train": {"videos": str(videos)}}, clips=2), tmp_path / "two", quiet)
    assert len(read_jsonl(tmp_path / "two" / "captions.jsonl")) == 2


def test_a_server_can_be_the_teacher(recipe, videos, tmp_path, monkeypatch):
    (videos / "broken.mp4").unlink()

    def told(request: dict[str, Any]) -> str:
        kinds = [part["type"] for part in request["messages"][0]["content"] if isinstance(part, dict)]
        return f"There are {kinds.count('image_url')} frames and {kinds.count('input_audio')} sounds."

    with serving(told) as (_, url):
        teaching = {"base_url": url, "use": ["video"], "frames": {"max_frames": 2}}
        how = {"teacher": "openai:m", "teaching": teaching, "data": {"train": {"videos": str(videos)}}}
        run_rebirth(recipe(**how), tmp_path / "run", quiet)
    said = {record["caption"] for record in read_jsonl(tmp_path / "run" / "captions.jsonl")}
    assert said == {"There are 2 frames and 0 sounds."}
    with pytest.raises(KokaneeError, match="cannot be reached"):
        run_rebirth(recipe(**how), tmp_path / "away", quiet)
    assert not (tmp_path / "away").exists()


def test_captions_are_judged_where_events_are_known_and_dropped_by_what_is_wrong(recipe, videos, media, tmp_path):
    """Two files have events; of one the judge finds that the caption invents something. A file that is of another
    length when the run goes on changes nothing of that."""
    (videos / "broken.mp4").unlink()
    records = [
        {"version": 1, "file": name, "events": [{"text": f"{name} moves."}]} for name in ("a.mp4", "inside/b.mp4")
    ]
    events = lines(tmp_path / "events.jsonl", *records)

    def judged(request: dict[str, Any]) -> str:
        bad = "a.mp4 moves" in json.dumps(request)
        lists = {"Missed": [], "Incorrect": [], "Hallucination": ["It sings."] if bad else []}
        return json.dumps(
            {**{name: len(made) for name, made in lists.items()}, **{LISTS[name]: made for name, made in lists.items()}}
        )

    with serving(judged) as (_, url):
        data = {"train": {"videos": str(videos), "events": events}}
        how = {"judge": "openai:m", "judging": {"base_url": url}, "keep": {"cut_off": True, "max_hall": 0.5}}

        def stop(what: str, done: int, total: int, figures: dict[str, float]) -> None:
            if what == "train":
                raise InterruptedError

        with pytest.raises(InterruptedError):
            run_rebirth(recipe(data=data, **how), tmp_path / "run", stop)
        (videos / "a.mp4").unlink()
        shutil.copy(media / "second.mp4", videos / "a.mp4")
        other = lines(tmp_path / "events.jsonl", {"version": 1, "file": "a.mp4", "events": [{"text": "It rains."}]})
        with pytest.raises(KokaneeError, match="other events than before"):
            run_rebirth(recipe(data=data, **how), tmp_path / "run", quiet)
        lines(Path(other), *records)
        made = run_rebirth(recipe(data=data, **how), tmp_path / "run", quiet)
    assert made["captions"]["dropped"] == {"too much wrong": 1} and made["captions"]["kept"] == 2
    kept = {record["clip"]: record["dropped"] for record in read_jsonl(tmp_path / "run" / "kept.jsonl")}
    assert kept == {"a.mp4": "too much wrong", "c.mp4": "", "inside/b.mp4": ""}


def test_settings_that_would_do_nothing_or_contradict_each_other_are_refused(recipe, media):
    files = {"train": {"videos": str(media)}}
    for replaced, said in (
        ({"teacher": None, "data": files}, "give either a teacher"),
        ({"data": {"train": {"videos": str(media), "captions": "x"}}}, "give either a teacher"),
        ({"data": {"train": files["train"], "validation": files["train"]}}, "needs captions and events"),
        ({"data": files, "keep": {"max_error": 0.5}}, "need data.train.events and a judge"),
        ({"teacher": "openai:m"}, "are for files"),
        ({"question": "What?"}, "are for files"),
        ({"data": files, "teaching": {"frames": {"max_frame": 1}}}, "max_frame"),
    ):
        with pytest.raises(ValidationError, match=said):
            recipe(**replaced)
