"""Recipes: what is read from JSON, what flags replace, and each mistake in one sentence."""

import json

import pytest

from minicpm4_hf.training.recipe import Recipe, Stage, Text, load_recipe, shipped_recipe

SMALL = {
    "output": "run",
    "text": {"train": ["books"], "held_out_share": 0.1},
    "vocab_size": 300,
    "architecture": {"hidden_size": 32},
    "stages": [{"name": "short", "num_steps": 4, "length": 32, "sequences_per_step": 2, "warmup_steps": 1}],
}


@pytest.fixture
def write(tmp_path):
    def write(content):
        path = tmp_path / "recipe.json"
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return path

    return write


def test_a_recipe_is_its_file(write):
    recipe = load_recipe(write(SMALL))
    stage = Stage(name="short", num_steps=4, length=32, sequences_per_step=2, warmup_steps=1)
    text = Text(train=["books"], held_out_share=0.1)
    architecture = {"hidden_size": 32}
    expected = Recipe(output="run", text=text, stages=[stage], vocab_size=300, architecture=architecture)
    assert recipe == expected and recipe.stages[0].learning_rate == 1e-2


def test_settings_are_replaced(write):
    changes = ["output=other run", "stages.0.num_steps=9", "stages.0.learning_rate=1", 'text.train=["a", "b"]']
    changes += ["stages.0.sparse_config.topk=8", "architecture.num_hidden_layers=3", "mup=false"]
    recipe = load_recipe(write(SMALL), changes)
    assert recipe.output == "other run" and recipe.text.train == ["a", "b"] and recipe.mup is False
    assert recipe.stages[0].num_steps == 9 and recipe.stages[0].learning_rate == 1.0
    assert recipe.stages[0].sparse_config == {"topk": 8}
    assert recipe.architecture == {"hidden_size": 32, "num_hidden_layers": 3}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (["speed=3"], "the recipe has no setting 'speed'; there are output, text"),
        (["text.speed=3"], "`text` has no setting 'speed'"),
        (["stages.0.num_steps=many"], "`stages.0.num_steps` must be an integer, got 'many'"),
        (["stages.0.num_steps=true"], "`stages.0.num_steps` must be an integer, got True"),
        (["stages.0.num_steps=0"], r"`short\.num_steps` must be at least 1, got 0"),
        (["stages.0.num_steps=2", "stages.0.decay_steps=2"], "its 1 steps of warm-up and 2 of decay together, got 2"),
        (["stages.0.length=1"], "length` must be at least 2, got 1"),
        (["stages.0.name=../up"], "becomes a folder"),
        (["stages.0.name=model"], "must not be one of model, ternary, tokenizer, shards, .* got 'model'"),
        (["stages.0.log_every=7"], r"must be a multiple of `log_every` \(7\)"),
        (["stages.0.sparse_config.topk=0"], "topk"),
        (["stages.0.decay_type=steep", "stages.0.decay_steps=2"], "`decay_type` must be one of exponential"),
        (["stages.0.buckets=[8, 4]"], "`bounds` must ascend"),
        (["stages.1.length=3"], r"There is no 'stages\.1'"),
        (["stages.0=3"], "is an entry of a list"),
        (["output.x=3"], "has no settings of its own"),
        (["output"], "KEY=VALUE"),
        (["stages=[]"], "at least one stage"),
        (["stages=3"], "`stages` must be a list"),
        (["text=3"], "`text` must be an object"),
        (["precision=fp64"], "`precision` must be one of bf16, fp32"),
        (["model=somewhere"], "exactly one of `model`"),
        (["tokenizer=somewhere"], "exactly one of `tokenizer`"),
        (["architecture=null", "model=m"], "keeps its tokenizer"),
        (['stages.0.selection={"weight": 1}'], "needs a `sparse_config` of its own"),
        (["architecture.vocab_size=9"], r"`architecture\.vocab_size` cannot be set: the tokenizer decides it"),
        (["architecture.sparse_config.topk=9"], "a stage decides it"),
        (["architecture.hiden_size=9"], r"`architecture\.hiden_size` is no field .* did you mean hidden_size"),
        (["architecture.hidden_size=many"], "`architecture`: .*'hidden_size' expected int, got str"),
        (["architecture.num_attention_heads=3"], "must be a multiple of `num_key_value_heads`"),
        (['text.held_out=["x"]'], "not both"),
        (["text.held_out_share=0", "stages.0.evaluate_every=2"], "needs held-out text"),
    ],
)
def test_mistakes_are_named(write, changes, words):
    with pytest.raises(ValueError, match=words) as error:
        load_recipe(write(SMALL), changes)
    assert "\n" not in str(error.value)


def test_what_is_no_recipe_is_named(write):
    with pytest.raises(ValueError, match="is no JSON"):
        load_recipe(write("{"))
    with pytest.raises(ValueError, match="the recipe must be an object"):
        load_recipe(write("[]"))
    with pytest.raises(ValueError, match="the recipe lacks 'output'"):
        load_recipe(write({}))
    unsaved = {**SMALL["stages"][0], "checkpoint_every": 0}
    with pytest.raises(ValueError, match="'long' keeps the optimizer's averages of 'short', which saves none"):
        load_recipe(write({**SMALL, "stages": [unsaved, {**unsaved, "name": "long"}]}))
    twice = {**SMALL, "stages": SMALL["stages"] * 2}
    with pytest.raises(ValueError, match="names must differ, got short, short"):
        load_recipe(write(twice))


def test_shipped_recipes_are_whole():
    recipe = load_recipe(shipped_recipe("tunnel-1m"))
    assert [stage.sparse_config is None for stage in recipe.stages] == [True, False]
    names = "minicpm4-books, minicpm4-books-ternary, tunnel-1m"
    with pytest.raises(ValueError, match=rf"There is no recipe 'none': give a \.json file, or one of {names}"):
        shipped_recipe("none")
