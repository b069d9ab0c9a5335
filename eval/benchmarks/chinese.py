"""What C-Eval and CMMLU share: subjects with four choices in columns of their own, and examples in the split dev."""

from .data import Source
from .prompts import LETTERS, spell_choices
from .sample import Benchmark, PromptSettings, Sample


def find_capital(answer: str) -> str:
    """The first capital letter of an answer, whatever it is (OpenCompass's `first_capital_postprocess`)."""
    return next((letter for letter in answer if letter.isupper()), "")


def build_subjects(
    task: Benchmark,
    read,
    settings: PromptSettings,
    source: Source,
    subjects: dict[str, str],
    *,
    hint: str,
    ending: str,
    answer: str,
    columns: tuple[str, str],
) -> list[Sample]:
    """The questions of each subject, to be answered with a letter.

    Args:
        subjects: names in the data, and in the prompts.
        hint: takes the subject and the question.
        ending: of a question, behind the choices.
        answer: what stands before the letter in an answer.
        columns: of question and letter.

    Raises:
        ValueError: a letter that is none, or too few examples.
    """
    samples = []
    for subject in task.parts_of(settings):

        def ask(row: dict, name: str = subjects[subject]) -> str:
            return spell_choices(hint.format(name, row[columns[0]]), [row[letter] for letter in LETTERS]) + ending

        examples = read(source, "dev", subject) if settings.shots != 0 else []
        examples = task.take_shots(settings, examples, f"The split 'dev' of {source.task}, part {subject!r},")
        shots = tuple((ask(row), answer + row[columns[1]]) for row in examples)
        for index, row in enumerate(read(source, source.main_split, subject)):
            letter = row[columns[1]]
            if letter not in LETTERS:
                raise ValueError(f"An answer of {source.task} must be one of A, B, C and D, got {letter!r}.")
            if settings.style == "chat":
                samples.append(Sample(subject, index, letter, ask(row), shots))
                continue
            context = "\n".join([*(text for shot in shots for text in shot), ask(row), answer.rstrip()])
            pairs = tuple((context.rstrip("\n"), (" " if answer else "\n") + choice) for choice in LETTERS)
            samples.append(Sample(subject, index, letter, pairs=pairs, gold=LETTERS.index(letter)))
    return samples
