"""What the metrics' `evaluate` modules share."""

import evaluate

HOMEPAGE = "https://github.com/OpenBMB/MiniCPM"


def encodable(value):
    """Texts, in lists and dicts too, with "?" for the half characters that UTF-8 has no form for; else unchanged."""
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode("utf-8")
    if isinstance(value, list | tuple):
        return [encodable(item) for item in value]
    if isinstance(value, dict):
        return {name: encodable(item) for name, item in value.items()}
    return value


class TextMetric(evaluate.Metric):
    """A metric of texts, which may be anything that a model writes."""

    def add_batch(self, *, predictions=None, references=None, **kwargs):
        """As `evaluate.Metric.add_batch`."""
        super().add_batch(predictions=encodable(predictions), references=encodable(references), **kwargs)

    def add(self, *, prediction=None, reference=None, **kwargs):
        """As `evaluate.Metric.add`."""
        super().add(prediction=encodable(prediction), reference=encodable(reference), **kwargs)
