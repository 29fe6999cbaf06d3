"""Laws of the command: data on standard output and nothing else, one message for a mistake, an honest exit code."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig, get_peft_model
from typer.testing import CliRunner

import kokanee
from kokanee.captioner import Captioner
from kokanee.cli import app
from kokanee.defaults import Defaults
from kokanee.errors import KokaneeError
from kokanee.formats import read_jsonl

runner = CliRunner()
WIDE = {"COLUMNS": "1000", "NO_COLOR": "1", "TERM": "dumb"}
"""Messages are on one line then, whatever the terminal, and however long the names of files."""


def kk(*words: Any, code: int = 0) -> Any:
    result = runner.invoke(app, [str(word) for word in words], env=WIDE)
    assert result.exit_code == code, result.output + repr(result.exception)
    assert code != 1 or result.stderr.count("Error:") == 1
    return result


@pytest.fixture
def cap(tiny_checkpoint):
    return lambda *words, code=0: kk("caption", "--model", tiny_checkpoint, *words, code=code)


@pytest.fixture(scope="module")
def captioner(tiny_checkpoint) -> Captioner:
    return Captioner.from_pretrained(tiny_checkpoint)


@pytest.mark.parametrize("command", ["--help", "caption --help", "world make --help", "--version"])
def test_help_loads_nothing_heavy(command):
    code = (
        "import sys; sys.argv[1:] = sys.argv[1].split(); from kokanee.cli import main\n"
        "try: main()\n"
        "except SystemExit as done: assert not done.code\n"
        "heavy = {'torch', 'transformers', 'av', 'numpy', 'accelerate'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code, command], check=True, capture_output=True)


def test_importing_kokanee_loads_no_torch():
    code = "import sys, kokanee; kokanee.__version__; assert not {'torch', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert kokanee.Captioner is Captioner and issubclass(kokanee.KokaneeError, Exception)
    assert all(getattr(kokanee, name) for name in kokanee.__all__)
    with pytest.raises(AttributeError, match="Captain"):
        _ = kokanee.Captain


def test_version_and_env_name_the_same_version():
    assert kk("--version").stdout == f"kokanee {kokanee.__version__}\n"
    lines = dict(line.split(": ", 1) for line in kk("env").stdout.splitlines())
    assert lines["kokanee"] == kokanee.__version__
    assert {"python", "platform", "torch", "transformers", "av", "devices", "ffmpeg"} <= lines.keys()
    assert "libavcodec" in lines["ffmpeg"] and "cpu" in lines["devices"]


def test_env_works_where_packages_are_missing(monkeypatch):
    for name in ("av", "torch"):
        monkeypatch.setitem(sys.modules, name, None)
    found = kk("env").stdout
    assert "devices: torch cannot be imported" in found and "ffmpeg: av cannot be imported" in found


def test_one_files_caption_is_all_of_standard_output(cap, captioner, media):
    found = cap(media / "silent.mp4")
    assert found.stdout == captioner.caption(media / "silent.mp4").text + "\n"
    assert "no sound track" in found.stderr


def test_options_reach_the_captioner(cap, captioner, media):
    path = media / "first.mp4"
    found = cap(
        path, "--question", "Who?", "--start", 1, "--end", 3, "--video-only", "--max-new-tokens", 5, "-f", "json"
    )
    record = json.loads(found.stdout)
    wanted = captioner.caption(path, "Who?", 1, 3, use=("video",), max_new_tokens=5)
    assert record["captions"][0]["text"] == wanted.text and record["captions"][0]["end_s"] == 3
    assert record["question"] == "Who?" and record["settings"]["use"] == ["video"]
    assert "1 of 1 captions cut off at 5 tokens" in found.stderr


def test_samples_follow_from_the_seed(cap, captioner, media):
    path = media / "first.mp4"
    record = json.loads(cap(path, "--samples", 2, "--seed", 4, "--format", "jsonl").stdout)
    assert [c["text"] for c in record["captions"]] == [c.text for c in captioner.samples(path, 2, seed=4)]
    assert cap(path, "--samples", 2, "--seed", 4).stdout.startswith("[sample 1]\n" + record["captions"][0]["text"])


def test_subtitles_of_one_file_go_to_standard_output_or_a_file(cap, media, tmp_path):
    found = cap(media / "first.mp4", "--format", "srt", "--every", 2.5).stdout
    assert "00:00:00,000 --> 00:00:02,500" in found and "00:00:02,500 --> 00:00:05,000" in found
    assert cap(media / "first.mp4", "--every", 2.5, "--out", tmp_path / "deep" / "a.srt").stdout == ""
    assert (tmp_path / "deep" / "a.srt").read_text() == found
    cap(media / "first.mp4", "--format", "vtt", "--out", tmp_path)
    assert (tmp_path / "first.vtt").read_text().startswith("WEBVTT\n\n00:00:00.000 --> 00:00:05.000\n")


def test_intervals_as_text(cap, media):
    assert cap(media / "first.mp4", "--every", 2.5).stdout.startswith("[00:00:00.000 - 00:00:02.500]\n")


def test_a_folder_becomes_records_and_a_second_run_adds_none(cap, media, tmp_path):
    out = tmp_path / "out.jsonl"
    first = cap(media, "--out", out)
    assert first.stdout == "" and "5 captioned, 0 failed" in first.stderr
    before = out.read_bytes()
    assert [Path(record["file"]).name for record in read_jsonl(out)] == sorted(path.name for path in media.iterdir())
    assert "5 captioned (5 of them before), 0 failed" in cap(media, "--out", out).stderr
    assert out.read_bytes() == before
    assert "question: 'Describe the video.' before, 'Why?' now" in cap(media, "-o", out, "-q", "Why?", code=1).stderr


def test_several_files_without_out_are_records_on_standard_output(cap, media):
    found = cap(media / "*.mp4", "--batch-size", 2)
    assert [Path(json.loads(line)["file"]).name for line in found.stdout.splitlines()] == [
        "first.mp4",
        "second.mp4",
        "silent.mp4",
    ]
    text = cap(media / "first.mp4", media / "still.png", "--format", "txt").stdout
    assert text.startswith(f"{media / 'first.mp4'}\n") and f"\n\n{media / 'still.png'}\n" in text


def test_a_folder_of_subtitles_has_one_for_each_clip_and_goes_on_from_its_records(cap, media, tmp_path):
    clips, out = media / "*.mp4", tmp_path / "subtitles"
    cap(clips, "--format", "srt", "--every", 2.5, "--out", out)
    names = ["captions.jsonl", "first.srt", "second.srt", "silent.srt"]
    assert sorted(path.name for path in out.iterdir()) == names
    before = (out / "first.srt").read_text()
    (out / "first.srt").unlink()
    assert "3 captioned (3 of them before)" in cap(clips, "--format", "srt", "--every", 2.5, "--out", out).stderr
    assert (out / "first.srt").read_text() == before


def test_a_file_of_ones_own_is_not_replaced_where_the_run_has_no_captions_of_it(cap, media, tmp_path):
    videos, out = tmp_path / "videos", tmp_path / "out"
    videos.mkdir()
    shutil.copy(media / "first.mp4", videos)
    (videos / "bad.mp4").write_text("no video")
    cap(videos, "--format", "srt", "--out", out, code=1)
    (out / "bad.srt").write_text("mine")
    shutil.copy(media / "second.mp4", videos / "bad.mp4")
    told = cap(videos, "--format", "srt", "--out", out, code=1).stderr
    assert "bad.srt is there" in told and (out / "bad.srt").read_text() == "mine"
    cap(videos, "--format", "srt", "--out", out, "--overwrite")
    assert (out / "bad.srt").read_text() != "mine"


def test_a_file_that_fails_is_named_recorded_and_changes_the_exit_code(cap, media, tmp_path):
    bad, out = tmp_path / "bad.mp4", tmp_path / "out.jsonl"
    bad.write_text("no video")
    found = cap(media / "first.mp4", bad, "--out", out, code=1)
    assert "1 captioned, 1 failed" in found.stderr and f"{bad} is not a media file" in found.stderr
    assert [("error" in record) for record in read_jsonl(out)] == [False, True]
    assert f"Error: {bad} is not a media file" in cap(bad, code=1).stderr


def test_ctrl_c_keeps_what_is_done(cap, media, tmp_path, monkeypatch):
    answer = Captioner.answer
    calls = []

    def stopped(*args):
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return answer(*args)

    monkeypatch.setattr(Captioner, "answer", stopped)
    found = cap(media, "--out", tmp_path / "out.jsonl", code=130)
    assert "the same command again goes on" in found.stderr and "Stopped." in found.stderr
    assert len(read_jsonl(tmp_path / "out.jsonl")) == 2
    monkeypatch.undo()
    assert "5 captioned (2 of them before)" in cap(media, "--out", tmp_path / "out.jsonl").stderr


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--audio-only", "--video-only"], "cannot be used together"),
        (["--format", "mp3"], "mp3"),
        (["--out", "a.mp4"], "ends in none of txt"),
        (["--samples", "2", "--format", "srt"], "one caption at a time"),
        (["--samples", "0"], "samples"),
        (["--samples", "2", "--temperature", "0"], "samples are the same"),
        (["--tempo", "3"], "No such option"),
        (["b.mp4", "--format", "srt"], "need a folder"),
        (["b.mp4", "--format", "srt", "--out", "a.srt"], "need a folder"),
        (["--out", "{clip}", "--format", "txt"], "would be overwritten"),
        (["--out", "{folder}/../{name}/first.mp4", "--format", "txt"], "would be overwritten"),
        (["--out", "{folder}/../{name}/first.mp4", "--format", "jsonl"], "would be overwritten"),
        (["--start", "5", "--end", "3"], "3 is not after the start at 5"),
        (["--question", " "], "is empty"),
        (["--end", "0"], "0 is not after the start at 0"),
        (["--set", "max_frames"], "'max_frames' is not KEY=VALUE"),
    ],
)
def test_wrong_usage_exits_with_2_and_loads_no_model(media, words, reason, monkeypatch):
    monkeypatch.setattr(Captioner, "from_pretrained", None)
    clip = str(media / "first.mp4")
    names = {"{clip}": clip, "{folder}": str(media), "{name}": media.name}
    for name, there in names.items():
        words = [word.replace(name, there) for word in words]
    found = kk("caption", clip, *words, code=2)
    assert reason in found.stderr and found.stdout == ""


@pytest.mark.parametrize(
    ("name", "remedy"), [("no/such.mp4", "Check the path"), ("https://host/clip.mp4", "Download it first")]
)
def test_a_file_that_is_not_there_is_one_message_before_a_model_is_loaded(name, remedy, monkeypatch):
    monkeypatch.setattr(Captioner, "from_pretrained", None)
    found = kk("caption", name, code=1)
    assert f"{name} is not there. {remedy}" in found.stderr


def test_what_is_to_be_known_of_a_checkpoint_is_told(captioner, media, tmp_path):
    Captioner(captioner.model, captioner.processor, Defaults("Why?", 5, "sees red only")).save_pretrained(tmp_path)
    found = kk("caption", "--model", tmp_path, media / "silent.mp4")
    assert f"{tmp_path}: sees red only" in found.stderr and "red only" not in found.stdout


def test_an_output_without_room_is_one_message(media):
    command = [sys.executable, "-c", "from kokanee.cli import main; main()", "env"]
    if not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    with open("/dev/full", "w") as full:
        found = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert found.returncode == 1 and found.stderr.startswith("Error: The output cannot be written: No space left")
    assert "Traceback" not in found.stderr and "Exception" not in found.stderr


def test_weights_without_room_are_one_message_and_leave_nothing(tiny_checkpoint, tmp_path):
    """No file may become longer than what comes before the weights."""
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, limits[1]))
    try:
        found = kk("convert", tiny_checkpoint, tmp_path / "out", code=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "Error: The output cannot be written: File too large. Make room" in found.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--top-p", "2"], "top_p is 2.0"),
        (["--model", "no/where/at/all"], "no/where/at/all"),
        (["--device", "warp9"], "device warp9"),
        (["--dtype", "int8"], "int8 is no type"),
        (["--set", "max_frame=3"], "unknown setting 'max_frame' (did you mean 'max_frames'?)"),
        (["--set", "device=cpu"], "unknown setting 'device'"),
        (["--set", "interval_s=0"], "interval_s"),
        (["--start", "99"], "99 s"),
    ],
)
def test_mistakes_are_one_message_without_a_traceback(cap, media, words, reason):
    found = cap(media / "first.mp4", *words, code=1)
    assert reason in found.stderr and "Traceback" not in found.output and found.stdout == ""


@pytest.mark.parametrize("out", ["file/a.txt", "file/a.jsonl", "file/folder"])
def test_a_place_that_cannot_be_written_is_one_message_before_a_model_is_loaded(media, tmp_path, out, monkeypatch):
    monkeypatch.setattr(Captioner, "from_pretrained", None)
    (tmp_path / "file").touch()
    found = kk(
        "caption",
        media / "first.mp4",
        "--format",
        out.split(".")[1] if "." in out else "srt",
        "--out",
        tmp_path / out,
        code=1,
    )
    assert "file is in the way" in found.stderr


def test_settings_of_the_processor_reach_it_and_are_recorded(cap, captioner, media):
    words = ("--set", "max_frames=8", "--set", "positions=as_published", "--format", "json")
    record = json.loads(cap(media / "first.mp4", *words).stdout)
    settings = record["settings"]["processor"]
    assert (settings["max_frames"], settings["positions"]) == (8, "as_published")
    assert settings == captioner.processor.config.model_dump(mode="json") | {
        "max_frames": 8,
        "positions": "as_published",
    }


def test_files_that_are_not_from_this_run_are_replaced_only_if_asked(cap, media, tmp_path):
    words = (media / "first.mp4", media / "second.mp4", "--format", "txt", "--out", tmp_path)
    (tmp_path / "second.txt").write_text("my notes")
    found = cap(*words, code=1)
    assert f"{tmp_path / 'second.txt'} is there" in found.stderr and "--overwrite" in found.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["second.txt"]
    assert (tmp_path / "second.txt").read_text() == "my notes"
    cap(*words, "--overwrite")
    cap(*words)
    assert (tmp_path / "second.txt").read_text() != "my notes"


def test_an_input_is_not_overwritten_by_the_captions_of_another_name_for_its_folder(media, tmp_path, monkeypatch):
    monkeypatch.setattr(Captioner, "from_pretrained", None)
    clip = tmp_path / "clip.txt"
    clip.write_bytes((media / "silent.mp4").read_bytes())
    assert "would be overwritten" in kk("caption", clip, "--format", "txt", "--out", tmp_path, code=2).stderr


def test_a_dash_is_standard_output(cap, captioner, media):
    found = cap(media / "silent.mp4", "--out", "-")
    assert found.stdout == captioner.caption(media / "silent.mp4").text + "\n"
    assert not Path("-").exists()


def test_text_says_the_same_on_standard_output_and_in_a_file(cap, media, tmp_path):
    for words in (("--every", 10), ("--samples", 2), ()):
        printed = cap(media / "silent.mp4", *words).stdout
        cap(media / "silent.mp4", *words, "--out", tmp_path / "a.txt", "--overwrite")
        assert (tmp_path / "a.txt").read_text() == printed
        assert printed.startswith("[") == bool(words)


def test_one_files_caption_replaces_nothing_that_is_there(cap, media, tmp_path):
    (tmp_path / "mine.txt").write_text("precious")
    found = cap(media / "silent.mp4", "--out", tmp_path / "mine.txt", code=1)
    assert "mine.txt is there" in found.stderr and (tmp_path / "mine.txt").read_text() == "precious"
    cap(media / "silent.mp4", "--out", tmp_path / "mine.txt", "--overwrite")
    assert (tmp_path / "mine.txt").read_text() != "precious"


def test_a_name_with_a_slash_at_its_end_is_a_folder(cap, media, tmp_path):
    cap(media / "silent.mp4", "--out", f"{tmp_path / 'new'}/")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["silent.txt"]


def test_an_edited_caption_outlives_the_next_run_and_a_deleted_one_comes_back(cap, media, tmp_path):
    words = (media / "first.mp4", media / "second.mp4", "--format", "txt", "--out", tmp_path)
    cap(*words)
    told = (tmp_path / "second.txt").read_text()
    (tmp_path / "first.txt").write_text("edited")
    (tmp_path / "second.txt").unlink()
    cap(*words)
    assert (tmp_path / "first.txt").read_text() == "edited" and (tmp_path / "second.txt").read_text() == told


def test_what_was_made_before_ctrl_c_is_kept(cap, media, tmp_path, monkeypatch):
    answer, calls = Captioner.answer, []

    def interrupted(*given):
        calls.append(given)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return answer(*given)

    monkeypatch.setattr(Captioner, "answer", interrupted)
    cap(media / "first.mp4", "--every", 1, "--out", tmp_path / "a.txt", code=130)
    assert (tmp_path / "a.txt").read_text().count("[") == 2
    calls[:] = [None, None]
    found = cap(media / "first.mp4", "--every", 1, "--out", tmp_path / "a.jsonl", code=130)
    assert "What is done" not in found.stderr and not (tmp_path / "a.jsonl").exists()
    calls.clear()
    found = cap(media / "first.mp4", "--every", 1, "--out", tmp_path / "a.jsonl", code=130)
    assert "the same command again goes on" in found.stderr
    (half,) = read_jsonl(tmp_path / "a.jsonl")
    assert len(half["captions"]) == 2 and half["error"] == "stopped after 2 s"
    cap(media / "first.mp4", "--every", 1, "--out", tmp_path / "a.jsonl")
    assert len(calls) == 3 + 3
    _, whole = read_jsonl(tmp_path / "a.jsonl")
    assert "error" not in whole and whole["captions"][:2] == half["captions"] and len(whole["captions"]) == 5


def test_names_of_files_are_no_markup(cap, media, tmp_path):
    names = [tmp_path / "a [red].mp4", tmp_path / "x[" / "a]b.mp4"]
    for name in names:
        name.parent.mkdir(exist_ok=True)
        name.write_bytes((media / "silent.mp4").read_bytes())
    found = cap(*names, "--out", tmp_path / "out.jsonl")
    assert "Traceback" not in found.stderr and len(read_jsonl(tmp_path / "out.jsonl")) == 2


def test_an_interval_that_fails_keeps_the_captions_before_it(cap, media, tmp_path, monkeypatch):
    answer, calls = Captioner.answer, []

    def fussy(*given):
        calls.append(given)
        if len(calls) == 2:
            raise KokaneeError("damaged here")
        return answer(*given)

    monkeypatch.setattr(Captioner, "answer", fussy)
    found = cap(media / "first.mp4", "--every", 2.5, "--out", tmp_path / "a.srt", code=1)
    assert "the first from 2.5 s on: damaged here" in found.stderr and "holds the 1 captions" in found.stderr
    assert (tmp_path / "a.srt").read_text().startswith("1\n00:00:00,000 --> 00:00:02,500\n")


def test_a_converted_adapter_has_the_question_of_the_base_that_it_names(tiny_checkpoint, tiny_model, tmp_path):
    adapted = get_peft_model(tiny_model, LoraConfig(r=2, target_modules=["q_proj"]))
    adapted.peft_config["default"].base_model_name_or_path = str(tiny_checkpoint)
    adapted.save_pretrained(tmp_path / "adapter")
    kk("convert", tmp_path / "adapter", tmp_path / "whole")
    assert Defaults.of(tmp_path / "whole") == Defaults("Describe the video.", 12)


def test_convert_writes_a_checkpoint_that_says_the_same(tiny_checkpoint, captioner, media, tmp_path):
    assert kk("convert", tiny_checkpoint, tmp_path / "copy").stdout == f"{tmp_path / 'copy'}\n"
    copied = Captioner.from_pretrained(tmp_path / "copy")
    assert copied.defaults == captioner.defaults
    assert "holds a model" in kk("convert", "nano", tmp_path / "copy", code=1).stderr
    kk("convert", tiny_checkpoint, tmp_path / "copy", "--overwrite")
    assert copied.caption(media / "first.mp4") == captioner.caption(media / "first.mp4")


def test_convert_with_a_whisper_says_what_is_missing(tmp_path):
    words = ("convert", tmp_path / "qwen", tmp_path / "out", "--whisper", tmp_path)
    assert "qwen" in kk(*words, code=1).stderr
    assert "convert it first" in kk(*words, "--base", "other", code=2).stderr


def test_still_images_are_left_out_of_a_run_by_intervals(cap, media, tmp_path):
    found = cap(media, "--format", "srt", "--out", tmp_path)
    assert "still images have no intervals and are left out: 1" in found.stderr
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".jsonl", *[".srt"] * 4]
    only = cap(media / "*.png", "--every", 2, code=1)
    assert "All of these are still images" in only.stderr


def test_a_converted_model_is_readable_for_all(tiny_checkpoint, tmp_path):
    kk("convert", tiny_checkpoint, tmp_path / "copy")
    modes = {path.stat().st_mode & 0o777 for path in (tmp_path / "copy").iterdir()}
    (tmp_path / "new").touch()
    assert modes == {(tmp_path / "new").stat().st_mode & 0o777}


def test_an_end_beyond_the_file_has_a_note(cap, media):
    assert "the file ends at 5.00 s, before the end that was asked for" in cap(media / "first.mp4", "--end", 9).stderr
    assert "ends at" not in cap(media / "first.mp4", "--end", 5).stderr
