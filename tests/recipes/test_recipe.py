"""Recipes as values, as YAML, and as the options of a command."""

import re
from dataclasses import replace

import pytest

from lillama.corpus.sources import Source
from lillama.distill.losses import L1Cosine, Mse, TokenMse
from lillama.errors import RecipeError
from lillama.lowrank.initialisers import Random, Svd, Whitened
from lillama.ranks.allocators import Bottom, Top, Uniform
from lillama.recipes.options import Overrides
from lillama.recipes.recipe import Recipe, load_recipe, override, recipe_file, recipe_name, recipe_names

OTHER = replace(
    Recipe(),
    keep=0.55,
    scope="blocks",
    targets=("mlp.*",),
    ignore=("*.0.*",),
    ranks=Bottom(min_rank=7),
    init=Random(),
    distill=replace(Recipe().distill, schedule="joint", loss=TokenMse(), clip=None, lr=3e-5),
    calibration=replace(
        Recipe().calibration, sources=(Source("a.txt", weight=2.0), Source("b", field="été")), tokens=99
    ),
    seed=5,
)


def written(tmp_path, text):
    file = tmp_path / "mine.yaml"
    file.write_text(text, encoding="utf-8")
    return file


def test_default_is_what_a_recipe_is_without_a_word():
    assert load_recipe("default") == load_recipe() == Recipe()


@pytest.mark.parametrize("name", recipe_names())
def test_recipes_that_come_with_the_package_are_sound(name, tmp_path):
    recipe = load_recipe(name)
    assert load_recipe(written(tmp_path, recipe.as_yaml())) == recipe


def test_paper_is_the_published_method():
    paper = load_recipe("paper")
    assert (paper.init, paper.distill.loss, paper.distill.stream) == (Svd(), L1Cosine(), "both")
    assert (paper.distill.schedule, paper.distill.lr, paper.distill.lr_schedule) == ("joint", 8.6e-5, "constant")
    assert (paper.distill.batch_size, paper.distill.epochs, paper.calibration.seq_len) == (8, 1, 1024)
    assert isinstance(paper.ranks, Uniform) and load_recipe("paper-bottom").ranks == Bottom(min_rank=1024, step=256)
    assert "paper" in recipe_names() and "default" in recipe_names()


@pytest.mark.parametrize("recipe", [Recipe(), OTHER], ids=["default", "other"])
def test_yaml_round_trip(recipe, tmp_path):
    again = load_recipe(written(tmp_path, recipe.as_yaml()))
    assert again == recipe and again.hash == recipe.hash
    assert load_recipe(recipe) == recipe


def test_an_empty_file_is_the_default(tmp_path):
    assert load_recipe(written(tmp_path, "# nothing\n")) == Recipe()


def test_numbers_are_numbers(tmp_path):
    recipe = load_recipe(
        written(tmp_path, "distill: {lr: 1e-3, weight_decay: 2E-2}\ncalibration: {tokens: 13_000_000}")
    )
    assert (recipe.distill.lr, recipe.distill.weight_decay, recipe.calibration.tokens) == (1e-3, 2e-2, 13_000_000)


def test_a_file_changes_only_what_it_says(tmp_path):
    recipe = load_recipe(written(tmp_path, "ranks: {multiple_of: 4}\ndistill: {loss: {name: l1-cosine}}"))
    assert recipe == replace(
        Recipe(), ranks=replace(Recipe().ranks, multiple_of=4), distill=replace(Recipe().distill, loss=L1Cosine())
    )


def test_a_strategy_of_another_name_brings_its_own_defaults():
    bottom = load_recipe(Recipe(), {"ranks": {"name": "bottom", "min_rank": 9}})
    assert bottom.ranks == Bottom(min_rank=9)
    assert load_recipe(bottom, {"ranks": {"name": "top"}}).ranks == Top()
    assert load_recipe(bottom, {"ranks": {"step": 3}}).ranks == Bottom(min_rank=9, step=3)
    assert load_recipe(Recipe(), {"init": {"name": "whitened", "damping": 0.1}}).init == Whitened(damping=0.1)
    assert load_recipe(Recipe(), {"distill": {"loss": {"name": "mse"}}}).distill.loss == Mse()


@pytest.mark.parametrize(
    ("tree", "match"),
    [
        ({"kep": 0.5}, "unknown key kep; did you mean 'keep'?"),
        ({"distill": {"epoch": 3}}, "unknown key distill.epoch; did you mean 'epochs'?"),
        ({"calibration": {"tokenz": 3}}, "unknown key calibration.tokenz; did you mean 'tokens'?"),
        ({"calibration": {"sources": [{"path": "x", "wait": 2}]}}, "unknown key calibration.sources.0.wait"),
        ({"ranks": {"name": "uniform", "multiple": 3}}, "unknown key ranks.multiple; did you mean 'multiple_of'?"),
        ({"ranks": {"name": "bottom", "min_rang": 3}}, "unknown key ranks.min_rang; did you mean 'min_rank'?"),
        ({"init": {"name": "whitened", "dumping": 3}}, "unknown key init.dumping; did you mean 'damping'?"),
        ({"ranks": {"name": "uniforn"}}, "ranks.name is 'uniforn': .*did you mean 'uniform'?"),
        (
            {"distill": {"loss": {"name": "l2"}}},
            "distill.loss.name is 'l2': it must be one of l1-cosine, mse, token-mse",
        ),
        ({"keep": "big"}, "keep is 'big': it must be a valid number"),
        ({"keep": 0}, "keep is 0: it must be greater than 0"),
        ({"distill": {"epochs": 2.5}}, "distill.epochs is 2.5"),
        ({"distill": {"lr": -1.0}}, "distill.lr is -1.0"),
        ({"distill": {"held_out": 1}}, "distill.held_out is 1: it must be less than 1"),
        ({"distill": {"stream": "own"}}, "distill.stream is 'own': it must be 'teacher', 'student' or 'both'"),
        ({"distill": None}, "distill is None"),
        ({"targets": "mlp.*"}, r"targets is 'mlp.\*'"),
        ({"calibration": {"seq_len": 0}}, "calibration.seq_len is 0: it must be at least 1"),
    ],
)
def test_mistakes_name_the_key_the_value_and_the_remedy(tree, match):
    with pytest.raises(RecipeError, match=match):
        load_recipe(Recipe(), tree)


def test_mistakes_in_a_file_name_the_file(tmp_path):
    with pytest.raises(RecipeError, match=r"mine\.yaml: unknown key epochs"):
        load_recipe(written(tmp_path, "epochs: 3"))
    with pytest.raises(RecipeError, match=r"mine\.yaml: not readable as YAML"):
        load_recipe(written(tmp_path, "a: [1"))
    with pytest.raises(RecipeError, match=r"mine\.yaml: a recipe is a mapping.*list"):
        load_recipe(written(tmp_path, "- 1"))
    with pytest.raises(RecipeError, match="did you mean 'default'"):
        recipe_file("defualt")


def test_an_option_is_not_blamed_on_the_recipe():
    with pytest.raises(RecipeError, match=r"^keep is 2"):
        override("paper", Overrides(keep=2))


def test_the_hash_is_stable_and_sees_every_value(tmp_path):
    assert Recipe().hash == Recipe().hash == load_recipe(written(tmp_path, "seed: 0")).hash
    assert re.fullmatch("[0-9a-f]{64}", Recipe().hash)
    one_by_one = [
        {"keep": 0.31},
        {"scope": "blocks"},
        {"targets": ["x"]},
        {"ignore": ["x"]},
        {"seed": 9},
        {"ranks": {"name": "top"}},
        {"ranks": {"name": "uniform", "multiple_of": 3}},
        {"init": {"name": "random"}},
        *(
            {"distill": change}
            for change in ({"lr": 0.5}, {"epochs": 77}, {"loss": {"name": "token-mse"}}, {"clip": None})
        ),
        {"calibration": {"tokens": 77}},
        {"calibration": {"sources": [{"path": "x"}]}},
    ]
    hashes = {load_recipe(Recipe(), change).hash for change in one_by_one} | {Recipe().hash}
    assert len(hashes) == len(one_by_one) + 1


def test_options_replace_what_they_name():
    recipe = override(
        "paper",
        Overrides(
            keep=0.4,
            scope="blocks",
            targets=("a",),
            ignore=("b",),
            calibration=("x.txt", "y.txt"),
            tokens=64,
            seq_len=32,
            seed=3,
        ),
    )
    assert (recipe.keep, recipe.scope, recipe.targets, recipe.ignore, recipe.seed) == (0.4, "blocks", ("a",), ("b",), 3)
    assert recipe.calibration == replace(
        recipe.calibration, sources=(Source("x.txt"), Source("y.txt")), tokens=64, seq_len=32
    )
    assert recipe.distill == load_recipe("paper").distill
    assert override("paper", Overrides(calibration=("self",))).calibration.sources == ()
    assert override("paper", Overrides()) == load_recipe("paper")


def test_a_recipe_is_known_by_the_name_it_was_asked_for():
    assert recipe_name("paper") == "paper"
    assert recipe_name("/home/me/mine.yaml") == "mine.yaml"
    assert "Recipe" in recipe_name(Recipe())
