"""Laws of a checkpoint's own question: it is kept with the checkpoint, and with the base of an adapter."""

from __future__ import annotations

import json

import pytest

from kokanee.defaults import DEFAULTS_FILE, Defaults, origin
from kokanee.errors import KokaneeError


def test_a_checkpoint_without_the_file_is_asked_as_the_published_ones(tmp_path):
    found = Defaults.of(tmp_path)
    assert found == Defaults()
    assert found.question.startswith("Please provide a thorough description") and found.max_new_tokens == 1024


def test_what_is_saved_is_read(tmp_path):
    Defaults("Describe the video.", 160).save(tmp_path)
    assert Defaults.of(tmp_path) == Defaults("Describe the video.", 160)


def test_the_penalty_of_repetitions_is_by_default_that_which_transformers_would_take(tmp_path):
    (tmp_path / "generation_config.json").write_text('{"repetition_penalty": 1.05, "temperature": 1e-6}')
    assert Defaults.of(tmp_path) == Defaults(repetition_penalty=1.05)
    (tmp_path / DEFAULTS_FILE).write_text('{"question": "What?"}')
    assert Defaults.of(tmp_path) == Defaults("What?", repetition_penalty=1.05)
    Defaults("What?").save(tmp_path)
    assert Defaults.of(tmp_path) == Defaults("What?", repetition_penalty=1.0)


@pytest.mark.parametrize("text", ["{", "[1]", '{"prompt": "x"}'])
def test_anything_else_is_refused_with_what_may_be_set(tmp_path, text):
    (tmp_path / DEFAULTS_FILE).write_text(text)
    with pytest.raises(KokaneeError, match="question, max_new_tokens"):
        Defaults.of(tmp_path)


def test_an_adapter_is_asked_its_own_question_and_else_that_of_its_base(tmp_path):
    base, other, adapter = (tmp_path / name for name in ("base", "other", "adapter"))
    for folder in (base, other, adapter):
        folder.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(base)}))
    Defaults("Base?").save(base)
    Defaults("Other?").save(other)
    assert origin(adapter) == base and origin(adapter, other) == other
    assert origin(base) == base
    Defaults("Own?").save(adapter)
    assert origin(adapter) == origin(adapter, other) == adapter
