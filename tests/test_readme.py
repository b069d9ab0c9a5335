"""README.md tells the truth: its code runs, its commands and flags exist, its links lead somewhere."""

import json
import math
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
SET_UP = ("pip install -c constraints.txt . && minicpm4 demo", 'pip install -c constraints.txt -e ".[test]" && pytest')
NOT_RUN = "<!-- not run: needs a download -->"

# (the line before the fence, the language, the text)
BLOCKS = re.findall(r"^([^\n]*)\n```(\w*)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
LINES = [line for _, language, text in BLOCKS if not language for line in text.splitlines()]
COMMANDS = [line for line in LINES if line not in SET_UP]

# How a command of README.md is asked for its help from any folder.
PROGRAMS = {"minicpm4": [sys.executable, "-m", "minicpm4_cli"], "python": [sys.executable]}


def test_set_up_is_two_commands():
    assert [line for line in LINES if line.startswith("pip ")] == list(SET_UP)


def test_python_blocks_run(tmp_path):
    run = [text for before, language, text in BLOCKS if language == "python" and before != NOT_RUN]
    skipped = [text for before, language, text in BLOCKS if language == "python" and before == NOT_RUN]
    assert len(run) >= 3 and len(skipped) == README.count(NOT_RUN)
    for text in skipped:
        compile(text, "README.md", "exec")
    done = subprocess.run([sys.executable, "-c", "\n".join(run)], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    shown = done.stdout.splitlines()
    assert shown[0].startswith("It was a dark night, and") and len(shown[0]) > 30
    assert "torch.Size([1, 16, 10, 64]) torch.Size([1, 2, 10, 24])" in shown
    assert shown[-1] == "torch.uint8"


def test_python_blocks_of_the_evaluation_page_run(tmp_path):
    page = (ROOT / "eval" / "README.md").read_text(encoding="utf-8")
    texts = re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    done = subprocess.run([sys.executable, "-c", "\n".join(texts)], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    accuracy, perplexity = done.stdout.splitlines()
    assert "1.0" in accuracy and float(perplexity) == pytest.approx(math.exp(0.7))


@pytest.mark.parametrize("command", COMMANDS)
def test_command_exists(command, tmp_path):
    program, *words = shlex.split(command)
    flags = [word for word in words if re.match(r"--\w", word)]
    place = next((i for i, word in enumerate(words) if word.startswith("--")), len(words))
    module = words[:2] if program == "python" else []  # -m NAME
    subcommand = [word for word in words[len(module) : place] if re.fullmatch(r"[a-z][a-z0-9-]*", word)][:1]
    done = subprocess.run(
        [*PROGRAMS[program], *module, *subcommand, "--help"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert [flag for flag in flags if not re.search(rf"{flag}\b", done.stdout)] == []


def test_named_subcommands_exist():
    from minicpm4_cli import COMMANDS as subcommands

    named = set(re.findall(r"\bminicpm4 ([a-z]\w*)", "\n".join(re.findall(r"`([^`\n]+)`", README) + LINES)))
    assert {"demo", "serve"} <= named <= set(subcommands)


def test_links_and_paths_exist():
    links = {link.partition("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", README) if "://" not in link}
    paths = set(re.findall(r"`([\w.]+(?:/[\w.]+)*/|[\w/]*\.(?:md|txt|toml|py|ci/run))`", README))
    assert links and paths
    assert [name for name in sorted(links | paths) if not (ROOT / name).exists()] == []


def test_training_figures_are_those_of_the_record():
    result = json.loads((ROOT / "eval/results/train-tunnel-1m.json").read_text(encoding="utf-8"))["result"]
    last = result["stages"][-1]
    figures = [f"{result['seconds']:.0f} s for", f"{sum(stage['tokens'] for stage in result['stages']):,} tokens"]
    assert [
        text for text in (*figures, f"{last['held_out_bits_per_byte']:.3f} bits per byte") if text not in README
    ] == []
