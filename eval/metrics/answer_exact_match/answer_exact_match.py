"""Answers that say what the reference says, after extraction: `minicpm4_hf.eval.metrics.normalise`."""

import datasets
import evaluate

from minicpm4_hf.eval.metrics import base, normalise


class AnswerExactMatch(base.TextMetric):
    """`compute(predictions, references, form="number" | "option" | "bbh" | "text", options="ABCD")`."""

    def _info(self):
        text = datasets.Value("string")
        return evaluate.MetricInfo(
            description="The share of answers whose number, option or phrase is the reference's.",
            citation="",
            inputs_description=normalise.is_match.__doc__,
            features=datasets.Features({"predictions": text, "references": text}),
            homepage=base.HOMEPAGE,
        )

    def _compute(self, predictions, references, form="text", options="ABCD"):
        share = normalise.answer_exact_match(predictions, references, form=form, options=options)
        return {"answer_exact_match": share}
