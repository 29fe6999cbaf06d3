"""Golden data: prompts assembled once by the published code of video-SALMONN 2+ (commit 61faec0).

Where that code fails, `test_what_the_published_code_cannot_do_works` says what is done instead. One case there has a
video but no place for it, so that the model would fail: here the prompt is refused.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest

from kokanee.errors import KokaneeError
from kokanee.layout import Block
from kokanee.processor import Processor
from kokanee.prompt import IGNORED, Turn, published_turns

GOLDEN = Path(__file__).parent / "golden" / "salmonn2plus"
ASSEMBLY = json.loads((GOLDEN / "prompt_assembly.json").read_text())
EVERY = {case["name"]: case for case in ASSEMBLY["cases"] + ASSEMBLY["direct_cases"]}
CASES = {name: case for name, case in EVERY.items() if "raises" not in case}
PLACELESS = "video_without_placeholder"
POSITIONS = json.loads((GOLDEN / "prompt_positions.json").read_text())
ANSWERS = {"gpt": ("input_ids", ""), "chosen": ("chosen_ids", "chosen_"), "reject": ("reject_ids", "reject_")}
VIDEO = Block("video", (2, 4, 4), 1.0, 60)


@pytest.fixture(scope="module")
def processor() -> Processor:
    return Processor.from_pretrained(GOLDEN / "tokenizer")


def blocks_of(case: dict) -> list[Block]:
    counts = case.get("audio_token_counts") or []
    counts = [] if counts == "decode_error" else counts
    videos = case.get("video_grid_thw") or []
    seconds = case.get("second_per_grid_ts") or [None] * len(videos)
    blocks = [Block("image", tuple(grid)) for grid in case.get("image_grid_thw") or []]
    for number, grid in enumerate(videos):
        blocks.append(Block("video", tuple(grid), seconds[number], counts[number] if number < len(counts) else 0))
    return blocks if videos else blocks + [Block("audio", n_audio_tokens=count) for count in counts]


FORMS = [
    pytest.param(case, answer, case[ids], prefix, id=f"{name}-{answer}")
    for name, case in CASES.items()
    for answer, (ids, prefix) in ANSWERS.items()
    if ids in case
]


def assert_same(sample: dict, ids: list, labels: list, positions: list) -> None:
    assert sample["input_ids"].tolist() == ids
    assert sample["labels"].tolist() == labels
    assert sample["position_ids"].tolist() == positions


@pytest.mark.parametrize(("case", "answer", "ids", "prefix"), FORMS)
def test_ids_labels_and_positions_are_the_published_ones(processor, case, answer, ids, prefix):
    blocks = [] if case["name"] == PLACELESS else blocks_of(case)
    sample = processor.prepare_ids(published_turns(case["conversations"], answer), blocks)
    assert_same(sample, ids, case[f"{prefix}labels"], case[f"{prefix}position_ids"])


@pytest.mark.parametrize(("case", "answer", "ids", "prefix"), FORMS)
def test_an_answer_put_after_an_open_prompt_is_the_whole_conversation(processor, case, answer, ids, prefix):
    blocks = [] if case["name"] == PLACELESS else blocks_of(case)
    turns = published_turns(case["conversations"], answer)
    prompt = processor.prepare_ids(turns[:-1], blocks)
    if len(turns) == 2 and "test_mode_input_len" in case:
        assert len(prompt["input_ids"]) == case["test_mode_input_len"]
    whole = processor.with_answer(prompt, turns[-1].text)
    assert_same(whole, ids, case[f"{prefix}labels"], case[f"{prefix}position_ids"])


@pytest.mark.parametrize("name", POSITIONS)
@pytest.mark.parametrize("mode", ["as_published", "training_positions"])
def test_prompt_positions_are_those_of_generation_in_both_modes(name, mode):
    case = POSITIONS[name]
    positions = "as_published" if mode == "as_published" else "trained"
    processor = Processor.from_pretrained(GOLDEN / "tokenizer", positions=positions)
    prompt = processor.prepare_ids(published_turns(case["conversations"])[:-1], blocks_of(case))
    assert prompt["input_ids"].tolist() == case["prompt_ids"]
    assert prompt["position_ids"].tolist() == case[mode]["position_ids"]
    assert prompt["position_ids"].max() + 1 == case[mode]["first_decode_position"]
    assert set(prompt["labels"].tolist()) == {IGNORED}


def test_what_the_published_code_cannot_do_works(processor):
    cases = {name: case for name, case in EVERY.items() if "raises" in case}
    assert set(cases) == {"av_video_longer_than_audio", "two_videos", "two_videos_with_audio", "text_only"}
    for case in cases.values():
        blocks = blocks_of(case)
        sample = processor.prepare_ids(published_turns(case["conversations"]), blocks)
        ids = sample["input_ids"].tolist()
        assert ids.count(processor.rules.audio_id) == sum(block.n_audio_tokens for block in blocks)
        assert ids.count(processor.rules.video_id) == sum(block.grid_thw[0] * 4 for block in blocks if block.grid_thw)


def test_media_without_a_place_are_refused(processor):
    case = CASES[PLACELESS]
    with pytest.raises(KokaneeError, match="no place"):
        processor.prepare_ids(published_turns(case["conversations"]), blocks_of(case))


def test_media_stand_before_the_first_question_unless_told_otherwise(processor):
    question = Turn("user", "Describe the video in detail.")
    placed = published_turns([{"from": "human", "value": f"<video>\n{question.text}"}])
    assert_equal(processor.prepare_ids([question], [VIDEO]), processor.prepare_ids(placed, [VIDEO]))
    images = [Block("image", (1, 4, 6)), Block("image", (1, 8, 4))]
    placed = published_turns([{"from": "human", "value": f"<image>\n<image>\n{question.text}"}])
    assert_equal(processor.prepare_ids([question], images), processor.prepare_ids(placed, images))


def test_media_can_stand_in_a_later_turn(processor):
    turns = [Turn("user", "hello"), Turn("assistant", "yes"), Turn("user", "and this ?", slots=((4, "video"),))]
    ids = processor.prepare_ids(turns, [VIDEO])["input_ids"].tolist()
    assert ids.index(processor.rules.video_id) > ids.index(processor.writer.answer_start[1])


def assert_equal(left: dict, right: dict) -> None:
    assert left.keys() == right.keys()
    assert all(left[key].tolist() == right[key].tolist() for key in left)


def test_every_assistant_turn_is_learnt_and_nothing_else(processor):
    texts = ["a dog barks twice", "the music stops .", "yes"]
    turns = [turn for text in texts for turn in (Turn("user", "and then ?"), Turn("assistant", text))]
    labels = processor.prepare_ids(turns, [VIDEO])["labels"].tolist()
    learnt = [label for label in labels if label != IGNORED]
    assert learnt == [token for text in texts for token in processor.answer_ids(text).tolist()]


def test_strings_of_special_tokens_in_a_text_stay_text(processor):
    rules, writer = processor.rules, processor.writer
    placeholders = {rules.video_id, rules.audio_id, rules.image_id, int(writer.media_start[0])}
    text = "<|video_pad|><|audio_pad|><|image_pad|><|vision_start|><|im_end|><|im_start|>"
    sample = processor.prepare_ids([Turn("user", text), Turn("assistant", text)])
    plain = processor.prepare_ids([Turn("user", "say"), Turn("assistant", "say")])
    for token in placeholders | {int(writer.turn_start[0]), int(writer.turn_end[0])}:
        assert sample["input_ids"].tolist().count(token) == plain["input_ids"].tolist().count(token)
    assert text in processor.tokenizer.decode(sample["input_ids"])


def test_published_placeholders_in_a_plain_question_stay_text(processor):
    sample = processor.prepare_ids([Turn("user", "what is a <video> tag ?")])
    assert "what is a <video> tag ?" in processor.tokenizer.decode(sample["input_ids"])


def test_without_a_system_prompt_the_conversation_begins_with_the_user(processor):
    bare = Processor(processor.tokenizer, processor.config.model_copy(update={"system_prompt": ""}))
    turns = [Turn("user", "hello")]
    whole, short = (p.prepare_ids(turns)["input_ids"].tolist() for p in (processor, bare))
    assert short == whole[-len(short) :]
    assert processor.tokenizer.decode(short).startswith("<|im_start|>user")


@pytest.mark.parametrize(
    ("turns", "blocks", "reason"),
    [
        ([], [], "must begin with the user"),
        ([Turn("assistant", "yes")], [], "must begin with the user"),
        ([Turn("user", "hello"), Turn(role="system", text="be brief")], [], "no role 'system'"),  # type: ignore[arg-type]
        ([Turn("user", "look", slots=((0, "video"),))], [], "one more medium of kind 'video'"),
        ([Turn("user", "look", slots=((0, "image"),))], [VIDEO], "one more medium of kind 'image'"),
        ([Turn("user", "look", slots=())], [VIDEO], r"no place for some of its media \(video\)"),
    ],
)
def test_conversations_that_do_not_fit_their_media_are_refused(processor, turns, blocks, reason):
    with pytest.raises(KokaneeError, match=reason):
        processor.prepare_ids(turns, blocks)


def test_an_answer_needs_an_open_prompt(processor):
    closed = processor.prepare_ids([Turn("user", "hello"), Turn("assistant", "yes")])
    with pytest.raises(KokaneeError, match="not open"):
        processor.with_answer(closed, "no")


def test_a_copied_processor_prepares_the_same(processor):
    turns = [Turn("user", "Describe the video in detail."), Turn("assistant", "yes")]
    copied = copy.deepcopy(processor)
    assert_equal(copied.prepare_ids(turns, [VIDEO]), processor.prepare_ids(turns, [VIDEO]))
