"""Answers that have what was hidden in the context: `minicpm4_hf.eval.metrics.needles`."""

import datasets
import evaluate

from minicpm4_hf.eval.metrics import base, needles


class NeedleAccuracy(base.TextMetric):
    """`compute(predictions, references, rule="exact" | "all" | "part")`; a reference is a list of needles."""

    def _info(self):
        text = datasets.Value("string")
        return evaluate.MetricInfo(
            description="The mean score of answers about needles in a long context.",
            citation="",
            inputs_description=needles.needle_accuracy.__doc__,
            features=datasets.Features({"predictions": text, "references": datasets.Sequence(text)}),
            homepage=base.HOMEPAGE,
        )

    def _compute(self, predictions, references, rule="exact"):
        return {"needle_accuracy": needles.needle_accuracy(predictions, references, rule=rule)}
