"""Laws of a run's page: it shows the numbers of the files, as far as the run has come; no caption can change it."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from kokanee.errors import KokaneeError
from kokanee.formats import append_jsonl, write_json
from kokanee.mrdpo_report import run_page

ATTACK = '</script><b>bold</b><img src=x onerror=alert(1)> "quoted" <!--@table@--> \u2028 end'
RECIPE = {
    "stage": "mrdpo",
    "model": "runs/sft/<model>",
    "rounds": 3,
    "steps": 20,
    "clips": 240,
    "samples": 6,
    "temperatures": [1.0, 0.5],
    "top_p": 0.9,
    "loss": "gdpo",
    "proxy": True,
    "beta": 0.25,
    "gt_weight": 0.125,
    "learning_rate": 0.0003,
    "lora": {"r": 64, "alpha": 128.0},
}
TOTALS = {0: (50.25, 60.5), 1: (30.15, 55.0), 2: (40.2, 57.475), 3: (41.0, 57.0)}
N_CLIPS = 30


def measured(total: float) -> dict[str, float]:
    shares = {"missed": total - 7.5, "incorrect": 4.25, "hallucinated": 3.25, "hall": 7.5, "total": total}
    return {**shares, "repetition": 1.37, "words": 22.4}


def metrics(number: int, loss: str) -> dict:
    greedy, sampled = TOTALS[number]
    figures: dict = {
        "version": 1,
        "round": number,
        "greedy": measured(greedy),
        "sampled": measured(sampled),
        "qa": 91.6,
    }
    if number:
        figures["kl"] = 2.345
        figures["training"] = {"loss": 0.612, "ground_truth": 0.789, "learning_rate": 3e-05}
        figures["seconds"] = {"train": 1200.0, "evaluate": 45.0}
    if number and loss != "ce":
        figures["training"] |= {"margin": 1.234, "accuracy": 0.875, "validation/margin": 0.987, "qa": 0.046}
        figures["pairs"] = {
            "pairs": 231,
            "dropped": {"scores too close": 9, "<s>": 0},
            "chosen_score": 0.321,
            "rejected_score": 0.654,
        }
    return figures


def clip(number: int, wrong: int, caption: str) -> tuple[dict, dict]:
    """A caption that misses `wrong` of ten events, and the verdict on it."""
    name = f"clip-{number:02d}"
    said = {
        "version": 1,
        "clip": name,
        "prompt": "Describe <it>.",
        "seed": 0,
        "captions": [caption],
        "finished": [True],
    }
    counts = {"missed": wrong, "incorrect": 1, "hallucinated": 1, "n_events": 10}
    verdict = {
        "version": 1,
        "clip": name,
        "ground_truth": f"Truth of {name}<s>.",
        "counts": [counts],
        "repetition": [0.0],
        "verdicts": [
            {
                "missed": [f"Event {event} of {name}<s>." for event in range(wrong)],
                "incorrect": [{"event": "A <s> star is red.", "said": "A star is blue"}],
                "hallucinated": ["A <s> cat sings"],
            }
        ],
    }
    return said, verdict


def make_run(folder: Path, finished: int = 2, loss: str = "gdpo", verdicts: bool = True) -> Path:
    """A run: clip n misses 4 events before, and n // 4 of them (0 to 7) in the later rounds."""
    write_json(folder / "state.json", {"recipe": {**RECIPE, "loss": loss}, "start": {}})
    for number in range(finished + 1):
        place = folder / f"round-{number:02d}"
        write_json(place / "metrics.json", metrics(number, loss))
        text = f"{ATTACK} A star is blue. Round {number}."
        clips = [clip(n, n // 4 if number else 4, text) for n in range(N_CLIPS)]
        append_jsonl(place / "validation.jsonl", [said for said, _ in clips])
        if verdicts:
            append_jsonl(place / "validation-verdicts.jsonl", [verdict for _, verdict in clips])
        if number:
            train_steps(place, 20, loss)
    return folder


def train_steps(place: Path, until: int, loss: str = "gdpo") -> None:
    reward = {} if loss == "ce" else {"margin": 0.5, "accuracy": 0.75}
    records = [{"step": step, "loss": 0.7, **reward} for step in range(2, until + 1, 2)]
    append_jsonl(place / "train" / "metrics.jsonl", records)


class Tags(HTMLParser):
    """All start tags, and the text of the page without its style."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: set[str] = set()
        self.text, self.inside = "", ""
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes |= {name for name, _ in attrs}
        self.inside = tag

    def handle_data(self, data):
        self.text += data if self.inside != "style" else ""


def row(page: str, name: str, which: int = 0) -> list[str]:
    """The cells of a row of the table, by its name; `which` of those that have it."""
    found = re.findall(rf'<tr><th scope="row">{re.escape(name)}</th>(.*?)</tr>', page)
    return [re.sub(r"<small>.*?</small>", "", text) for text in re.findall(r"<td>(.*?)</td>", found[which])]


def test_the_numbers_are_those_of_the_files(tmp_path):
    page = run_page(make_run(tmp_path))
    assert row(page, "Total") == ["50.2", "30.1", "40.2"] and row(page, "Total", 1) == ["60.5", "55.0", "57.5"]
    assert row(page, "Pairs") == ["–", "231", "231"] and row(page, "Dropped: scores too close")[1:] == ["9", "9"]
    assert row(page, "Chosen score")[1:] == ["0.321"] * 2 and row(page, "Reward margin")[1:] == ["1.234"] * 2
    assert row(page, "Held out: Reward margin")[1:] == ["0.987"] * 2 and row(page, "Learning rate")[1] == "3e-05"
    assert row(page, "Train") == ["–", "20 min", "20 min"] and row(page, "Evaluate")[1] == "45 s"
    assert row(page, "KL to the round&#x27;s reference")[1:] == ["2.345"] * 2
    assert (
        "gDPO, beta 0.25, weight of the ground truth 0.125" in page
        and "<dd>42 min, each part since it was last begun or continued</dd>" in page
    )
    assert (
        "3 of 20 steps, learning rate 0.0003" in page
        and "6 of each of 240 clips a round at temperature 1 and 0.5" in page
    )


def test_right_answers_and_their_cross_entropy_are_not_confused(tmp_path):
    page = run_page(make_run(tmp_path))
    assert row(page, "Questions answered rightly") == ["91.6"] * 3
    assert row(page, "Cross-entropy of the answers")[1:] == ["0.046"] * 2


def test_the_outcome_tells_start_end_and_best(tmp_path):
    text = Tags(run_page(make_run(tmp_path))).text.replace("\u00a0", " ")
    assert "In 2 rounds the total error of greedy captions went from 50.2 % to 40.2 % (20.0 % less)" in text
    assert "at temperature 1 from 60.5 % to 57.5 % (5.0 % less)" in text
    assert "lowest after round 1" in text and "from 50.2 % to 30.1 % (40.0 % less)" in text
    assert "2 of 3 rounds are done" in text


def test_captions_that_gained_and_lost_most_come_first(tmp_path):
    page = run_page(make_run(tmp_path))
    gained, lost = page.split("<h3>Lost most</h3>")
    named = [re.findall(r"<article><h3>(clip-\d\d) ", text) for text in (gained, lost)]
    assert named[0] == [f"clip-{n:02d}" for n in range(12)]
    assert named[1] == [f"clip-{n}" for n in range(29, 19, -1)]
    assert "Of 30 captions 16 have a lower total error than before, 10 a higher one." in page
    assert "total error 60 % of 10 events" in gained and "total error 20 % of 10 events" in gained
    first = gained.split("<article>")[1]
    assert "Event 3 of clip-00&lt;s&gt;." in first and "Truth of clip-00&lt;s&gt;." in first
    assert '<mark class="incorrect" title="In truth: A &lt;s&gt; star is red.">A star is blue</mark>' in first


def test_what_files_hold_is_text(tmp_path):
    page = Tags(run_page(make_run(tmp_path)))
    assert not {"b", "img", "script", "s", "it", "model"} & set(page.tags)
    assert not {"onerror", "src", "href"} & page.attributes
    assert page.text.count(ATTACK) == 2 * (12 + 10)
    assert "Describe <it>." in page.text and "runs/sft/<model>" in page.text


def test_the_page_needs_nothing_else(tmp_path):
    page = run_page(make_run(tmp_path))
    assert not re.search(r"https?:|//[a-z]|@import|url\(", page.replace("</", ""))
    assert page.count("<!--@") == 0 and "<svg" in page


def test_a_run_under_way_is_shown_as_far_as_it_has_come(tmp_path):
    folder = make_run(tmp_path, finished=1)
    train_steps(folder / "round-02", 8)
    with (folder / "round-02" / "train" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 10, "lo')
    page = run_page(folder)
    assert "1 of 3 rounds are done; round 2 has reached step 8 of 20" in page
    assert len(row(page, "Total")) == 2


def test_a_run_without_a_finished_round_has_a_page(tmp_path):
    assert "Nothing is measured yet." in run_page(make_run(tmp_path / "new", finished=-1))
    page = run_page(make_run(tmp_path / "start", finished=0)).replace("\u00a0", " ")
    assert "total error of greedy captions is 50.2 %, at temperature 1 60.5 %" in page
    assert "0 of 3 rounds are done" in page and "No round is finished yet." in page


def test_a_run_with_cross_entropy_has_no_rewards_and_no_pairs(tmp_path):
    page = run_page(make_run(tmp_path, loss="ce"))
    assert "cross-entropy of ground-truth captions" in page and row(page, "Loss") == ["–", "0.612", "0.612"]
    assert not re.search("Reward margin</|<figcaption>(Pairs|Accuracy|Reward)|Preference pairs|beta 0", page)
    assert "<figcaption>Loss" in page and "<figcaption>KL" in page


def test_what_is_not_known_is_left_out(tmp_path):
    folder = make_run(tmp_path, verdicts=False)
    for number in range(3):
        path = folder / f"round-{number:02d}" / "metrics.json"
        known = {name: value for name, value in json.loads(path.read_text()).items() if name != "kl"}
        write_json(path, {**known, "qa": None})
    page = run_page(folder)
    assert "<figcaption>KL" not in page and "<figcaption>Questions" not in page
    assert "Of 30 captions 30 have changed" in page and page.count("<article>") == 12
    assert row(page, "Questions answered rightly") == ["–"] * 3 and "Somebody who saw it" not in page


def test_a_clip_without_a_verdict_is_neither_gain_nor_loss(tmp_path):
    folder = make_run(tmp_path)
    said, verdict = clip(99, 0, "Nothing.")
    for number in range(3):
        append_jsonl(folder / f"round-{number:02d}" / "validation.jsonl", [said])
        lost = {**verdict, "counts": [None], "verdicts": [None]}
        append_jsonl(folder / f"round-{number:02d}" / "validation-verdicts.jsonl", [lost])
    page = run_page(folder)
    assert "Of 30 captions 16" in page and "clip-99" not in page


def test_every_row_of_the_table_has_a_cell_for_every_round(tmp_path):
    page = run_page(make_run(tmp_path))
    rows = re.findall(r"<tr><th scope=\"row\">.*?</tr>", page)
    assert len(rows) > 20 and {text.count("<td>") for text in rows} == {3}


def test_another_folder_is_refused_with_reason_and_remedy(tmp_path):
    with pytest.raises(KokaneeError, match=r"no run: it has no state\.json\. Give the folder of a run of mrDPO"):
        run_page(tmp_path)
    write_json(tmp_path / "state.json", {"recipe": {"stage": "conversations"}})
    with pytest.raises(KokaneeError, match=r"the stage 'conversations', which has no rounds\. Give the folder"):
        run_page(tmp_path)
    write_json(tmp_path / "state.json", {"version": 1})
    with pytest.raises(KokaneeError, match="Give the folder"):
        run_page(tmp_path)


def test_a_run_that_ran_out_of_patience_is_not_called_unfinished(tmp_path):
    """Round 1 of 3 is the best, and round 2 the last that is done."""
    folder = make_run(tmp_path, finished=2)
    for patience, stopped in ((1, True), (2, False)):
        write_json(folder / "state.json", {"recipe": {**RECIPE, "loss": "gdpo", "patience": patience}, "start": {}})
        page = run_page(folder)
        assert ("Stopped early" in page) == stopped and ("Not finished" in page) != stopped
    write_json(folder / "state.json", {"recipe": {**RECIPE, "loss": "gdpo", "patience": 1, "rounds": 2}, "start": {}})
    assert "Stopped early" not in run_page(folder)


def test_rounds_after_those_that_patience_allows_do_not_count(tmp_path):
    """Round 1 is the best of three that are done, round 2 the last with a patience of 1."""
    folder = make_run(tmp_path, finished=3)
    for patience, rounds in ((1, 2), (2, 3), (9, 3), (None, 3)):
        write_json(folder / "state.json", {"recipe": {**RECIPE, "loss": "gdpo", "patience": patience}})
        page = run_page(folder)
        assert f"In {rounds} rounds the total error" in page and len(row(page, "Total")) == rounds + 1


def test_rounds_beyond_the_last_do_not_count_and_the_best_is_named(tmp_path):
    folder = make_run(tmp_path, finished=2)
    write_json(folder / "state.json", {"recipe": {**RECIPE, "loss": "gdpo", "rounds": 1}, "start": {}})
    page = run_page(folder)
    assert "In one round" in page and "In 2 rounds" not in page and "The model is that of" not in page
    write_json(folder / "state.json", {"recipe": {**RECIPE, "loss": "gdpo", "rounds": 2}, "start": {}})
    write_json(folder / "metrics.json", {"kept": 1, "rounds": [{}, {}, {}]})
    assert "The model is that of round 1, the best." in run_page(folder)
