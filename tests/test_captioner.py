"""Laws of the captioner: every kind of file, parts of files, batches and streams say the same as one caption alone."""

from __future__ import annotations

import copy
from itertools import pairwise

import pytest
import torch
from peft import LoraConfig, get_peft_model
from PIL import Image

from kokanee import Captioner
from kokanee.captions import Caption, Request
from kokanee.defaults import Defaults
from kokanee.errors import KokaneeError
from kokanee.processor import Turn
from media_files import encode, moving_frames, tones

KINDS = ("first.mp4", "silent.mp4", "sound.wav", "still.png")


@pytest.fixture(scope="module")
def captioner(tiny_checkpoint) -> Captioner:
    return Captioner.from_pretrained(tiny_checkpoint)


def test_a_checkpoint_is_loaded_with_its_own_question_and_length(captioner, tiny_checkpoint):
    assert captioner.defaults == Defaults("Describe the video.", 12)
    assert captioner.name == str(tiny_checkpoint)
    assert captioner.model.dtype == torch.float32 and not captioner.model.training


@pytest.mark.parametrize("name", KINDS)
def test_greedy_captions_are_what_generate_makes(captioner, media, name):
    processor, path = captioner.processor, media / name
    found = captioner.caption(path)
    part = captioner.prepare(Request(path))
    batch = processor.collate([part.sample], padding_side="left")
    batch.pop("labels")
    out = captioner.model.generate(**batch, max_new_tokens=12, do_sample=False)
    ids = out[0, batch["input_ids"].shape[1] :].tolist()
    ended = captioner.model.config.eos_token_id in ids
    assert found.text == processor.tokenizer.decode(ids, skip_special_tokens=True).strip()
    assert (found.finished, found.n_tokens) == (ended, len(ids) - ended)


def test_times_and_notes_are_those_of_the_part_that_was_read(captioner, media):
    whole, part = captioner.caption(media / "first.mp4"), captioner.caption(media / "first.mp4", start_s=1, end_s=3.5)
    assert (whole.start_s, whole.end_s, part.start_s, part.end_s) == (0, 5, 1, 3.5)
    assert captioner.caption(media / "silent.mp4").notes == ("no sound track",)
    still = captioner.caption(media / "still.png")
    assert (still.start_s, still.end_s, still.seed, still.sample) == (0, 0, None, 0)


def test_the_question_is_asked_and_else_the_checkpoints_own(captioner, media):
    path = media / "first.mp4"
    clip = captioner.processor.read(path)
    for question, asked in ((None, "Describe the video."), ("How many dogs?", "How many dogs?")):
        wanted = captioner.processor.prepare(clip, [Turn("user", asked)])
        found = captioner.prepare(Request(path, question)).sample
        assert found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize(
    ("use", "there"), [(("video",), {"pixel_values_videos"}), (("audio",), {"input_features"})], ids=["seen", "heard"]
)
def test_one_sense_alone_can_be_used(captioner, media, use, there):
    found = captioner.prepare(Request(media / "first.mp4", use=use)).sample
    assert found.keys() & {"pixel_values_videos", "input_features"} == there


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("name", KINDS)
def test_a_stream_joins_to_the_caption(captioner, media, name, temperature):
    stream = captioner.stream(media / name, temperature=temperature, seed=5)
    assert stream.caption is None
    pieces = list(stream)
    assert stream.caption == captioner.caption(media / name, temperature=temperature, seed=5)
    assert "".join(pieces) == stream.caption.text


def test_a_batch_says_what_its_clips_say_alone(captioner, media):
    requests = [media / name for name in KINDS] + [Request(media / "second.mp4", "What?", 0.5, 2.0, ("video",))]
    alone = [captioner.batch([request])[0] for request in requests]
    assert captioner.batch(requests) == alone
    assert captioner.batch([]) == []


def test_samples_follow_from_the_seed_and_their_number(captioner, media):
    three = captioner.samples(media / "first.mp4", 3, seed=11)
    assert [caption.sample for caption in three] == [0, 1, 2]
    assert {caption.seed for caption in three} == {11}
    assert captioner.samples(media / "first.mp4", 2, seed=11) == three[:2]
    assert captioner.caption(media / "first.mp4", temperature=1.0, seed=11) == three[0]
    assert len({caption.text for caption in three}) == 3
    assert [caption.text for caption in captioner.samples(media / "first.mp4", 3, seed=12)] != [c.text for c in three]


def test_several_samples_need_a_temperature(captioner, media):
    with pytest.raises(KokaneeError, match="all 2 samples are the same"):
        captioner.samples(media / "first.mp4", 2, temperature=0)
    with pytest.raises(KokaneeError, match="at least 1"):
        captioner.samples(media / "first.mp4", 0)


@pytest.mark.parametrize("batch_size", [1, 2])
def test_intervals_say_what_each_says_alone(captioner, media, batch_size):
    found = list(captioner.every(media / "first.mp4", 2.0, start_s=0.5, batch_size=batch_size))
    assert [(caption.start_s, caption.end_s) for caption in found] == [(0.5, 2.5), (2.5, 5.0)]
    alone = [captioner.caption(media / "first.mp4", None, caption.start_s, caption.end_s) for caption in found]
    assert [caption.text for caption in found] == [caption.text for caption in alone]


def test_a_sound_file_has_intervals_too_and_an_image_has_none(captioner, media):
    assert [caption.end_s for caption in captioner.every(media / "sound.wav", 1.5)] == pytest.approx(
        [1.5, 2.5], abs=0.1
    )
    with pytest.raises(KokaneeError, match="still image"):
        list(captioner.every(media / "still.png", 1.0))
    with pytest.raises(KokaneeError, match="still image"):
        captioner.caption(media / "still.png", start_s=1.0)


def test_a_still_image_cannot_be_heard(captioner, media):
    with pytest.raises(KokaneeError, match=r"still\.png is a still image.*--audio-only"):
        captioner.caption(media / "still.png", use=("audio",))


def test_notes_about_an_image_reach_its_caption(captioner, tmp_path):
    first, *others = [Image.fromarray(frame) for frame in moving_frames(3)]
    first.save(tmp_path / "animated.webp", save_all=True, append_images=others, lossless=True)
    first.save(tmp_path / "first.webp", lossless=True)
    animated, still = (captioner.caption(tmp_path / name) for name in ("animated.webp", "first.webp"))
    assert animated.text == still.text
    assert (animated.notes, still.notes) == (("an image of 3 frames; the first is used",), ())


def edges(captions):
    return [(caption.start_s, caption.end_s) for caption in captions]


def test_intervals_of_a_variable_rate_cover_the_file_without_overlap(captioner, tmp_path):
    pts = [*range(0, 2000, 40), 40_000]
    path = encode(tmp_path / "slides.mkv", moving_frames(len(pts)), codec="ffv1", pix_fmt="bgr0", pts=pts)
    assert edges(captioner.every(path, 10)) == [(0, 10), (10, 20), (20, 30), (30, 40.04)]


def test_intervals_between_two_frames_end_where_the_next_begins(captioner, media):
    found = edges(captioner.every(media / "silent.mp4", 0.3))
    assert (found[0][0], found[-1][1]) == (0, 2)
    assert all(before[1] == after[0] for before, after in pairwise(found))


def test_sound_after_the_picture_has_intervals_too(captioner, tmp_path):
    path = encode(tmp_path / "long.mkv", moving_frames(25), sound=tones(6.0), sound_codec="flac")
    found = list(captioner.every(path, 2))
    assert edges(found) == [(0, 2), (2, 4), (4, 6)]
    assert [any("no picture here" in note for note in caption.notes) for caption in found] == [False, True, True]
    assert edges(captioner.every(path, 2, use=("video",))) == [(0, 1)]
    assert captioner.caption(path).end_s == 6


def test_a_short_sound_ends_where_it_ends(captioner, media):
    for start_s, end_s in ((1.0, 1.6), (2.0, None)):
        found = captioner.caption(media / "sound.wav", start_s=start_s, end_s=end_s)
        assert (found.start_s, found.end_s) == pytest.approx((start_s, end_s or 2.5))


def test_what_cannot_be_read_is_an_error_with_its_reason(captioner, media, tmp_path):
    (tmp_path / "empty.mp4").touch()
    for path, reason in ((tmp_path / "empty.mp4", "is empty"), (tmp_path / "none.mp4", "does not exist")):
        with pytest.raises(KokaneeError, match=reason):
            captioner.caption(path)
    with pytest.raises(KokaneeError, match=r"99 s"):
        captioner.caption(media / "first.mp4", start_s=99)


def test_a_damaged_model_is_an_error_not_a_caption(captioner, media):
    model = copy.deepcopy(captioner.model)
    with torch.no_grad():
        model.lm_head.weight.fill_(float("nan"))
    with pytest.raises(KokaneeError, match="not finite"):
        Captioner(model, captioner.processor).caption(media / "first.mp4")


def test_wrong_loads_say_why(tiny_checkpoint, tmp_path):
    with pytest.raises(KokaneeError, match="device warp9 cannot be used"):
        Captioner.from_pretrained(tiny_checkpoint, device="warp9")
    with pytest.raises(KokaneeError, match=r"holds no model: config\.json is missing \(found: nothing\)"):
        Captioner.from_pretrained(tmp_path)


def test_what_is_saved_has_the_checkpoints_own_question(captioner, media, tmp_path):
    captioner.save_pretrained(tmp_path / "saved")
    saved = Captioner.from_pretrained(tmp_path / "saved")
    assert saved.defaults == captioner.defaults
    assert saved.caption(media / "first.mp4") == captioner.caption(media / "first.mp4")


def test_an_adapter_is_asked_the_question_of_the_base_that_it_names(tiny_checkpoint, tiny_model, media, tmp_path):
    adapted = get_peft_model(tiny_model, LoraConfig(r=2, target_modules=["q_proj"]))
    adapted.peft_config["default"].base_model_name_or_path = str(tiny_checkpoint)
    adapted.save_pretrained(tmp_path)
    captioner = Captioner.from_pretrained(tmp_path)
    assert captioner.defaults == Defaults("Describe the video.", 12)
    assert captioner.base == str(tiny_checkpoint)
    Defaults("What?", 5).save(tmp_path)
    assert Captioner.from_pretrained(tmp_path, base=tiny_checkpoint).defaults == Defaults("What?", 5)


@pytest.mark.gpu
def test_a_gpu_computes_what_the_cpu_computes(tiny_checkpoint, media):
    here, there = (
        Captioner.from_pretrained(tiny_checkpoint, device=device, dtype="float32") for device in ("cpu", "auto")
    )
    assert there.model.device.type == "cuda"
    batch = here.processor.collate([here.prepare(Request(media / "first.mp4")).sample], padding_side="left")
    batch.pop("labels")
    with torch.no_grad():
        expected = here.model(**batch).logits
        found = there.model(**{name: value.to(there.model.device) for name, value in batch.items()}).logits
    assert torch.allclose(found.cpu(), expected, atol=1e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("name", KINDS)
def test_a_gpu_captions_in_bfloat16(tiny_checkpoint, media, name):
    captioner = Captioner.from_pretrained(tiny_checkpoint, device="cuda", dtype="bfloat16")
    stream = captioner.stream(media / name)
    assert "".join(stream) == captioner.caption(media / name).text
    assert stream.caption is not None and 0 < stream.caption.n_tokens <= 12


def test_a_stored_type_can_be_asked_for(tiny_checkpoint, media):
    captioner = Captioner.from_pretrained(tiny_checkpoint, dtype="bfloat16")
    assert captioner.model.dtype == torch.bfloat16
    assert isinstance(captioner.caption(media / "first.mp4"), Caption)


def test_a_clip_beyond_the_models_positions_has_a_note(captioner, media, monkeypatch):
    assert captioner.caption(media / "first.mp4").notes == ()
    monkeypatch.setattr(captioner.model.config.text_config, "max_position_embeddings", 10)
    (note,) = captioner.caption(media / "first.mp4").notes
    assert note.startswith("too long for this model") and "--every" in note
