"""Metrics: pure functions, and beside them Hugging Face `evaluate` modules of the same, which load without a network.

    from minicpm4_hf.eval.metrics import load_metric
    load_metric("answer_exact_match").compute(predictions=["So #### 1,234"], references=["1234"], form="number")

| module               | what it asks                                        | its functions, without `evaluate` |
|----------------------|-----------------------------------------------|-----------------------------------|
| `answer_exact_match` | is the number, option or phrase of an answer right? | `normalise.py`                    |
| `math_verify`        | is it equal as mathematics?                         | `mathematics.py`                  |
| `pass_at_k`          | does one of k programs pass the tests?              | `programs.py`                     |
| `needle_accuracy`    | does it have what was hidden in the context?        | `needles.py`                      |
| `longppl`            | how well are the tokens predicted that need it all? | `key_tokens.py`                   |

A folder `<name>` with `<name>.py` is what `evaluate.load` takes; it copies the script, which therefore imports by
full names only, one import a line.
"""

from pathlib import Path

METRICS = ("answer_exact_match", "longppl", "math_verify", "needle_accuracy", "pass_at_k")


def metric_path(name: str) -> Path:
    """The folder of a metric, for `evaluate.load`.

    Raises:
        ValueError: an unknown name.
    """
    if name not in METRICS:
        raise ValueError(f"`name` must be one of {', '.join(METRICS)}, got {name!r}.")
    return Path(__file__).with_name(name)


def load_metric(name: str, **settings):
    """A metric as an `evaluate` module, from the package's files.

    Args:
        name: one of METRICS.
        settings: for `evaluate.load`, such as `cache_dir`.

    Raises:
        ValueError: an unknown name.
        ImportError: without `evaluate`, which the extra "eval" brings.
    """
    path = metric_path(name)
    try:
        import evaluate
    except ImportError as error:
        raise ImportError('`load_metric` needs evaluate: pip install "minicpm4-hf[eval]".') from error
    return evaluate.load(str(path), **settings)
