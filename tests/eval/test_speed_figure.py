"""`python -m minicpm4_hf.eval speed-figure`, and the shapes of figure 1 that `speed` runs when asked."""

import json
import re
import sys

import pytest

from minicpm4_hf.eval.__main__ import main
from minicpm4_hf.eval.speed.command import choose_contestants
from minicpm4_hf.eval.speed.contestants import CONTESTANTS, describe_shape
from minicpm4_hf.eval.tables.measured import RESULTS

SPEEDS = {("a", 4096): 700.0, ("b", 4096): 350.0, ("a", 8192): 650.0}


def record(speeds=SPEEDS, **changes):
    rows = [{"contestant": name, "tokens": tokens, "tokens_per_s": value} for (name, tokens), value in speeds.items()]
    return {
        "benchmark": "speed",
        "preset": "tiny",
        "dtype": "bfloat16",
        "machine": {"cpu": "A CPU", "threads": 2},
        "contestants": {"a": {}, "b": {}, "c": {}},
        "prompt": rows,
        "decode": [],
        **changes,
    }


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "speed.json"
    path.write_text(json.dumps(record()))
    return path


def draw(path, name, *arguments):
    output = path.with_name(name)
    assert main(["speed-figure", str(path), "--output", str(output), *arguments]) == 0
    return output.read_bytes()


def test_figure_has_every_bar(path):
    svg = draw(path, "f.svg").decode()
    shown = re.findall(r">([^<>\n]+)</text>", svg)
    assert {"700", "350", "650", "4,096", "8,192", "prefill", "tokens/s"} <= set(shown)
    assert "decode" not in shown and "tiny, bfloat16, random weights; A CPU, 2 threads" in shown
    assert "350" not in draw(path, "g.svg", "--contestants", "a").decode()
    assert draw(path, "f.png").startswith(b"\x89PNG")
    assert draw(path, "f.svg") == draw(path, "h.svg") and draw(path, "f.png") == draw(path, "h.png")


def test_axis_is_logarithmic_for_great_ratios(path):
    assert "mathdefault" not in draw(path, "f.svg").decode()
    path.write_text(json.dumps(record({**SPEEDS, ("b", 8192): 6.0})))
    assert (
        "10^" in draw(path, "f.svg").decode().replace("\u2009", "") or "mathdefault{10" in draw(path, "f.svg").decode()
    )


def test_kept_records_are_drawn(tmp_path):
    for found in RESULTS.glob("speed-*.json"):
        assert main(["speed-figure", str(found), "--output", str(tmp_path / "f.png")]) == 0
        assert (tmp_path / "f.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("content", "arguments", "sentence"),
    [
        ("{", [], "is not JSON"),
        ('{"benchmark": "memory"}', [], "is not a record of `python -m minicpm4_hf.eval speed`."),
        (json.dumps(record()), ["--contestants", "d"], "The record has no contestant 'd'; it has a, b, c."),
        (json.dumps(record()), ["--contestants", "c"], "has no speed of c to draw."),
        (json.dumps(record()), ["--output", "f.gif"], "`--output` must end in .png or .svg, got 'f.gif'."),
        (json.dumps(record()), ["--output", "absent/f.png"], "The folder of 'absent/f.png' does not exist."),
    ],
)
def test_wrong_input(content, arguments, sentence, path, capsys):
    path.write_text(content)
    assert main(["speed-figure", str(path), "--output", str(path.with_name("f.png")), *arguments]) == 2
    assert sentence in capsys.readouterr().err


def test_without_matplotlib(path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["speed-figure", str(path), "--output", str(path.with_name("f.png"))]) == 2
    assert "The figure needs matplotlib: `pip install minicpm4-hf[eval]`." in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "billions"), [("qwen3-0.6b", 0.6), ("qwen3-8b", 8.19), ("llama3-8b", 8.03), ("glm4-9b", 9.4)]
)
def test_shapes_have_the_published_sizes(name, billions):
    shape = describe_shape(CONTESTANTS[name].make_config("MiniCPM4-8B"))
    assert shape["num_parameters"] / 1e9 == pytest.approx(billions, abs=0.006)


def test_glm_has_ours_shape():
    ours, glm = (CONTESTANTS[name].make_config("MiniCPM4-0.5B") for name in ("ours-dense", "glm-sdpa"))
    for field in ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim"):
        assert getattr(ours, field) == getattr(glm, field)
    assert glm.model_type == "glm"


def test_large_shapes_run_only_when_named():
    chosen, _ = choose_contestants(None, [])
    assert "ours-sparse" in chosen and not {"qwen3-8b", "llama3-8b", "glm4-9b", "glm-sdpa"} & set(chosen)
    assert choose_contestants(["qwen3-8b", "ours-dense"], [])[0] == ("qwen3-8b", "ours-dense")
