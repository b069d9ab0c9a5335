"""BIG-Bench Hard: 27 tasks that need several steps of reasoning.

name: bbh
source: SaylorTwift/bbh, a config a task, split test (6,511 questions), which is suzgunmirac/BIG-Bench-Hard
licence: MIT
shots: 3, worked; the set's own chain-of-thought prompts, which come with lm-eval
metric: exact match of the option or phrase behind "answer is", mean over the tasks
paper: Table 3: BitCPM4-0.5B 43.13, BitCPM4-1B 57.64; Table 5: MiniCPM4-0.5B 49.87, MiniCPM4-8B 76.73
prompts: OpenCompass bbh_gen_2879b0
chosen: the paper names OpenCompass but no settings; an answer has at most 512 tokens, as there, and ends where the
    model asks itself another question
"""

import importlib.util
from pathlib import Path

from minicpm4_hf.eval.benchmarks.data import Source
from minicpm4_hf.eval.benchmarks.sample import Benchmark, PromptSettings, Sample
from minicpm4_hf.eval.metrics.normalise import is_match

PARTS = """
temporal_sequences disambiguation_qa date_understanding tracking_shuffled_objects_three_objects penguins_in_a_table
geometric_shapes snarks ruin_names tracking_shuffled_objects_seven_objects tracking_shuffled_objects_five_objects
logical_deduction_three_objects hyperbaton logical_deduction_five_objects logical_deduction_seven_objects
movie_recommendation salient_translation_error_detection reasoning_about_colored_objects
multistep_arithmetic_two navigate dyck_languages word_sorting sports_understanding boolean_expressions object_counting
formal_fallacies causal_judgement web_of_lies
""".split()
SOURCE = Source("bbh", "SaylorTwift/bbh", None, "test", ("input", "target"))
HEAD = "Follow the given examples and answer the question.\n"
STEPS = "\nA: Let's think step by step."


def read_examples(part: str) -> tuple[str, list[dict]]:
    """A task's instruction and its worked examples."""
    import yaml

    (folder,) = importlib.util.find_spec("lm_eval").submodule_search_locations
    path = Path(folder) / "tasks" / "bbh" / "cot_fewshot" / f"{part}.yaml"
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    return content["description"].strip(), content["fewshot_config"]["samples"]


def build(read, settings: PromptSettings) -> list[Sample]:
    """All tasks, in OpenCompass's order."""
    samples = []
    for part in TASK.parts_of(settings):
        description, examples = read_examples(part)
        examples = TASK.take_shots(settings, examples, f"The prompt of bbh/{part}")
        worked = [f"Q: {example['input']}{STEPS}\n{example['target']}" for example in examples]
        for index, row in enumerate(read(SOURCE, "test", part)):
            question = HEAD + "\n\n".join([description, *worked, f"Q: {row['input']}{STEPS}"])
            reference = f"So the answer is {row['target']}."
            samples.append(Sample(part, index, reference, question, fields={"target": row["target"]}))
    return samples


TASK = Benchmark(
    build,
    score=lambda sample, answer: float(is_match(answer, sample.fields["target"], "bbh")),
    parts=tuple(PARTS),
    num_shots=3,
    max_tokens=512,
    stops=("\n\nQ:", "\nQ: "),
)
