"""Short prompts with one right answer, many at a time: sums with the steps written out, and calls of functions.

Each example is continued greedily by as many tokens as its own completion has, or to the end of the turn. The model
attends as its checkpoint says; at such lengths that is dense in all official settings.
"""

import torch
from transformers import GenerationConfig

from minicpm4_hf.training.synthetic import Example, addition_problems, make_example

from .cases import Case, Plan
from .subject import Subject
from .tables import format_table


def complete_batch(subject: Subject, examples: list[Example]) -> list[str]:
    """Greedy completions of a batch, which is padded on the left; the end-of-text token is not part of them."""
    pad, device = subject.tokenizer.pad_token_id, subject.model.device
    width = max(example.prompt_length for example in examples)
    input_ids = torch.full((len(examples), width), pad)
    mask = torch.zeros_like(input_ids)
    for row, example in enumerate(examples):
        input_ids[row, width - example.prompt_length :] = torch.from_numpy(example.prompt_ids)
        mask[row, width - example.prompt_length :] = 1
    allowed = [len(example.completion_ids) for example in examples]
    ends = subject.model.generation_config.eos_token_id
    settings = GenerationConfig(do_sample=False, max_new_tokens=max(allowed), pad_token_id=pad, eos_token_id=ends)
    output = subject.model.generate(input_ids.to(device), attention_mask=mask.to(device), generation_config=settings)[
        :, width:
    ]
    ends = set([ends] if isinstance(ends, int) else ends or [])
    completions = []
    for row, count in zip(output.tolist(), allowed):
        stop = next((place for place, token in enumerate(row[:count]) if token in ends), count)
        completions.append(subject.tokenizer.decode(row[:stop]))
    return completions


def plan_answers(subject: Subject, examples: list[Example], settings: dict, batch: int) -> Plan:
    """Answer all examples, those of about the same length together.

    Raises:
        ValueError: an example that is longer than the model's context.
    """
    limit, longest = subject.model.config.max_position_embeddings, max(example.end for example in examples)
    if longest > limit:
        raise ValueError(f"The longest example has {longest} tokens, and the model's context only {limit}.")
    order = sorted(range(len(examples)), key=lambda index: examples[index].prompt_length)
    # Neighbours in a batch can change the last bits of a row, so they are part of what sets a case apart.
    shared = {**settings, "num_examples": len(examples), "batch": batch}
    cases = [Case({**shared, "index": index}, examples[index].end) for index in order]

    def run(keys: list[dict]) -> list[dict]:
        asked = [examples[key["index"]] for key in keys]
        return [
            {"solved": example.is_solved_by(completion), "answer": example.answer, "completion": completion}
            for example, completion in zip(asked, complete_batch(subject, asked))
        ]

    def summarize(results: list[dict]) -> dict:
        solved = sum(result["solved"] for result in results)
        return {"asked": len(results), "solved": solved, "accuracy": solved / len(results)}

    return Plan(cases, run, summarize, batch)


def plan_addition(subject: Subject, texts, *, problems: int, batch: int, seed: int) -> Plan:
    """Different sums of two- and three-digit numbers of the test split.

    Raises:
        ValueError: the split has not so many, or a tokenizer of another kind than the package's.
    """
    examples = list(addition_problems(subject.tokenizer, problems, seed=seed))
    return plan_answers(subject, examples, {"seed": seed}, batch)


def plan_tools(subject: Subject, texts, *, dialogues: int, batch: int, seed: int) -> Plan:
    """Chats of the test split with three functions on offer; right is the one call with the right arguments.

    Raises:
        ValueError: a tokenizer of another kind than the package's.
    """
    options = {"split": "test", "seed": seed}
    examples = [make_example("tools", subject.tokenizer, None, index=i, **options) for i in range(dialogues)]
    return plan_answers(subject, examples, {"seed": seed}, batch)


def describe_answers(figures: dict) -> str:
    """A table of one line."""
    return format_table(
        ("asked", "right", "share"),
        [(f"{figures['asked']:,}", f"{figures['solved']:,}", f"{figures['accuracy']:.1%}")],
    )
