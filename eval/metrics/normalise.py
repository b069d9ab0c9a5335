"""What an answer says in the end, in one spelling: a number, an option, a phrase.

The rules follow OpenCompass at 3ce9b0a, by which the paper's tables were made, in words of our own: GSM8K's last
number (`datasets/gsm8k.py`), `utils/text_postprocessors.py::first_option_postprocess`, `datasets/bbh.py`. Two things
differ: commas and `$` in numbers are read over ("1,234" is not 234), and a number that is announced ("The answer is",
"####") goes before a later one.
"""

import re
from collections.abc import Sequence
from decimal import Decimal

TOLERANCE = Decimal("1e-6")  # OpenCompass' for GSM8K

_NUMBER = re.compile(r"-?\d+(?:\.\d+)?")
_ANNOUNCED = re.compile(r"####|\banswer is\b:?", re.IGNORECASE)
_SENTENCE_END = re.compile(r"\n|\.(?:\s|$)")
_SEPARATOR = re.compile(r"(?<=\d),(?=\d{3}(?!\d))|\\?\$")

_OPEN, _CLOSE = r"\(?(?:\*\*)?", r"(?:\*\*)?\)?"
# In the order in which they are tried; OPTION stands for the options' letters.
_OPTION_PATTERNS = (
    # "the answer is" and "choose" in Chinese, which C-Eval and CMMLU are answered in
    r"(?:答案|选项)(?:选项)?(?:应该?)?[是为选]?\s*[:\uff1a]?\s*" + _OPEN + "([OPTION])",
    r"(?:故选|应选|选择?)\s*[:\uff1a]?\s*" + _OPEN + "([OPTION])",
    r"([OPTION])\s*(?:选项)?\s*是?正确",
    r"(?:因此|所以|显然)\s*([OPTION])\s*[.\u3002]?\s*$",
    r"(?i:answer\s*:)\s*" + _OPEN + "([OPTION])",
    r"(?i:the (?:correct )?(?:answer|option)(?: option)?(?: to the question)? is)(?: option)?:?\s*"
    + _OPEN
    + "([OPTION])(?![A-Za-z])",
    r"boxed\{" + r"(?:\\text\{)?" + _OPEN + "([OPTION])" + _CLOSE + r"\}",
    r"(?:^|\s)" + _OPEN + "([OPTION])" + _CLOSE + r"(?=[\s\u3002\uff0c,\uff1a:.)]|$)",
    r"([OPTION])\s*[:\uff1a]",
    r"([OPTION])",
)


def number_of(answer: str) -> str:
    """The number that an answer ends in, without separators; empty where there is none.

    It is the last one of the sentence after "####" or "The answer is" where one of them is there, else the last one.
    What follows the next "Question:" is not of this answer.
    """
    text = answer.split("Question:")[0]
    ends = [match.end() for match in _ANNOUNCED.finditer(text)]
    said = _SENTENCE_END.split(text[ends[-1] :].lstrip(), maxsplit=1)[0] if ends else ""
    for part in (said, text):
        numbers = _NUMBER.findall(_SEPARATOR.sub("", part))
        if numbers:
            return numbers[-1]
    return ""


def first_option(answer: str, options: str = "ABCD") -> str:
    """The letter that an answer chooses, by the first of the phrasings that it has; empty where it chooses none."""
    text = answer.strip()
    letters = re.escape(options)
    for pattern in _OPTION_PATTERNS:
        match = re.search(pattern.replace("OPTION", letters), text)
        if match:
            return match[1]
    return ""


def bbh_answer(answer: str) -> str:
    """BIG-Bench Hard: the line after the first "answer is ", without bold, period, or the parentheses of an option."""
    text = answer.split("answer is ")
    text = (text[1] if len(text) > 1 else text[0]).strip().split("\n")[0].strip()
    text = text.removesuffix(".").strip()
    bold = re.search(r"\*\*(.*?)\*\*", text)
    text = bold[1].removesuffix(".").strip() if bold else text
    option = re.match(r"\(([A-Z])\)", text)
    return option[1] if option else text


def plain_text(answer: str) -> str:
    """The text with single spaces and nothing around it."""
    return " ".join(answer.split())


FORMS = {"number": number_of, "option": first_option, "bbh": bbh_answer, "text": plain_text}


def is_match(prediction: str, reference: str, form: str, *, options: str = "ABCD") -> bool:
    """Whether an answer says what the reference says; never where it says nothing.

    Args:
        prediction: what the model wrote.
        reference: the right answer, bare or as the data set has it ("... #### 18", "(A)").
        form: a name in FORMS.
        options: the letters to choose from, for the form "option".

    Raises:
        ValueError: an unknown form.
    """
    if form not in FORMS:
        raise ValueError(f"`form` must be one of {', '.join(FORMS)}, got {form!r}.")
    if form == "option":
        said, right = first_option(prediction, options), first_option(reference, options)
    else:
        said, right = FORMS[form](prediction), FORMS[form](reference)
    if not said or form != "number":
        return bool(said) and said == right
    return bool(right) and abs(Decimal(said) - Decimal(right)) < TOLERANCE


def answer_exact_match(
    predictions: Sequence[str], references: Sequence[str], *, form: str = "text", options: str = "ABCD"
) -> float:
    """The share of answers that match, 0 to 1; see `is_match`.

    Raises:
        ValueError: an unknown form, or lists that are empty or of different lengths.
    """
    check_pairs(predictions, references)
    pairs = zip(predictions, references)
    return sum(is_match(answer, right, form, options=options) for answer, right in pairs) / len(predictions)


def check_pairs(predictions: Sequence, references: Sequence) -> None:
    """Raises `ValueError` unless there are as many of both, and some."""
    if not predictions or len(predictions) != len(references):
        raise ValueError(
            "`predictions` and `references` must have one length of at least 1, got "
            f"{len(predictions)} and {len(references)}."
        )
