"""The models that a recipe names: where they lie, and whether they fit, before anything is trained."""

import re
from pathlib import Path

from transformers import AutoConfig, AutoTokenizer

from minicpm4_hf.configuration_minicpm4 import MiniCPM4Config
from minicpm4_hf.shipped import SHIPPED, shipped_checkpoint
from minicpm4_hf.training.qat import check_fit


def find_model(name: str | Path) -> str | Path:
    """The folder or Hub name by which a model loads: `name` itself, or a shipped checkpoint's for its name.

    Raises:
        FileNotFoundError: no such folder, and no Hub name either; or this installation lacks the shipped checkpoint.
    """
    if Path(name).is_dir():
        return name
    if name in SHIPPED:
        return shipped_checkpoint(name)
    if not re.fullmatch(r"\w[\w.-]*/[\w.-]+", str(name)):
        raise FileNotFoundError(
            f"There is no model folder {str(name)!r}, and it is no Hub name (owner/name) either; look at the recipe."
        )
    return name


def check_models(recipe) -> None:
    """See that the models are there that a `Recipe` names, and that its ternary stages can be packed at the end.

    Raises:
        ValueError: a quantised model to go on from, or sizes that do not fit the groups of a ternary stage.
        OSError: there is no such model, or the Hub cannot be reached.
    """
    if recipe.model is None:
        config = MiniCPM4Config(**recipe.architecture)
    else:
        config = AutoConfig.from_pretrained(find_model(recipe.model))
        if getattr(config, "quantization_config", None) is not None:
            raise ValueError(
                f"{recipe.model!r} is quantised, and training goes on from full weights: of a ternary run they are in "
                "its folder `model`."
            )
    for stage in recipe.stages:
        if stage.ternary is not None:
            check_fit(config, stage.ternary)
        if stage.distill is not None:
            AutoConfig.from_pretrained(find_model(stage.distill.teacher))


def check_teachers(recipe, tokenizer) -> None:
    """See that the model of a `Recipe` can learn from its teachers; loads no weights.

    Args:
        tokenizer: of the run.

    Raises:
        ValueError: a teacher has other tokens, or another vocabulary size than the model.
    """
    for stage in recipe.stages:
        if stage.distill is None:
            continue
        source = find_model(stage.distill.teacher)
        config = None if recipe.model is None else AutoConfig.from_pretrained(find_model(recipe.model))
        sizes = AutoConfig.from_pretrained(source).vocab_size, config.vocab_size if config else len(tokenizer)
        if sizes[0] != sizes[1] or AutoTokenizer.from_pretrained(source).get_vocab() != tokenizer.get_vocab():
            raise ValueError(
                f"Teacher {stage.distill.teacher!r} of stage {stage.name!r} must have the tokens of the model that "
                f"learns from it, and has others (vocabularies of {sizes[0]} and {sizes[1]})."
            )


__all__ = ["check_models", "check_teachers", "find_model"]
