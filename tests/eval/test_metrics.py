"""`minicpm4_hf.eval.metrics`: figures worked out by hand, odd answers, and loading without a network."""

import importlib.util
import json
import math
import os
import subprocess
import sys

import pytest

from minicpm4_hf.eval.metrics import METRICS, load_metric, mathematics, metric_path
from minicpm4_hf.eval.metrics.key_tokens import longppl_of_texts
from minicpm4_hf.eval.metrics.needles import match_exactly, needle_accuracy
from minicpm4_hf.eval.metrics.normalise import answer_exact_match, bbh_answer, first_option, is_match, number_of
from minicpm4_hf.eval.metrics.programs import (
    build_program,
    estimate_pass_at_k,
    extract_code,
    humaneval_program,
    pass_at_k,
)
from minicpm4_hf.eval.sandbox import SandboxError, find_isolation

NAN = float("nan")
needs_math_verify = pytest.mark.skipif(
    importlib.util.find_spec("math_verify") is None, reason="math-verify is not installed"
)


def why_not():
    """Why programs cannot be isolated here; empty where they can."""
    try:
        find_isolation()
    except SandboxError as error:
        return str(error)
    return ""


PROBLEM = why_not()
isolated = pytest.mark.skipif(bool(PROBLEM), reason=PROBLEM)


@pytest.mark.parametrize(
    ("answer", "number"),
    [
        ("Natalia sold 48/2 = 24 clips in May.\n48 + 24 = 72.\n#### 72", "72"),
        ("The answer is 1,234.", "1234"),
        ("She pays $1,234,567.50 in all.", "1234567.50"),
        ("The answer is 42. I checked it 3 times.", "42"),
        ("So the answer is: 5 + 3 = 8.\n\nQuestion: What is 2 + 2?\nThe answer is 4.", "8"),
        ("The answer is **$18**.", "18"),
        ("\\boxed{\\$3,000}", "3000"),
        ("-7 degrees", "-7"),
        ("1, 2, 3,4", "4"),  # a list, not thousands
        ("The answer is unknown; of 9 there are 5", "5"),
        ("####", ""),
        ("", ""),
        ("none", ""),
        ("\ud800 17 \udfff", "17"),
    ],
)
def test_number(answer, number):
    assert number_of(answer) == number


@pytest.mark.parametrize(
    ("prediction", "reference", "right"),
    [
        ("The answer is 72.", "48 + 24 = <<48+24=72>>72\n#### 72", True),
        ("18.0", "#### 18", True),
        ("18.0000001", "18", True),  # less than 1e-6 away
        ("18.00001", "18", False),
        ("9" * 5000, "9" * 5000, True),
        ("9" * 4999 + "8", "9" * 5000, False),
        ("1" + "0" * 400, "1" + "0" * 401, False),  # as floats both are infinite
        ("", "18", False),
        ("", "", False),  # nothing said is nothing right
    ],
)
def test_number_is_right(prediction, reference, right):
    assert is_match(prediction, reference, "number") is right


@pytest.mark.parametrize(
    ("answer", "option"),
    [
        ("B", "B"),
        ("B.", "B"),
        ("(C) because of A", "C"),
        ("The answer is B because option A is wrong.", "B"),
        ("A is tempting. The correct answer is (D).", "D"),
        ("Answer: **C**", "C"),
        ("The correct option is \\boxed{B}", "B"),
        ("So $\\boxed{\\text{D}}$", "D"),
        ("答案是C", "C"),
        ("答案\uff1aB", "B"),
        ("答案应该选 D\u3002", "D"),
        ("故选A", "A"),
        ("选项B正确", "B"),
        ("因此 C", "C"),
        ("Between them, C: it is larger", "C"),
        ("xyz", ""),
        ("", ""),
    ],
)
def test_first_option(answer, option):
    assert first_option(answer) == option


def test_first_option_of_others():
    assert first_option("The answer is E.", "ABCDE") == "E"
    assert first_option("The answer is E.", "ABC") == ""
    assert first_option("(]) or (-)", "]-") == "]"
    assert is_match("The answer is J", "J", "option", options="ABCDEFGHIJ")


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ("Let's think. So the answer is (A).", "A"),
        ("So the answer is (B) the red one.", "B"),
        ("A", "A"),
        ("So the answer is True.\n\nQ: not False is", "True"),
        ("the answer is **No**.", "No"),
        ("the answer is ] ) }.", "] ) }"),
        ("the answer is 24. Therefore the answer is 25.", "24. Therefore the"),  # as OpenCompass: the first
        ("", ""),
    ],
)
def test_bbh(answer, said):
    assert bbh_answer(answer) == said


def test_answer_exact_match():
    # 72 is right, 18 is not 19, 1,000 is 1000: 2 of 3
    share = answer_exact_match(["#### 72", "The answer is 18", "$1,000"], ["72", "19", "1000"], form="number")
    assert share == pytest.approx(2 / 3)
    # (A) is A, valid is valid, nothing is not valid, No is not no: 2 of 4
    answers = ["the answer is (A).", "So the answer is valid.", "", "the answer is No."]
    assert answer_exact_match(answers, ["(A)", "valid", "valid", "no"], form="bbh") == 0.5
    # B, C of D, nothing, A: 2 of 4
    assert answer_exact_match(["B.", "C", "?", "(A)"], ["B", "D", "A", "A"], form="option") == 0.5
    assert answer_exact_match([" two  words\n"], ["two words"]) == 1.0


@pytest.mark.parametrize(
    ("function", "arguments", "message"),
    [
        (is_match, ("1", "1", "digits"), "`form` must be one of number, option, bbh, text, got 'digits'."),
        (answer_exact_match, ([], []), "must have one length of at least 1, got 0 and 0."),
        (answer_exact_match, (["1"], ["1", "2"]), "must have one length of at least 1, got 1 and 2."),
        (estimate_pass_at_k, (3, 1, 5), "`k` must be 1 to the number of samples of each task, 3, got 5."),
        (estimate_pass_at_k, (3, 1, 0), "`k` must be 1 to the number of samples of each task, 3, got 0."),
        (estimate_pass_at_k, (3, 4, 1), "`num_correct` must be 0 to `num_samples` 3, got 4."),
        (needle_accuracy, (["a"], [[]]), "`references` must have at least one needle for each prediction"),
        (longppl_of_texts, ([[1.0]], [[1.0], [2.0]], [[1.0]]), "must have one length of at least 1, got 1 and 2."),
        (longppl_of_texts, ([[1.0]], [[1.0, 2.0]], [[1.0, 2.0]]), "must have one shape, got [1] and [2]."),
        (load_metric, ("bleu",), "`name` must be one of answer_exact_match, longppl, math_verify, needle_accuracy"),
    ],
)
def test_wrong_input(function, arguments, message):
    with pytest.raises(ValueError) as caught:
        function(*arguments)
    assert message in str(caught.value)


@needs_math_verify
@pytest.mark.parametrize(
    ("prediction", "reference", "right"),
    [
        ("so $x = \\frac{2}{4}$", "\\frac{1}{2}", True),  # 2 / 4 = 1 / 2
        ("The result is \\boxed{0.5}", "$\\frac12$", True),
        ("\\boxed{(x+1)^2}", "x^2+2x+1", True),  # (x + 1)^2 = x^2 + 2x + 1
        ("$\\{3, 1, 2\\}$", "$\\{1,2,3\\}$", True),
        ("\\boxed{\\sqrt{8}}", "2\\sqrt{2}", True),  # 8 = 4 * 2
        ("\\boxed{7}", "8", False),
        ("\\boxed{(1,2)}", "(2,1)", False),
        ("", "1", False),
        ("no idea", "1", False),
        ("\ud800 \\boxed{5}", "5", True),
        ("\\boxed{" + "9" * 60 + "}", "9" * 59 + "8", False),
        ("\\boxed{" + "{" * 200, "1", False),
    ],
)
def test_math_verify(prediction, reference, right):
    assert mathematics.is_equal(prediction, reference) is right


@needs_math_verify
def test_math_accuracy():
    # 1/2 = 0.5, 3 is not 4, 10 = 10: 2 of 3
    answers, right = ["\\boxed{0.5}", "$3$", "It is 10."], ["\\frac{1}{2}", "4", "10"]
    assert mathematics.math_accuracy(answers, right) == pytest.approx(2 / 3)


def test_math_verify_that_is_missing(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"math_verify needs math-verify: pip install \"minicpm4-hf\[eval\]\"\."):
        mathematics.is_equal("1", "1")


@pytest.mark.parametrize(
    ("num_samples", "num_correct", "k", "expected"),
    [
        (5, 2, 1, 0.4),  # 1 - C(3,1)/C(5,1) = 1 - 3/5
        (5, 2, 2, 0.7),  # 1 - C(3,2)/C(5,2) = 1 - 3/10
        (5, 2, 4, 1.0),  # only 3 are wrong
        (4, 1, 2, 0.5),  # 1 - C(3,2)/C(4,2) = 1 - 3/6
        (10, 3, 3, 17 / 24),  # 1 - C(7,3)/C(10,3) = 1 - 35/120
        (7, 0, 7, 0.0),
        (1, 1, 1, 1.0),
        (100_000, 1, 10, 1e-4),  # k c / n where c is 1
        (2000, 1000, 1000, 1.0),  # 1 - 1/C(2000,1000)
    ],
)
def test_estimate_pass_at_k(num_samples, num_correct, k, expected):
    assert estimate_pass_at_k(num_samples, num_correct, k) == pytest.approx(expected, rel=1e-12)


def test_code_of_an_answer():
    assert extract_code("Here:\n```python\ndef f():\n    return 1\n```\nand ```2```") == "def f():\n    return 1"
    assert extract_code("```\n    return 2\n```") == "    return 2"
    assert extract_code("```python\nx = 1\n") == "x = 1"  # cut off
    assert extract_code("\n    return 3\n") == "    return 3"
    assert extract_code("") == ""


PROMPT = 'import math\n\ndef area(r):\n    """The area of a circle."""\n'
TEST = "def check(candidate):\n    assert abs(candidate(2) - 12.566370614) < 1e-6"  # 4 pi


@pytest.mark.parametrize(
    "answer",
    [
        "    return math.pi * r**2\n\n\nprint(area(",  # a base model goes on, and is cut
        "    x = r\n\n    return math.pi * x * x\ndef other():\n    pass\n",
        "```python\ndef area(r):\n    return half(r) * 2\n\ndef half(r):\n    return math.pi * r**2 / 2\n```",
        "```python\n    return math.pi * r * r\n```",
    ],
)
def test_humaneval_program_that_is_right(answer):
    names = {}
    exec(humaneval_program(PROMPT, answer, TEST, "area"), names)
    assert names["area"](1) == math.pi


@pytest.mark.parametrize("answer", ["    return r", "", "```python\ndef volume(r):\n    return 1\n```", "return ("])
def test_humaneval_program_that_is_wrong(answer):
    with pytest.raises((AssertionError, SyntaxError, TypeError)):
        exec(humaneval_program(PROMPT, answer, TEST, "area"), {})


def test_mbpp_program():
    task = {"test": "assert add(2, 3) == 5\nassert add(-1, 1) == 0"}
    assert build_program("```python\ndef add(a, b):\n    return a + b\n```", task) == (
        "def add(a, b):\n    return a + b\n\nassert add(2, 3) == 5\nassert add(-1, 1) == 0\n"
    )
    assert build_program("", {**task, "prompt": "", "entry_point": ""}).endswith("assert add(-1, 1) == 0\n")


SAMPLES = [
    ["def add(a, b): return a + b", "def add(a, b): return a - b", "import sys; sys.exit(0)", "\ud800"],
    ["    return math.pi * r**2", "    return math.pi * r**2", "    return 3 * r**2", "    while True: pass"],
]
TASKS = [{"test": "assert add(2, 3) == 5"}, {"prompt": PROMPT, "test": TEST, "entry_point": "area"}]


@isolated
def test_pass_at_k():
    figures = pass_at_k(SAMPLES, TASKS, k=(1, 2, 4), timeout_seconds=2)
    # 1 of 4 right: 1/4, 1 - C(3,2)/C(4,2) = 1/2, 1; 2 of 4 right: 2/4, 1 - C(2,2)/C(4,2) = 5/6, 1
    assert figures == pytest.approx({"pass@1": (1 / 4 + 2 / 4) / 2, "pass@2": (1 / 2 + 5 / 6) / 2, "pass@4": 1.0})


def test_pass_at_more_than_there_are_runs_nothing(monkeypatch):
    monkeypatch.setattr("minicpm4_hf.eval.metrics.programs.run_many", None)
    with pytest.raises(ValueError, match="`k` must be 1 to the number of samples of each task, 2, got 3"):
        pass_at_k([["a", "b", "c"], ["a", "b"]], TASKS, k=(1, 3))


@pytest.mark.parametrize(
    ("answer", "needles", "score"),
    [
        ("4817. And then", ["4817"], 1.0),
        (" 4817", ["4817"], 1.0),
        ("48170", ["4817"], 0.0),
        ("The number is 4817", ["4817"], 0.0),
        ("", ["4817"], 0.0),
        ("12", ["11", "12"], 1.0),
        ("4817\ud800", ["4817"], 1.0),
    ],
)
def test_needle_exactly(answer, needles, score):
    assert match_exactly(answer, needles) == score


def test_needle_accuracy():
    answers, needles = ["11, 22 and 44", "NONE\x00", ""], [["11", "22", "33"], ["none"], ["x"]]
    assert needle_accuracy(answers, needles) == pytest.approx(1 / 3)  # begins with 11; None is not NONE; no
    assert needle_accuracy(answers, needles, rule="all") == pytest.approx((2 / 3 + 1 + 0) / 3)
    assert needle_accuracy(answers, needles, rule="part") == pytest.approx((1 + 1 + 0) / 3)
    with pytest.raises(ValueError, match="`rule` must be one of exact, all, part, got 'any'"):
        needle_accuracy(answers, needles, rule="any")


LONG, SHORT = [[0.1, 0.5, 1.0], [1.9, 2.1]], [[0.2, 3.0, 1.5], [NAN, 9.0]]


def test_longppl():
    # Only 3.0 - 0.5 is above 2 where the long context's is below 2: one key token, of exp(0.7).
    found = longppl_of_texts([[0.4, 0.7, 2.0], [1.0, 1.0]], LONG, SHORT)
    assert found == {"longppl": pytest.approx(math.exp(0.7)), "num_key_tokens": 1}
    # At alpha 0.4 also 1.5 - 1.0, and at beta -3 also 9.0 - 2.1: the mean of 0.7, 2.0 and 0.3 is 1.
    found = longppl_of_texts([[0.4, 0.7, 2.0], [1.0, 0.3]], LONG, SHORT, alpha=0.4, beta=-3.0)
    assert found == {"longppl": pytest.approx(math.e), "num_key_tokens": 3}
    assert longppl_of_texts([[1.0]], [[1.0]], [[NAN]]) == {"longppl": None, "num_key_tokens": 0}


def test_every_metric_has_its_folder():
    folders = {path.parent.name for path in metric_path("longppl").parent.glob("*/__init__.py")}
    assert folders == set(METRICS)
    assert all((metric_path(name) / f"{name}.py").is_file() for name in METRICS)


# Twice in each of two threads, in each of two processes that share an empty cache.
LOADING = """
import json, os, sys
from concurrent.futures import ThreadPoolExecutor
import evaluate
from minicpm4_hf.eval.metrics import METRICS, load_metric, metric_path

def load(name):
    return [load_metric(name), evaluate.load(str(metric_path(name)))][1]

cases = json.load(sys.stdin)
child = os.fork()
with ThreadPoolExecutor(2) as pool:
    loaded = list(pool.map(load, METRICS * 2))
metrics = dict(zip(METRICS, loaded[len(METRICS):]))
figures = json.dumps({name: metrics[name].compute(**case) for name, case in cases.items()}) + "\\n"
if child:
    assert os.waitpid(child, 0)[1] == 0
os.write(1, figures.encode())
"""


def test_modules_load_offline_and_beside_each_other(tmp_path):
    cases = {
        "answer_exact_match": {"predictions": ["#### 1,000", ""], "references": ["1000", "2"], "form": "number"},
        "needle_accuracy": {"predictions": ["\ud800 a b", "c"], "references": [["a", "x"], ["c"]], "rule": "all"},
        "longppl": {
            "predictions": [[0.4, 0.7, 2.0], [1.0, 1.0]],
            "references": [{"long_nats": a, "short_nats": b} for a, b in zip(LONG, SHORT)],
        },
    }
    expected = {
        "answer_exact_match": {"answer_exact_match": 0.5},
        "needle_accuracy": {"needle_accuracy": 0.75},  # (1/2 + 1) / 2
        "longppl": {"longppl": pytest.approx(math.exp(0.7)), "num_key_tokens": 1},
    }
    if importlib.util.find_spec("math_verify"):
        cases["math_verify"] = {"predictions": ["\\boxed{0.5}", "1"], "references": ["\\frac{1}{2}", "2"]}
        expected["math_verify"] = {"math_verify": 0.5}
    if not PROBLEM:
        empty = {"prompt": "", "entry_point": ""}
        cases["pass_at_k"] = {"predictions": SAMPLES[:1], "references": [{**empty, **TASKS[0]}], "k": [1, 2]}
        expected["pass_at_k"] = {"pass@1": 0.25, "pass@2": 0.5}  # 1 of 4, as above
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}
    environment.update(HF_MODULES_CACHE=str(tmp_path / "modules"), HF_EVALUATE_CACHE=str(tmp_path / "evaluate"))
    command = [sys.executable, "-c", LOADING]
    run = subprocess.run(
        command, input=json.dumps(cases), env=environment, cwd=tmp_path, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    assert [json.loads(line) for line in run.stdout.splitlines()[-2:]] == [expected, expected]


def test_loading_without_evaluate(monkeypatch):
    monkeypatch.setitem(sys.modules, "evaluate", None)
    with pytest.raises(ImportError, match=r"needs evaluate: pip install \"minicpm4-hf\[eval\]\"\."):
        load_metric("longppl")
