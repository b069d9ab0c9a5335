"""Question answering among distracting documents (`qa_1`, `qa_2`).

Prompt and choice of documents: NVIDIA/RULER (Apache-2.0), `scripts/data/synthetic/{qa,constants}.py` at c3f5e3b.
"""

import random

from .source import Sample, Source

PROMPT = (
    "Answer the question based on the given documents. Only give me the answer and do not output any other words.\n\n"
    "The following are given documents.\n\n{context}\n\nAnswer the question based on the given documents. Only give "
    "me the answer and do not output any other words.\n\nQuestion: {query}"
)
PREFIX = " Answer:"


def make_answering(rng: random.Random, source: Source, size: int, *, task: str, index: int) -> Sample:
    """The question of that index, with the documents that answer it and so many others that there are `size`.

    Distractors come from the question's own article first, then from all others.

    Raises:
        ValueError: the set has no such question.
    """
    questions = source.questions[task]
    if index >= len(questions.questions):
        raise ValueError(
            f"{questions.name} has {len(questions.questions)} questions for `{task}`; ask for at most that many "
            "`--samples`."
        )
    question = questions.questions[index]
    near, gold = question.near, question.gold
    if size - len(gold) <= len(near):
        chosen = [*gold, *rng.sample(near, max(0, size - len(gold)))]
    else:
        taken = {*gold, *near}
        others = [place for place in range(len(questions.documents)) if place not in taken]
        missing = size - len(gold) - len(near)
        chosen = [*gold, *near, *rng.sample(others, min(missing, len(others)))]
        # Where the set is exhausted, its documents come again.
        chosen += [place for place in others for _ in range(-(-missing // max(1, len(others))))][: size - len(chosen)]
    rng.shuffle(chosen)
    context = "\n\n".join(f"Document {i}:\n{questions.documents[place]}" for i, place in enumerate(chosen, 1))
    return Sample(PROMPT.format(context=context, query=question.query), PREFIX, question.outputs)
