"""Generated sequences: exact lengths, the ids of the joined text, labels, answers, and splits that share nothing."""

import json
import re

import numpy as np
import pytest
from tokenizers import Tokenizer, models, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from minicpm4_hf.shipped import shipped_checkpoint, shipped_excerpt
from minicpm4_hf.training import synthetic
from minicpm4_hf.training.synthetic import (
    GENERATORS,
    SPLITS,
    TOOLS,
    Prose,
    addition_problems,
    addition_steps,
    keys_of,
    make_example,
    needle_grid,
    split_of,
    tool_schema,
)

FACT = re.compile(r"The secret number of the (\w+ \w+) is (\d{4})\.")
QUESTION = re.compile(
    r"\n\nWhat is the secret number of the (\w+ \w+)\? The secret number of the (\w+ \w+) is (\d+)\."
)
LINE = re.compile(r"^- (\w+ \w+): (\d+)$", re.MULTILINE)
SUM = re.compile(r"^(?:<s>)?(\d+)\+(\d+)=\?$", re.MULTILINE)
CALL = re.compile(r"```python\n(\w+)\((.*)\)\n```")


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(shipped_checkpoint())


@pytest.fixture(scope="module")
def prose(tokenizer):
    return Prose([shipped_excerpt().read_text(encoding="utf-8")], tokenizer)


@pytest.fixture
def make(tokenizer, prose):
    """`make(task, length, index, ...)`: `make_example` with prose where the task takes it."""

    def make(task, length, index=0, **options):
        if task in ("needle", "copy"):
            options["prose"] = prose
        return make_example(task, tokenizer, length, index=index, **options)

    return make


def labelled_text(tokenizer, example):
    return tokenizer.decode(example.labels[example.labels != -100])


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("length", [600, 601, 602, 1023, 4096])
@pytest.mark.parametrize("task", GENERATORS)
def test_every_example(make, tokenizer, task, length, split):
    for index in range(6):
        example = make(task, length, index, split=split)
        ids, labels = example.input_ids, example.labels
        assert ids.shape == labels.shape == (length,) and ids.dtype == labels.dtype == np.int64
        assert ids[0] == tokenizer.bos_token_id and labels[0] == -100
        assert (ids[example.end :] == tokenizer.pad_token_id).all()
        assert np.array_equal(labels[labels != -100], ids[labels != -100])
        assert (labels[example.end :] == -100).all() and labels[example.end - 1] != -100
        if task in ("needle", "lookup", "copy"):
            assert example.end == length
        else:
            assert length - example.end < 600  # one more would have fitted otherwise
        # the parts were joined where the tokenizer does not look across
        text = tokenizer.decode(ids[: example.end])
        assert tokenizer(text, add_special_tokens=False).input_ids == ids[: example.end].tolist()

        completion = tokenizer.decode(example.completion_ids)
        assert example.is_solved_by(completion)
        assert np.array_equal(np.concatenate([example.prompt_ids, example.completion_ids]), ids[: example.end])
        answer = labels[example.prompt_length :][: 1 + len(example.answer)]
        assert (answer[:4] != -100).all() and labels[example.prompt_length - 1] == -100
        changed = "x" + example.answer[1:]
        assert not example.is_solved_by(completion.replace(example.answer, changed))


@pytest.mark.parametrize("task", GENERATORS)
def test_an_example_depends_on_its_arguments_alone(make, task):
    first = make(task, 700, 3)
    make(task, 700, 4)
    again = make(task, 700, 3)
    assert np.array_equal(first.input_ids, again.input_ids) and np.array_equal(first.labels, again.labels)
    others = [make(task, 700, 4), make(task, 700, 3, seed=1), make(task, 700, 3, split="test")]
    assert not any(np.array_equal(first.input_ids, other.input_ids) for other in others)


def drawn(text):
    """Keys and pairs of numbers in an example's text."""
    keys = {key for pattern in (FACT, LINE) for key, _ in pattern.findall(text)}
    pairs = {tuple(sorted(map(int, pair))) for pair in SUM.findall(text)}
    for _, arguments in CALL.findall(text):
        keys.update(re.findall(r'(?:thing|person)="(\w+ \w+)"', arguments))
        pairs.update(tuple(sorted(map(int, pair))) for pair in re.findall(r"a=(\d+), b=(\d+)", arguments))
    return keys, pairs


def test_splits_share_no_key_and_no_pair(make, tokenizer):
    assert not set(keys_of("train")) & set(keys_of("test"))
    assert all(1000 < len(keys_of(split)) for split in SPLITS)
    for position in (0, 1):  # what differs is the combination: every word is in both
        words = [{key.split()[position] for key in keys_of(split)} for split in SPLITS]
        assert words[0] == words[1]
    seen = {}
    for split in SPLITS:
        keys, pairs = set(), set()
        for task, options in (
            ("needle", {"num_facts": 5}),
            ("lookup", {}),
            ("tools", {}),
            ("addition", {"digits": (1, 2)}),
        ):
            for index in range(40):
                found = drawn(tokenizer.decode(make(task, 900, index, split=split, **options).input_ids))
                keys |= found[0]
                pairs |= found[1]
        assert keys <= set(keys_of(split))
        assert pairs and {split_of(*pair) for pair in pairs} == {split}
        seen[split] = keys, pairs
    assert not seen["train"][0] & seen["test"][0] and not seen["train"][1] & seen["test"][1]
    assert all(len(keys) > 1000 and len(pairs) > 200 for keys, pairs in seen.values())


def test_passages_to_copy_come_from_a_half_each(make, tokenizer, prose):
    book = prose.books[0][0]
    joined = " ".join(map(str, book))
    for split, halves in (("train", (0.0, 0.5)), ("test", (0.5, 1.0))):
        for index in range(20):
            example = make("copy", 700, index, split=split, passage_length=50)
            passage = example.completion_ids[:50]
            first = joined.index(" " + " ".join(map(str, passage)) + " ")
            start = joined[: first + 1].count(" ")
            assert halves[0] * len(book) <= start and start + 50 <= halves[1] * len(book)


def test_needle_labels_and_places(make, tokenizer):
    for index in range(10):
        example = make("needle", 900, index, num_facts=4)
        text = tokenizer.decode(example.input_ids)
        body, *_ = text.partition("\n\nWhat is the secret")
        facts, questions = dict(FACT.findall(body)), QUESTION.findall(text)
        assert len(facts) == 4 and sorted(asked for asked, _, _ in questions) == sorted(facts)
        assert all(asked == named and facts[asked] == number for asked, named, number in questions)
        assert labelled_text(tokenizer, example) == "".join(f" {number}." for _, _, number in questions)
        assert example.answer == questions[-1][2]

        whole = make("needle", 900, index, num_facts=4, label_prose=True)
        assert np.array_equal(whole.input_ids, example.input_ids)
        unlabelled = tokenizer.decode(np.where(whole.labels == -100, whole.input_ids, 1)).replace("<s>", "")
        assert sorted(FACT.findall(unlabelled)) == sorted(facts.items())
        assert len(unlabelled) < len(text) / 1.5


@pytest.mark.parametrize("length", [300, 8192, 32768])
def test_needle_depth(make, tokenizer, length):
    for depth in (0, 0.11, 0.5, 0.89, 1):
        example = make("needle", length, 5, depth=depth)
        text = tokenizer.decode(example.input_ids[1:])
        body = text.partition("\n\nWhat is the secret")[0]
        fact = FACT.search(body)
        assert example.answer == fact[2]
        before, after = body[: fact.start()], body[fact.end() :]
        assert before == " " or before.rstrip("\"') ").endswith((".", "!", "?"))  # between sentences
        assert not after or after[0] == " "
        tokens = [len(tokenizer(part, add_special_tokens=False).input_ids) for part in (before, after)]
        assert abs(tokens[0] - depth * sum(tokens)) < 120  # half of the longest sentence there
        if depth == 0:
            assert before == " "


def test_needle_with_the_least_prose(make, tokenizer):
    with pytest.raises(ValueError, match=r"`length` must be at least (\d+) tokens") as error:
        make("needle", 10, 1)
    least = int(re.search(r"least (\d+)", str(error.value))[1])
    assert FACT.match(tokenizer.decode(make("needle", least, 1).input_ids[1:]).strip())
    for length in range(least + 1, least + 40):  # lengths at which no sentence ends, too
        assert len(make("needle", length, 1).input_ids) == length


def test_lookup(make, tokenizer):
    for length in range(100, 140):
        example = make("lookup", length, length, num_queries=3)
        listed, asked = (LINE.findall(part) for part in tokenizer.decode(example.input_ids).split("Look up:\n"))
        numbers = dict(listed)
        assert len(numbers) == len(listed) == len(set(numbers.values())) and len(asked) == 3
        assert all(numbers[key] == number and len(number) == 4 for key, number in asked)
        assert labelled_text(tokenizer, example) == "".join(f" {number}\n" for _, number in asked)
        assert example.answer == asked[-1][1]
    places = set()
    for index in range(30):
        listed, asked = (
            LINE.findall(part) for part in tokenizer.decode(make("lookup", 200, index).input_ids).split("Look up:\n")
        )
        places.add(listed.index(asked[0]))
    assert len(places) > 8  # asked for anywhere in the list


def test_copy(make, tokenizer):
    lengths = set()
    for index in range(20):
        example = make("copy", 300 + index, index)
        text = tokenizer.decode(example.input_ids[1:])
        first, again = re.fullmatch(r"Remember this:(.*)\n\nRepeat it:(.*)\n", text, re.DOTALL).groups()
        assert first.startswith(again + "\n\n") and labelled_text(tokenizer, example) == again + "\n"
        assert example.answer == again.strip()
        lengths.add(len(example.completion_ids) - 1)
        prose_too = make("copy", 300 + index, index, label_prose=True)
        assert labelled_text(tokenizer, prose_too) == first.replace(again + "\n\n", again, 1) + again + "\n"
    assert min(lengths) >= 8 and max(lengths) - min(lengths) > 50


def worked_by_hand(steps):
    """Follow the lines of `addition_steps`: operands and result as the columns say."""
    *columns, last = steps.splitlines()
    a = b = carry = 0
    result = ""
    for place, line in enumerate(columns):
        x, y, carried, total, so_far = map(int, re.fullmatch(r"(\d)\+(\d)\+(\d)=(\d\d);(\d+)", line).groups())
        assert carried == carry and total == x + y + carried
        a, b, carry, result = a + x * 10**place, b + y * 10**place, total // 10, f"{total % 10}{result}"
        assert line.endswith(f";{result}") and int(result) == so_far
    assert carry == 0
    return last, f"{a}+{b}={result}"


@pytest.mark.parametrize(
    ("a", "b"), [(0, 0), (5, 0), (5, 5), (9, 1), (47, 85), (99, 1), (1, 999), (120, 80), (5000, 5000), (10**18 - 1, 1)]
)
def test_addition_steps(a, b):
    assert addition_steps(47, 85) == "7+5+0=12;2\n4+8+1=13;32\n0+0+1=01;132\n47+85=132\n"
    last, columns = worked_by_hand(addition_steps(a, b))
    assert last == columns == f"{a}+{b}={a + b}"


def test_addition(make, tokenizer):
    sizes = set()
    for index in range(30):
        example = make("addition", None, index, digits=(1, 4))
        question, _, steps = tokenizer.decode(example.input_ids).partition("\n")
        a, b = map(int, re.fullmatch(r"<s>(\d+)\+(\d+)=\?", question).groups())
        sizes.update((len(str(a)), len(str(b))))
        assert steps == addition_steps(a, b) == labelled_text(tokenizer, example)
        assert example.answer == str(a + b) and example.marker == f"\n{a}+{b}="
    assert sizes == {1, 2, 3, 4}
    packed = make("addition", 500, 0)
    text = tokenizer.decode(packed.input_ids[: packed.end])
    problems = text.split("<s>")[1:]
    assert len(problems) > 5 and tokenizer.decode(packed.prompt_ids).endswith(problems[-1].split("\n")[0] + "\n")
    assert labelled_text(tokenizer, packed) == "".join(problem.partition("\n")[2] for problem in problems)


def test_addition_problems_are_different_and_of_the_split(tokenizer):
    problems = list(addition_problems(tokenizer, 300, digits=(2, 2)))
    questions = [tokenizer.decode(example.prompt_ids) for example in problems]
    assert len(set(questions)) == 300
    for example, question in zip(problems, questions):
        a, b = map(int, SUM.fullmatch(question.strip()).groups())
        assert split_of(*sorted((a, b))) == "test" and 10 <= min(a, b) and max(a, b) <= 99
        assert example.is_solved_by(addition_steps(a, b)) and example.answer == str(a + b)
        assert not example.is_solved_by(addition_steps(a, b).replace(f"={a + b}\n", f"={a + b + 1}\n"))
        assert not example.is_solved_by(addition_steps(a, b)[:-1] + "0")
        assert not example.is_solved_by(str(a + b))  # the steps are part of it
    (zero,) = [
        p for p in addition_problems(tokenizer, 40, digits=(1, 1), split=split_of(0, 0)) if p.marker == "\n0+0="
    ]
    assert zero.is_solved_by(addition_steps(0, 0))
    with pytest.raises(ValueError, match="`num_problems` must be fewer"):
        list(addition_problems(tokenizer, 100, digits=(1, 1)))


def test_needle_grid(tokenizer, prose):
    cells = list(needle_grid(tokenizer, prose, 400))
    assert [round(100 * depth) for depth, _ in cells[::20]] == [0, 11, 22, 33, 44, 56, 67, 78, 89, 100]
    assert len(cells) == 200 and len({example.input_ids.tobytes() for _, example in cells}) == 200
    assert all(len(example.input_ids) == 400 for _, example in cells)
    keys = [FACT.search(tokenizer.decode(example.input_ids))[1] for _, example in cells]
    assert set(keys) <= set(keys_of("test"))
    ((depth, example),) = needle_grid(tokenizer, prose, 400, num_depths=1, num_samples=1, split="train", seed=3)
    assert depth == 0 and FACT.search(tokenizer.decode(example.input_ids))[1] in keys_of("train")


def test_tools(make, tokenizer):
    used = set()
    for index in range(60):
        example = make("tools", None, index)
        turns = re.findall(r"<\|im_start\|>(\w+)\n(.*?)<\|im_end\|>", tokenizer.decode(example.input_ids), re.DOTALL)
        assert [role for role, _ in turns] == ["system", "user", "assistant", "tool", "assistant"]
        (_, system), (_, request), (_, call), (_, result), (_, reply) = turns
        schemas = {
            schema["function"]["name"]: schema["function"] for schema in map(json.loads, system.splitlines()[1:])
        }
        assert len(schemas) == 3
        name, arguments = CALL.search(call).groups()
        assert example.answer == f"{name}({arguments})"
        used.add(name)
        given = dict(re.findall(r'(\w+)="?([\w ]+)"?', arguments))
        parameters = schemas[name]["parameters"]
        assert set(given) == set(parameters["properties"]) == set(parameters["required"])
        assert all(value in request for value in given.values())
        found = json.loads(result)["result"]
        assert found == "done" or str(found) in reply
        if name == "add":
            assert found == int(given["a"]) + int(given["b"])
        assert call.startswith(f"<|thought_start|>\nI call {name}.\n<|thought_end|>\n<|tool_call_start|>\n```python\n")
        assert call.endswith("\n```\n<|tool_call_end|>\n")
        assert labelled_text(tokenizer, example) == f"{call}<|im_end|>{reply}<|im_end|>"
        assert tokenizer.decode(example.prompt_ids).endswith(request + "<|im_end|>\n<|im_start|>assistant\n")
    assert used == set(TOOLS)


def test_tools_with_a_template_that_takes_them(tokenizer):
    other = AutoTokenizer.from_pretrained(shipped_checkpoint())
    other.chat_template = (
        "{% if tools %}<|im_start|>system\nTools: {% for tool in tools %}{{ tool | tojson }}{% endfor %}<|im_end|>"
        "{{ '\\n' }}{% endif %}" + tokenizer.chat_template
    )
    text = other.decode(make_example("tools", other, None, index=0, num_tools=2).input_ids)
    assert text.startswith("<s><|im_start|>system\nTools: {") and text.count('"parameters"') == 2
    assert "You can call" not in text
    assert tool_schema("add")["function"]["parameters"]["required"] == ["a", "b"]


def test_exact_match(make):
    example = make("needle", 300)
    answer = example.answer
    for right in (f" {answer}.", answer, f"\n{answer}. And", f" {answer}<|im_end|>", f"{answer}, {answer}"):
        assert example.is_solved_by(right)
    for wrong in ("", " ", f"{answer}0", f"0{answer}", f"It is {answer}", answer[:3], f"{answer}th", answer[::-1]):
        assert wrong == answer or not example.is_solved_by(wrong)


def test_books_as_token_arrays(tokenizer, prose):
    text = shipped_excerpt().read_text(encoding="utf-8")
    ids = np.array(tokenizer(text, add_special_tokens=False).input_ids, dtype=np.uint16)
    for mine, theirs in zip(Prose([ids], tokenizer).books[0], prose.books[0]):
        assert np.array_equal(mine, theirs)
    halves = Prose([ids[:20000], np.zeros(0, dtype=np.uint16), ids[20000:]], tokenizer)
    assert len(halves.books) == 2
    rng = np.random.default_rng(0)
    passages = [halves.passage(rng, 100)[0] for _ in range(50)]
    whole = " ".join(map(str, ids))
    places = [whole.index(" ".join(map(str, passage))) for passage in passages]
    assert min(places) < len(whole) / 2 < max(places)


def test_sentence_borders(tokenizer):
    text = "One came. Two said to Mr. Dark “Yes! No?” “Well.” At 3 p. M. Ann left...  So it is.\n\nNew line. Last"
    ids, starts, is_sentence, is_word = Prose([text], tokenizer).books[0]
    begun = [tokenizer.decode(ids[start : start + 2]).split()[0] for start in starts]
    assert begun == ["Two", "No?”", "“Well", "At", "So", "Last"]
    assert not (is_word[0] or is_word[len(ids)] or is_sentence[0] or is_sentence[len(ids)])
    cut = [tokenizer.decode(ids[:place]) for place in np.flatnonzero(is_word)]
    assert "One" in cut and "One came." in cut and "One came. Two said to Mr" not in cut
    assert all(tokenizer(part, add_special_tokens=False).input_ids == ids[: len(ids[:place])].tolist()
               for part, place in zip(cut, np.flatnonzero(is_word)))  # fmt: skip


def test_words_and_digits_are_one_token(tokenizer):
    for word in (*synthetic.ADJECTIVES, *synthetic.NOUNS, *"0123456789"):
        text = word if word.isdigit() else " " + word
        assert len(tokenizer(text, add_special_tokens=False).input_ids) == 1, word
    assert len({*synthetic.ADJECTIVES, *synthetic.NOUNS}) == len(synthetic.ADJECTIVES) + len(synthetic.NOUNS)


ERRORS = [
    ("riddle", 100, {}, r"`task` must be one of needle, lookup, copy, addition, tools, got 'riddle'"),
    ("lookup", 100, {"split": "dev"}, r"`split` must be one of train, test, got 'dev'"),
    ("lookup", 20, {}, r"`length` must be at least \d+ tokens for this, got 20"),
    ("lookup", 100, {"num_queries": 0}, r"`num_queries` must be at least 1, got 0"),
    ("lookup", 60000, {}, r"can have 1 to \d+ keys, got \d+"),
    ("needle", 100, {"num_facts": 0}, r"can have 1 to \d+ keys, got 0"),
    ("needle", 100, {"depth": 1.5}, r"`depth` must be from 0 to 1, got 1.5"),
    ("needle", 60000, {}, r"must have a passage of \d+ tokens; the longest part of one has \d+"),
    (
        "copy",
        60000,
        {"passage_length": 25000},
        r"must have a passage of 25000 tokens; the longest part of one has 19973",
    ),
    ("copy", 20, {}, r"`length` must be at least \d+ tokens"),
    ("copy", 100, {"passage_length": 0}, r"`passage_length` must be at least 1, got 0"),
    ("addition", 10, {}, r"`length` must be at least \d+ tokens"),
    ("addition", 100, {"digits": (0, 3)}, r"`digits` must be .* 1 to 18, got \(0, 3\)"),
    ("addition", 100, {"digits": (3, 2)}, r"`digits` must be"),
    ("tools", 100, {}, r"`length` must be at least \d+ tokens"),
    ("tools", None, {"num_tools": 7}, r"`num_tools` must be from 1 to 6, got 7"),
]


@pytest.mark.parametrize(("task", "length", "options", "message"), ERRORS)
def test_what_is_refused(make, task, length, options, message):
    with pytest.raises(ValueError, match=message):
        make(task, length, **options)


def test_prose_that_is_refused(tokenizer):
    with pytest.raises(ValueError, match="`books` must hold running text"):
        Prose(["no sentence here", ""], tokenizer)
    backend = Tokenizer(models.BPE())
    backend.train_from_iterator(["4817 " * 100], trainers.BpeTrainer(vocab_size=200, show_progress=False))
    joined = PreTrainedTokenizerFast(tokenizer_object=backend)
    with pytest.raises(ValueError, match="`tokenizer` must give each digit a token"):
        Prose(["One. Two."], joined)
