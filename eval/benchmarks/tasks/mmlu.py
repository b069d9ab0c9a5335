"""MMLU: questions with four choices from 57 subjects.

name: mmlu
source: cais/mmlu, config all, split test (14,042 questions)
licence: MIT
shots: 5, the first of the subject in the split dev
metric: accuracy, mean over the subjects; in a chat the letter in the written answer, in plain text the likeliest of
    the letters A to D
paper: Table 3: BitCPM4-0.5B 49.88, BitCPM4-1B 59.24; Table 5: MiniCPM4-0.5B 55.55, MiniCPM4-8B 75.83
prompts: OpenCompass mmlu_gen_4d595a (chat), mmlu_ppl_ac766d (plain)
chosen: the paper names OpenCompass but no settings; these are of its collections for chat and for base models; a
    written answer has at most 256 tokens
"""

from minicpm4_hf.eval.benchmarks.data import Source
from minicpm4_hf.eval.benchmarks.prompts import LETTERS, spell_choices
from minicpm4_hf.eval.benchmarks.sample import Benchmark, PromptSettings, Sample
from minicpm4_hf.eval.metrics.normalise import first_option

SUBJECTS = """
abstract_algebra anatomy astronomy business_ethics clinical_knowledge college_biology college_chemistry
college_computer_science college_mathematics college_medicine college_physics computer_security conceptual_physics
econometrics electrical_engineering elementary_mathematics formal_logic global_facts high_school_biology
high_school_chemistry high_school_computer_science high_school_european_history high_school_geography
high_school_government_and_politics high_school_macroeconomics high_school_mathematics high_school_microeconomics
high_school_physics high_school_psychology high_school_statistics high_school_us_history high_school_world_history
human_aging human_sexuality international_law jurisprudence logical_fallacies machine_learning management
marketing medical_genetics miscellaneous moral_disputes moral_scenarios nutrition philosophy prehistory
professional_accounting professional_law professional_medicine professional_psychology public_relations
security_studies sociology us_foreign_policy virology world_religions
""".split()
SOURCE = Source("mmlu", "cais/mmlu", "all", "test", ("question", "subject", "choices", "answer"))
CHAT_HINT = "There is a single choice question about {}. Answer the question by replying A, B, C or D."
PLAIN_HINT = "The following are multiple choice questions (with answers) about  {}.\n\n"


def make_sample(settings: PromptSettings, subject: str, index: int, shots: list[dict], row: dict) -> Sample:
    """A question of a subject, to be answered with a letter."""
    about, letter = subject.replace("_", " "), LETTERS[row["answer"]]
    if settings.style == "chat":

        def ask(row: dict) -> str:
            question = spell_choices("Question: " + row["question"], row["choices"])
            return f"{CHAT_HINT.format(about)}\n{question}\nAnswer: "

        turns = tuple((ask(shot), f"{LETTERS[shot['answer']]}\n") for shot in shots)
        return Sample(subject, index, letter, ask(row), turns)
    blocks = [spell_choices(item["question"], item["choices"]) + "\nAnswer:" for item in (*shots, row)]
    answered = [f"{block} {LETTERS[shot['answer']]}\n\n" for block, shot in zip(blocks, shots)]
    context = PLAIN_HINT.format(about) + "".join(answered) + blocks[-1]
    pairs = tuple((context, f" {choice}") for choice in LETTERS)
    return Sample(subject, index, letter, pairs=pairs, gold=row["answer"])


def read_shots(read, settings: PromptSettings, subject: str) -> list[dict]:
    """Examples of a subject, from MMLU's own split for them."""
    if settings.shots == 0:
        return []
    rows = [row for row in read(SOURCE, "dev") if row["subject"] == subject]
    return list(TASK.take_shots(settings, rows, f"The split 'dev' of mmlu, subject {subject!r},"))


def build(read, settings: PromptSettings) -> list[Sample]:
    """All subjects, in the alphabet's order."""
    samples, rows = [], read(SOURCE, "test")
    for subject in TASK.parts_of(settings):
        shots = read_shots(read, settings, subject)
        found = [row for row in rows if row["subject"] == subject]
        if not found:
            raise ValueError(f"The split 'test' of mmlu has no question of the subject {subject!r}.")
        samples += [make_sample(settings, subject, i, shots, row) for i, row in enumerate(found)]
    return samples


TASK = Benchmark(
    build,
    score=lambda sample, answer: float(first_option(answer, LETTERS) == sample.reference),
    parts=tuple(SUBJECTS),
    num_shots=5,
)
