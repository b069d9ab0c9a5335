"""Documents with questions: SQuAD and HotpotQA from local files, or generated ones where there are none.

RULER's qa_1 asks the questions of SQuAD's dev-v2.0.json, its qa_2 those of HotpotQA's hotpot_dev_distractor_v1.json.
Without those files the questions are about people who do not exist: each document is a passage of the haystack's text
with a few facts about one person in it, and the other people's documents distract. `qa_1` asks for a fact of one
document, `qa_2` for one of somebody whom another document names, as HotpotQA does. Scores on generated questions tell
models and lengths apart, but are not RULER's.
"""

import hashlib
import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

GENERATED = "generated"
PASSAGE_WORDS = 80  # of the text in a generated document
FIRST = """Ada Albert Alma Anton Bela Bruno Carla Cyril Dora Edgar Elsa Emil Erna Felix Flora Franz Gerda Gilbert Greta
Hugo Ida Igor Irma Jonas Judith Karl Klara Leon Linda Ludwig Magda Martin Mina Nora Olga Oscar Paula Rudolf Selma
Viktor""".split()
LAST = """Abbot Amsel Barlow Bergen Brandt Carver Castell Dalton Drummond Eberhard Falk Ferrer Garland Gould Hallam
Hendry Ingram Jarvis Keller Kerr Lambert Lindqvist Marlow Merton Norden Novak Orlov Palmer Quill Ramsey Renner Sander
Soler Talbot Thorne Usher Vance Walden Winter Zeller""".split()
TOWNS = """Aldermoor Ashgrove Birkdale Brackenfold Calderwick Coldwater Dunmere Eastholm Elmsworth Fairlea Fernhill
Glenrock Greyford Hartsea Hollowell Inverlee Kestrel Kingsmoor Larkfield Lowmarsh Millbrook Netherby Northwold Oakham
Penrith Quarrybank Redcliffe Rookwood Saltmarsh Stonebridge Thornbury Underhill Wexcombe Whitmoor Yarrow""".split()
TRADES = """baker bookbinder brewer carpenter clockmaker cooper dyer farmer fisherman gardener glazier goldsmith joiner
locksmith mason miller painter potter printer saddler sailor shoemaker tailor tanner weaver""".split()


@dataclass(frozen=True)
class Question:
    """A question.

    Args:
        outputs: answers, any of which is right.
        gold: the documents it takes, by their place in the set.
        near: documents of the same article, which distract the most.
    """

    query: str
    outputs: tuple[str, ...]
    gold: tuple[int, ...]
    near: tuple[int, ...] = ()


@dataclass(frozen=True)
class Questions:
    """A set of documents with questions; `name` is the file's, or `generated`."""

    name: str
    documents: list[str]
    questions: list[Question]

    @cached_property
    def digest(self) -> str:
        """SHA-256 of documents and questions, 16 digits."""
        content = [self.documents, [[question.query, question.outputs] for question in self.questions]]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


def generate_questions(task: str, words: list[str], seed: int) -> Questions:
    """As many people as there are names, each with a document and a question.

    Args:
        task: `qa_1` or `qa_2`.
        words: the text that the documents' passages are of.
    """
    rng = random.Random(f"{seed}/{task}/questions")
    names = [f"{first} {last}" for first in FIRST for last in LAST]
    rng.shuffle(names)
    facts = [
        {"town": rng.choice(TOWNS), "trade": rng.choice(TRADES), "year": str(rng.randrange(1780, 1900))} for _ in names
    ]
    documents, questions = [], []
    for place, (name, fact) in enumerate(zip(names, facts)):
        teacher = (place + 1) % len(names)
        begin = rng.randrange(len(words))
        passage = " ".join((words[begin : begin + PASSAGE_WORDS] + words)[:PASSAGE_WORDS])
        told = f"{name} was born in {fact['town']} in {fact['year']} and became a {fact['trade']}."
        if task == "qa_2":
            told += f" {name} learned the trade from {names[teacher]}."
        documents.append(f"{told} {passage}")
        subject, known, gold = f"{name}", fact, (place,)
        if task == "qa_2":
            subject, known, gold = f"the person that {name} learned the trade from", facts[teacher], (place, teacher)
        asked = rng.choice(["town", "trade", "year"])
        query = {
            "town": f"In which town was {subject} born?",
            "trade": f"What did {subject} become?",
            "year": f"In which year was {subject} born?",
        }[asked]
        questions.append(Question(query, (known[asked],), gold))
    order = list(range(len(questions)))
    rng.shuffle(order)
    return Questions(GENERATED, documents, [questions[place] for place in order])


def read_squad(path: Path) -> Questions:
    """SQuAD 2.0's JSON file, without the questions that have no answer.

    Raises:
        ValueError: another kind of file.
        OSError: it cannot be read.
    """
    return _read(path, "SQuAD 2.0 (`dev-v2.0.json`)", _squad)


def read_hotpot(path: Path) -> Questions:
    """HotpotQA's JSON file of the distractor setting.

    Raises:
        ValueError: another kind of file.
        OSError: it cannot be read.
    """
    return _read(path, "HotpotQA (`hotpot_dev_distractor_v1.json`)", _hotpot)


def _squad(content) -> tuple[list[str], list[Question]]:
    articles = [article["paragraphs"] for article in content["data"]]
    documents = sorted({paragraph["context"] for article in articles for paragraph in article})
    places = {document: place for place, document in enumerate(documents)}
    questions = []
    for article in articles:
        own = [places[paragraph["context"]] for paragraph in article]
        for paragraph in article:
            gold = places[paragraph["context"]]
            near = tuple(dict.fromkeys(place for place in own if place != gold))
            questions += [
                Question(asked["question"], tuple(answer["text"] for answer in asked["answers"]), (gold,), near)
                for asked in paragraph["qas"]
                if not asked.get("is_impossible", False)
            ]
    return documents, questions


def _hotpot(content) -> tuple[list[str], list[Question]]:
    texts = [[f"{title}\n{''.join(sentences)}" for title, sentences in entry["context"]] for entry in content]
    documents = sorted({text for entry in texts for text in entry})
    places = {document: place for place, document in enumerate(documents)}
    questions = [
        Question(entry["question"], (entry["answer"],), tuple(dict.fromkeys(places[text] for text in own)))
        for entry, own in zip(content, texts)
    ]
    return documents, questions


def _read(path: Path, kind: str, convert: Callable) -> Questions:
    content = path.read_bytes()
    try:
        documents, questions = convert(json.loads(content.decode("utf-8")))
    except UnicodeDecodeError as error:
        raise ValueError(f"{str(path)!r} is not UTF-8: byte {error.start} cannot be decoded.") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{str(path)!r} is not a file of {kind} ({type(error).__name__}: {error}).") from error
    if not questions or not all(question.outputs for question in questions):
        raise ValueError(f"{str(path)!r} has no questions with answers; it must be a file of {kind}.")
    return Questions(path.name, documents, questions)
