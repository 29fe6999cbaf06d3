"""Laws of the first paper's video-SALMONN 2; that it is theirs is in test_parity.py."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional
from transformers import GenerationConfig

from kokanee import checkpoints
from kokanee.captioner import Captioner
from kokanee.captions import Decoding
from kokanee.errors import KokaneeError
from kokanee.features import fill_store
from kokanee.generation import answers, penalized, tokens_held
from kokanee.layout import Block
from kokanee.prompt import Turn
from kokanee.salmonn2 import segment_positions
from kokanee.salmonn2_prompt import WITHOUT_EFFECT, ZERO_TOKEN, Salmonn2Processor, Salmonn2ProcessorConfig, spread_sound
from kokanee.views import open_prompt, watch
from media_files import encode, moving_frames, tones
from tiny import WIDTH, salmonn2_model, salmonn2_processor, tiny_model, tiny_processor

GOLDEN = Path(__file__).parent / "golden" / "salmonn2"
MEDIA = ("pixel_values_videos", "video_grid_thw", "input_features", "audio_segments", "audio_repeats")
KINDS = ("av", "video", "audio")
ASKED = [Turn("user", "what happens ?")]


def clip_of(kind: str, seed: int = 0):
    """A clip whose length, and so its number of frames and chunks, follows from the seed."""
    random, seconds = np.random.default_rng(seed), 1.5 + seed
    pictures = list(random.integers(0, 256, (round(8 * seconds), 40, 72, 3), dtype=np.uint8))
    sound = random.normal(0, 0.1, round(16000 * seconds)).astype(np.float32)
    return salmonn2_processor().make_clip(
        None if kind == "audio" else pictures, 8.0, None if kind == "video" else sound
    )


def sample_of(kind: str, answer: str | None = None, seed: int = 0):
    turns = ASKED + ([Turn("assistant", answer)] if answer else [])
    return salmonn2_processor().prepare(clip_of(kind, seed), turns)


@pytest.fixture(scope="module")
def model():
    return salmonn2_model()


@pytest.fixture
def golden_salmonn2(tmp_path) -> Path:
    """The golden checkpoint in the published layout."""
    for part in ("checkpoint", "tokenizer"):
        for file in (GOLDEN / part).iterdir():
            shutil.copyfile(file, tmp_path / file.name)
    return tmp_path


@pytest.mark.parametrize("seed", range(40))
def test_sound_is_stretched_over_the_frames_by_nearest_neighbour(seed):
    random = np.random.default_rng(seed)
    n_tokens, n_frames, seconds = (int(random.integers(*ends)) for ends in ((1, 400), (2, 111), (1, 40)))
    front = min(n_tokens, 50 * seconds)
    spread = spread_sound(n_tokens, n_frames, seconds)
    stretched = spread.per_frame * n_frames
    source = torch.arange(front, dtype=torch.float32)[None, None]
    expected = functional.interpolate(source, size=stretched, mode="nearest")[0, 0].long().tolist()
    found = np.repeat(np.arange(n_tokens), spread.repeats).tolist()
    assert spread.behind == n_tokens - front and 0 <= stretched - front < n_frames
    assert found == expected + list(range(front, n_tokens))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(3))
def test_the_prompt_has_a_place_for_every_token_of_its_media(model, kind, seed):
    sample = sample_of(kind, seed=seed)
    embeds = model.embed(sample["input_ids"][None], **{k: v for k, v in sample.items() if k in MEDIA})
    assert torch.isfinite(embeds).all()
    assert (sample["position_ids"] == torch.arange(len(sample["input_ids"]))).all()


@torch.no_grad()
def test_clips_of_several_kinds_and_lengths_are_the_same_together_as_alone(model):
    samples = [sample_of(kind, "a dog barks .", seed) for kind in KINDS for seed in (0, 2)]
    assert len({len(sample.get("audio_segments", ())) for sample in samples}) == 3
    batch = salmonn2_processor().collate(samples)
    together = model(**batch, logits_to_keep=0).logits
    for row, sample in enumerate(samples):
        alone = model(**salmonn2_processor().collate([sample]), logits_to_keep=0).logits[0]
        assert torch.allclose(together[row, : len(alone)], alone, atol=2e-5)


@torch.no_grad()
def test_every_number_of_what_is_shown_matters(model):
    sample = salmonn2_processor().collate([sample_of("av", seed=2)])
    logits = model(**sample, logits_to_keep=1).logits
    for name in ("pixel_values_videos", "input_features"):
        changed = {**sample, name: sample[name].clone()}
        changed[name][-1] += 1.0
        assert not torch.allclose(model(**changed, logits_to_keep=1).logits, logits, atol=1e-4)
    swapped = {**sample, "audio_segments": sample["audio_segments"].flip(0)}
    assert not torch.allclose(model(**swapped, logits_to_keep=1).logits, logits, atol=1e-4)


def test_only_a_silent_video_has_times_and_zeros_hold_the_places_of_missing_digits(model):
    processor = salmonn2_processor()
    zero_id = processor.place_ids["zero_token_id"]
    block = Block("video", (30, 4, 4), 0.5, 0)
    ids = processor.writer.block_ids(block)
    times = [processor.writer.encode(str(round(0.5 * number, 1))) for number in range(1, 31)]
    frames = ids.reshape(30, -1)
    assert {len(time) for time in times} == {3, 4} and frames.shape[1] == 6 + 4
    for frame, time in zip(frames, times, strict=True):
        assert frame[6:].tolist() == [*time.tolist(), *[zero_id] * (4 - len(time))]
    assert (processor.writer.block_ids(Block("video", (30, 4, 4), 0.5, 60)) != zero_id).all()
    embeds = model.embed(torch.tensor(ids)[None], video_embeds=torch.ones(30 * 6, WIDTH))
    assert (embeds[0, ids == zero_id] == 0).all() and (embeds[0, ids != zero_id] != 0).any(-1).all()


@pytest.mark.parametrize("kind", KINDS)
def test_an_open_prompt_with_an_answer_is_the_conversation(kind):
    opened, told = sample_of(kind), sample_of(kind, "a dog barks .")
    made = salmonn2_processor().with_answer(opened, "a dog barks .")
    assert all(torch.equal(made[name], told[name]) for name in told)


def test_text_is_text_even_where_it_spells_a_place(model):
    text = f"what is <|video_pad|> {ZERO_TOKEN} <|audio_pad|> ?"
    sample = salmonn2_processor().prepare(clip_of("audio"), [Turn("user", text)])
    places = torch.isin(sample["input_ids"], torch.tensor(list(salmonn2_processor().place_ids.values())))
    assert int(places.sum()) == int(sample["audio_repeats"].sum())


@torch.no_grad()
def test_generate_and_the_decode_loop_agree(model):
    batch = salmonn2_processor().collate([sample_of("av", seed=1), sample_of("video")], padding_side="left")
    model.generation_config.eos_token_id = model.config.eos_token_id
    ours = answers(model, batch, Decoding(max_new_tokens=6))
    asked = {name: value for name, value in batch.items() if name != "labels"}
    theirs = model.generate(**asked, do_sample=False, max_new_tokens=6)[:, batch["input_ids"].shape[1] :]
    assert [answer.ids for answer in ours] == [row[: len(a.ids)].tolist() for a, row in zip(ours, theirs, strict=True)]
    twice = model.generate(**asked, do_sample=True, num_return_sequences=2, max_new_tokens=2)
    assert len(twice) == 4


def test_a_penalty_of_repetitions_counts_what_was_said_alone(model):
    batch = salmonn2_processor().collate([sample_of("audio")])
    assert not model.penalizes_prompts and tiny_model().penalizes_prompts
    held = tokens_held(batch, 400, model.penalizes_prompts)
    assert not held.any() and tokens_held(batch, 400).any()
    logits = torch.randn(1, 400)
    assert torch.equal(penalized(logits, held, 1.5), logits)
    likely = answers(model, batch, Decoding(max_new_tokens=4))[0].ids
    asked = Turn("user", salmonn2_processor().tokenizer.decode(likely) * 2)
    batch = salmonn2_processor().collate([salmonn2_processor().prepare(clip_of("audio"), [asked])])
    ours = answers(model, batch, Decoding(max_new_tokens=8, repetition_penalty=3.0))[0].ids
    shown = {name: value for name, value in batch.items() if name != "labels"}
    for how in ({"repetition_penalty": 3.0}, {"generation_config": GenerationConfig(repetition_penalty=3.0)}):
        theirs = model.generate(**shown, do_sample=False, max_new_tokens=8, **how)[0, batch["input_ids"].shape[1] :]
        assert len(ours) > 1 and ours == theirs.tolist()[: len(ours)]


def test_chunks_are_told_apart_by_waves_of_which_the_first_has_none():
    found = segment_positions(torch.tensor([0, 1, 2]), 8)
    assert (found[0] == 0).all() and found[1].tolist() == [0, 1] * 4
    assert torch.allclose(found[2, :2], torch.tensor([0.84147, 0.54030]), atol=1e-4)


def test_a_saved_model_is_the_same_and_its_parts_do_not_mix(model, media, tmp_path):
    folder = checkpoints.save(model, salmonn2_processor(), tmp_path / "first")
    loaded, processor = checkpoints.load(folder)
    assert isinstance(processor, Salmonn2Processor) and processor.config == salmonn2_processor().config
    clip = processor.read(media / "first.mp4")
    sample = processor.collate([processor.prepare(clip, ASKED)])
    with torch.no_grad():
        assert torch.equal(loaded(**sample, logits_to_keep=0).logits, model(**sample, logits_to_keep=0).logits)
    assert checkpoints.convert(folder, tmp_path / "again") and (tmp_path / "again" / "processor.json").is_file()
    with pytest.raises(KokaneeError, match="frame_side is 84, the model has 56"):
        checkpoints.load(folder, frame_side=84)
    with pytest.raises(KokaneeError, match="unknown setting 'spread'"):
        checkpoints.load(folder, spread=True)


def test_files_are_captioned_and_what_was_seen_can_be_kept(model, media):
    captioner = Captioner(model, salmonn2_processor())
    how = {"max_new_tokens": 5}
    caption = captioner.caption(media / "first.mp4", **how)
    assert caption.text == captioner.batch([media / "silent.mp4", media / "first.mp4"], **how)[1].text
    view = watch(model, salmonn2_processor(), media / "first.mp4")
    kept = salmonn2_processor().collate([open_prompt(salmonn2_processor(), view, captioner.defaults.question)])
    assert caption.n_tokens == len(answers(model, kept, Decoding(max_new_tokens=5))[0].ids)
    logits = model(**kept, logits_to_keep=1).logits
    asked = [Turn("user", captioner.defaults.question)]
    seen = salmonn2_processor().prepare(salmonn2_processor().read(media / "first.mp4"), asked)
    assert torch.allclose(logits, model(**salmonn2_processor().collate([seen]), logits_to_keep=1).logits, atol=1e-5)


def test_where_less_than_two_frames_are_left_the_sound_is_heard_alone(media, tmp_path):
    processor = salmonn2_processor()
    long = encode(tmp_path / "long.mkv", moving_frames(25), sound=tones(6.0), sound_codec="flac", fps=12)
    clip = processor.read(long, 1.9, 5.0)
    assert clip.frames is None and any("needs two frames" in note for note in clip.notes)
    assert processor.medium(clip)[0].kind == "audio"
    with pytest.raises(KokaneeError, match="Only 1 frame would be shown"):
        processor.read(media / "silent.mp4", 0.0, 0.3)
    with pytest.raises(KokaneeError, match="greater than or equal to 2"):
        Salmonn2ProcessorConfig(max_frames=1)


def test_a_track_that_has_ended_is_a_second_of_silence(tmp_path):
    processor = salmonn2_processor()
    path = encode(tmp_path / "short.mkv", moving_frames(60), sound=tones(2.0), sound_codec="flac", fps=12)
    block, tensors = processor.medium(processor.read(path, 3.0, 5.0))
    silent = processor.features(np.zeros(16000, dtype=np.float32))
    assert block.n_audio_tokens == processor.config.tokens_per_chunk
    assert torch.equal(tensors["input_features"], silent)
    clip = processor.read(path, 3.0, 5.0, use=("video",))
    assert clip.waveform is None and processor.medium(clip)[0].n_audio_tokens == 0


@pytest.mark.parametrize("setting", WITHOUT_EFFECT)
def test_a_setting_that_it_has_not_is_refused(setting):
    known = Salmonn2ProcessorConfig.model_fields[setting].default
    others = {"positions": "as_published", "spread_pixels": False}
    with pytest.raises(KokaneeError, match=f"has no {setting}"):
        Salmonn2ProcessorConfig(**{setting: others.get(setting, f"{known}x" if isinstance(known, str) else known + 1)})
    with pytest.raises(KokaneeError, match="did you mean 'time_tokens'"):
        Salmonn2ProcessorConfig(**{"time_token": False})


def test_what_it_cannot_be_shown_is_refused(model, tmp_path):
    processor, clip = salmonn2_processor(), clip_of("av")
    picture = np.zeros((56, 56, 3), dtype=np.uint8)
    with pytest.raises(KokaneeError, match="no images"):
        processor.prepare(picture, ASKED)
    with pytest.raises(KokaneeError, match="one in a turn"):
        processor.prepare([clip, clip], ASKED)
    with pytest.raises(KokaneeError, match="one in a turn"):
        processor.prepare(None, [Turn("user", "what ?", ((0, "video"),))])
    with pytest.raises(KokaneeError, match="come with their time"):
        processor.prepare_ids(ASKED, [Block("video", (2, 4, 4))])
    with pytest.raises(KokaneeError, match="frames of 56 x 56"):
        processor.pixels([picture[:28]])
    with pytest.raises(KokaneeError, match=r"sees \(3, 56, 56\)"):
        model.encode_video(torch.zeros(2, 3, 28, 28), torch.tensor([[2, 2, 2]]))
    with pytest.raises(KokaneeError, match="does not spread sound"):
        tiny_model().encode_audio(torch.zeros(1, 16, 200), torch.zeros(1), torch.ones(1, 4))
    with pytest.raises(KokaneeError, match="Train it on files"):
        fill_store(model, processor, tmp_path, "train", 2, 0, 0.0)
    assert tiny_processor().config.rule == "salmonn2plus"


def test_a_checkpoint_without_room_for_places_is_refused(tmp_path, golden_salmonn2):
    config = golden_salmonn2 / "config.json"
    config.write_text(config.read_text().replace('"vocab_size": 608', '"vocab_size": 402'))
    with pytest.raises(KokaneeError, match="embeddings of 402 tokens, and 404 are needed"):
        checkpoints.load(golden_salmonn2)


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        (None, "has no model_args"),
        ({"second_stride": 0.25}, "windows of 0.5 s every 0.25 s"),
        ({"mm_pooling_position": "before"}, "mm_pooling_position = 'before'"),
    ],
)
def test_a_checkpoint_that_was_trained_otherwise_is_refused(golden_salmonn2, changed, told):
    path = golden_salmonn2 / "config.json"
    config = json.loads(path.read_text())
    config["model_args"] = None if changed is None else config["model_args"] | changed
    path.write_text(json.dumps(config))
    with pytest.raises(KokaneeError, match=told):
        checkpoints.load(golden_salmonn2)


def test_settings_of_a_published_checkpoint_are_read_and_can_be_replaced(golden_salmonn2):
    processor = checkpoints.load(golden_salmonn2)[1]
    assert isinstance(processor, Salmonn2Processor)
    config = processor.config
    assert (config.frame_side, config.time_tokens, config.interval_s, config.max_frames) == (56, True, 1.0, 110)
    path = golden_salmonn2 / "config.json"
    path.write_text(path.read_text().replace('"fps": 1', '"fps": 2'))
    assert checkpoints.load(golden_salmonn2)[1].config.interval_s == 0.5
    changed = checkpoints.load(golden_salmonn2, max_frames=30, time_tokens=False)[1].config
    assert (changed.max_frames, changed.time_tokens) == (30, False)
