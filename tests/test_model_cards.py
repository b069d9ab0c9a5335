"""Every figure in the model card and in README comes from a committed record."""

from pathlib import Path

import pytest

from minicpm4_hf.eval.model_card import CARD, RECORDS, fill_template, read_records, render, replace_figures

ROOT = Path(__file__).resolve().parent.parent


def test_committed_texts_are_what_the_records_say():
    for path, text in render(ROOT).items():
        assert (ROOT / path).read_text(encoding="utf-8") == text, (
            f"run `python -m minicpm4_hf.eval.model_card` ({path})"
        )


def test_the_records_hold_what_was_promised():
    records = read_records(ROOT / RECORDS)
    for book in ("dracula", "emma"):
        assert records["training"]["bits_per_byte"][book] < records["xz"][book]
        assert records["training"]["books"][book]["role"] == "validation"
    assert abs(records["demo"]["perplexity_ratio"] - 1) < 0.01
    assert records["training"]["parameters"] <= 6_000_000
    assert records["training"]["seconds"] < 2 * 3600


def test_the_card_says_what_the_checkpoint_is():
    text = (ROOT / CARD).read_text(encoding="utf-8")
    assert text.startswith("---\nlicense: apache-2.0\n")
    for heading in ("## Data", "## Recipe", "## Figures", "## Training curve"):
        assert heading in text


def test_a_figure_without_a_record_is_an_error():
    curve = [{"excerpt_bits_per_byte": {"a": 2.0}, "step": 1, "tokens": 8, "lr": 0.1, "loss": 3.0}]
    with pytest.raises(ValueError, match="speed"):
        fill_template("{training[speed]}", {"training": {"curve": curve}})
    with pytest.raises(ValueError, match="markers"):
        replace_figures("no markers", "1")
