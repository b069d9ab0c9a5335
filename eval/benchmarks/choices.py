"""What both sets of ARC share."""

from .sample import Sample


def build_arc(rows: list[dict], name: str) -> list[Sample]:
    """Questions whose choices are the texts of the answers, three to five of them.

    Raises:
        ValueError: a key that no choice has.
    """
    samples = []
    for index, row in enumerate(rows):
        texts, labels = tuple(row["choices"]["text"]), list(row["choices"]["label"])
        if row["answerKey"] not in labels:
            raise ValueError(f"An `answerKey` of {name} must be one of {', '.join(labels)}, got {row['answerKey']!r}.")
        gold = labels.index(row["answerKey"])
        question = f"Question: {row['question']}\nAnswer: "
        samples.append(Sample(name, index, texts[gold], question, choices=texts, gold=gold))
    return samples
