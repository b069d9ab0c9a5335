"""Prompts: the turns of a sample as a chat or as plain text, and questions with lettered choices.

In a plain prompt turns are lines after one another, as where OpenCompass knows no template of a model
(open-compass/opencompass at a5acc4b, `models/base.py`).
"""

from collections.abc import Callable, Sequence

from .sample import Sample

LETTERS = "ABCD"


def render_prompt(sample: Sample, chat_template: Callable[[list[dict]], str] | None) -> str:
    """The text that a model goes on from; a chat where there is a template."""
    if chat_template is None:
        turns = [text for shot in sample.shots for text in shot]
        return "\n".join([*turns, sample.question, *([sample.prefix] if sample.prefix else [])])
    messages = []
    for question, answer in sample.shots:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return chat_template([*messages, {"role": "user", "content": sample.question}])


def render_choices(sample: Sample, chat_template: Callable[[list[dict]], str] | None) -> list[tuple[str, str]]:
    """(context, continuation) of each choice."""
    if sample.pairs:
        return list(sample.pairs)
    prompt = render_prompt(sample, chat_template)
    return [(prompt, choice if chat_template else f"\n{choice}") for choice in sample.choices]


def spell_choices(question: str, choices: Sequence[str]) -> str:
    """A question and its lettered choices, a line each."""
    return "\n".join([question, *(f"{letter}. {text}" for letter, text in zip(LETTERS, choices))])
