"""LongPPL of numbers that a model and an evaluator gave: `minicpm4_hf.eval.metrics.key_tokens`."""

import datasets
import evaluate

from minicpm4_hf.eval.metrics import base, key_tokens


class LongPPL(evaluate.Metric):
    """`compute(predictions, references, alpha=2.0, beta=-2.0)`: the model's nats, and the evaluator's of each text."""

    def _info(self):
        row = datasets.Sequence(datasets.Value("float64"))
        return evaluate.MetricInfo(
            description="The perplexity of the tokens that need the long context (arXiv:2410.23771).",
            citation="",
            inputs_description=key_tokens.longppl_of_texts.__doc__,
            features=datasets.Features({"predictions": row, "references": {"long_nats": row, "short_nats": row}}),
            homepage=base.HOMEPAGE,
        )

    def _compute(self, predictions, references, alpha=key_tokens.ALPHA, beta=key_tokens.BETA):
        long_nats = [one["long_nats"] for one in references]
        short_nats = [one["short_nats"] for one in references]
        return key_tokens.longppl_of_texts(predictions, long_nats, short_nats, alpha=alpha, beta=beta)
