"""Laws of recipes: what is wrong in a file is named before anything runs, and the shipped recipes are right."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import BaseModel, ValidationError

from kokanee.config import KokaneeConfig
from kokanee.conversations import Mix
from kokanee.errors import KokaneeError
from kokanee.mrdpo_recipe import MrdpoRecipe
from kokanee.processor import ProcessorConfig
from kokanee.rebirth import RebirthRecipe
from kokanee.recipes import Recipe, checked, read_recipe, read_yaml
from kokanee.stages import Sizes

RECIPES = Path(__file__).parents[1] / "recipes"
GOOD = "stage: conversations\nmodel: m\ntrain: [lm_head]\nsteps: 3\nbatch_size: 2\nlearning_rate: 1e-3\n"


@pytest.fixture
def file(tmp_path):
    def write(text: str) -> Path:
        (tmp_path / "recipe.yaml").write_text(text)
        return tmp_path / "recipe.yaml"

    return write


def test_a_recipe_is_what_its_file_says_and_defaults(file):
    recipe = read_recipe(file(GOOD))
    assert (recipe.train, recipe.learning_rate, recipe.accumulate, recipe.schedule) == (
        ("lm_head",),
        0.001,
        1,
        "cosine",
    )


def test_single_settings_are_replaced(file):
    assert read_recipe(file(GOOD), steps=9, device="cpu") == read_recipe(file(GOOD)).model_copy(
        update={"steps": 9, "device": "cpu"}
    )


def test_every_wrong_setting_is_named_and_an_unknown_one_with_the_nearest_known(file):
    with pytest.raises(KokaneeError) as error:
        read_recipe(file(GOOD.replace("steps: 3", "steps: 0") + "learning_rat: 1\nschedule: square\n"))
    for part in ("recipe.yaml", "steps: ", "unknown setting 'learning_rat'", "'learning_rate'", "schedule: "):
        assert part in str(error.value)


def test_a_missing_setting_is_named(file):
    with pytest.raises(KokaneeError, match="batch_size is missing"):
        read_recipe(file(GOOD.replace("batch_size: 2\n", "")))


@pytest.mark.parametrize(
    ("text", "message"), [("- a\n- b\n", "but list"), ("", "but NoneType"), ("a: [", "is no YAML")]
)
def test_a_file_without_settings_is_refused(file, text, message):
    with pytest.raises(KokaneeError, match=message):
        read_yaml(file(text))


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(KokaneeError, match=r"nothing\.yaml is not there"):
        read_recipe(tmp_path / "nothing.yaml")


def test_a_recipe_cannot_be_changed(file):
    with pytest.raises(ValidationError):
        read_recipe(file(GOOD)).steps = 5  # pyright: ignore[reportAttributeAccessIssue]


def test_an_error_of_several_settings_together_is_told_without_a_name():
    class Never(BaseModel):
        def model_post_init(self, context: object) -> None:
            raise ValueError("never fits")

    with pytest.raises(KokaneeError, match=r"^here: never fits\. Mend"):
        checked(Never, {}, "here")


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*/[0-9]*.yaml")), ids=lambda path: path.stem)
def test_the_shipped_recipes_are_right(path):
    if read_yaml(path)["stage"] in ("mrdpo", "rebirth"):
        return
    recipe = read_recipe(path)
    assert isinstance(recipe, Recipe) and recipe.warmup < recipe.steps
    if recipe.stage == "conversations":
        checked(Mix, recipe.data, str(path))
    else:
        assert not recipe.data


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*/*mrdpo.yaml")), ids=lambda path: path.parent.name)
def test_the_shipped_recipes_of_mrdpo_are_right(path):
    recipe = checked(MrdpoRecipe, read_yaml(path), str(path))
    assert recipe.rounds == (2 if path.parent.name == "own" else 6)
    assert recipe.warmup < recipe.steps and recipe.loss == "gdpo" and recipe.proxy
    assert recipe.clips >= recipe.n_held_out + recipe.batch_size * recipe.processes


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*/*rebirth.yaml")), ids=lambda path: path.parent.name)
def test_the_shipped_recipes_of_rebirth_are_right(path):
    recipe = checked(RebirthRecipe, read_yaml(path), str(path))
    assert recipe.warmup < recipe.steps and recipe.teacher and recipe.teacher != recipe.model
    assert recipe.keep.max_repetition is not None


def test_the_shipped_recipe_of_sft_has_no_teacher():
    path = RECIPES / "own" / "sft.yaml"
    recipe = checked(RebirthRecipe, read_yaml(path), str(path))
    assert recipe.warmup < recipe.steps and recipe.teacher is None


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*/model.yaml")), ids=lambda path: path.parent.name)
def test_the_shipped_sizes_fit_together(path):
    sizes = checked(Sizes, read_yaml(path), str(path))
    config, processor = KokaneeConfig(**sizes.model), ProcessorConfig(**sizes.processor)
    assert config.audio_tokens_per_chunk == processor.tokens_per_chunk
    assert config.vision_config.patch_size == processor.patch_size
    assert config.vision_config.spatial_merge_size == processor.merge_size
    assert config.audio_config.num_mel_bins == processor.n_mels


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pairs": {"mingap": 1}}, "unknown setting 'pairs.mingap' (did you mean 'pairs.min_gap'?)"),
        ({"judging": {"server": 1}}, "unknown setting 'judging.server' (known: judging.base_url, judging.concurrency"),
        ({"data": {"train": {"features": "a", "sed": 1}}}, "'data.train.sed' (did you mean 'data.train.seed'?)"),
        (
            {"data": {"train": {"videos": "a", "caption": "b"}}},
            "'data.train.caption' (did you mean 'data.train.captions'",
        ),
        ({"data": {"train": {"videos": "a"}}}, "data.train needs captions and events of its videos"),
        ({"data": {"train": {}}}, "data.train.features is missing"),
        ({"data": {"train": 3}}, "data.train: must be settings"),
        ({"lora": {"r": 0}}, "lora.r: must be greater"),
        ({"loss": "ipo"}, "loss: must be 'gdpo'"),
    ],
)
def test_mistakes_inside_settings_are_told_by_their_whole_names(change, message):
    rounds = {"stage": "mrdpo", "model": "m", "clips": 1, "batch_size": 1, "learning_rate": 1.0}
    data = {"train": {"features": "a"}, "validation": {"features": "a"}}
    with pytest.raises(KokaneeError) as error:
        checked(MrdpoRecipe, {**rounds, **change, "data": {**data, **change.get("data", {})}}, "recipe.yaml")
    assert message in str(error.value) and "Data." not in str(error.value)
