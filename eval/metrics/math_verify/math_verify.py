"""Answers equal to the reference as mathematics: `minicpm4_hf.eval.metrics.mathematics`."""

import datasets
import evaluate

from minicpm4_hf.eval.metrics import base, mathematics


class MathVerify(base.TextMetric):
    """`compute(predictions, references)`."""

    def _info(self):
        text = datasets.Value("string")
        return evaluate.MetricInfo(
            description="The share of answers that equal the reference, by the library math-verify.",
            citation="",
            inputs_description=mathematics.is_equal.__doc__,
            features=datasets.Features({"predictions": text, "references": text}),
            homepage=base.HOMEPAGE,
        )

    def _compute(self, predictions, references):
        return {"math_verify": mathematics.math_accuracy(predictions, references)}
