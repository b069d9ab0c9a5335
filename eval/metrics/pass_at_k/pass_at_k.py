"""pass@k of programs that run in the sandbox: `minicpm4_hf.eval.metrics.programs`."""

import datasets
import evaluate

from minicpm4_hf.eval.metrics import base, programs


class PassAtK(base.TextMetric):
    """`compute(predictions, references, k=(1,), workers=None, **limits)`, all as of `programs.pass_at_k`."""

    def _info(self):
        text = datasets.Value("string")
        task = {"prompt": text, "test": text, "entry_point": text}
        return evaluate.MetricInfo(
            description="The chance that one of k programs passes a task's tests (arXiv:2107.03374).",
            citation="",
            inputs_description=programs.pass_at_k.__doc__,
            features=datasets.Features({"predictions": datasets.Sequence(text), "references": task}),
            homepage=base.HOMEPAGE,
        )

    def _compute(self, predictions, references, k=(1,), workers=None, **limits):
        return programs.pass_at_k(predictions, references, k=k, workers=workers, **limits)
