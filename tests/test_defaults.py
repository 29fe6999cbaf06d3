"""Laws of a checkpoint's own question: it is kept with the checkpoint, and handed on to what is made from it."""

from __future__ import annotations

import pytest

from kokanee.defaults import DEFAULTS_FILE, Defaults, inherit
from kokanee.errors import KokaneeError


def test_a_checkpoint_without_the_file_is_asked_as_the_published_ones(tmp_path):
    found = Defaults.of(tmp_path)
    assert found == Defaults()
    assert found.question.startswith("Please provide a thorough description") and found.max_new_tokens == 1024


def test_what_is_saved_is_read(tmp_path):
    Defaults("Describe the video.", 160).save(tmp_path)
    assert Defaults.of(tmp_path) == Defaults("Describe the video.", 160)


@pytest.mark.parametrize("text", ["{", "[1]", '{"prompt": "x"}'])
def test_anything_else_is_refused_with_what_may_be_set(tmp_path, text):
    (tmp_path / DEFAULTS_FILE).write_text(text)
    with pytest.raises(KokaneeError, match="question, max_new_tokens"):
        Defaults.of(tmp_path)


def test_what_is_made_from_a_checkpoint_inherits_its_question(tmp_path):
    source, plain, made = tmp_path / "source", tmp_path / "plain", tmp_path / "made"
    for folder in (source, plain, made):
        folder.mkdir()
    inherit(plain, made)
    inherit("recipes/nano/model.yaml", made)
    assert not list(made.iterdir())
    Defaults("Describe the video.").save(source)
    inherit(source, made)
    assert Defaults.of(made) == Defaults("Describe the video.")
