"""Generated sequences that need memory: to train small models on beside books, and to test them with.

    prose = Prose(books, tokenizer)  # texts, or the token arrays of a corpus
    example = make_example("needle", tokenizer, 8192, index=17, prose=prose)
    for depth, example in needle_grid(tokenizer, prose, 8192):
        correct = example.is_solved_by(complete(example.prompt_ids))

| task       | the sequence                                                | labelled, that is, in the loss |
|------------|-------------------------------------------------------------|--------------------------------|
| `needle`   | prose, facts hidden in it, a question for each              | the answers                    |
| `lookup`   | a list of keys with numbers, then some of the keys again    | the numbers asked for          |
| `copy`     | a passage, other prose, the passage again                   | the second passage             |
| `addition` | `47+85=?`, then column by column with carries, then the sum | all after the question         |
| `tools`    | chats with functions: request, call, result, reply          | what the assistant writes      |

A label is -100 where nobody could know the token: facts and numbers are random, and training on them teaches noise.
Prose can be learned, but an answer of five tokens would be lost in a mean over thousands; `label_prose` labels it.

An example depends on task, split, index and seed alone. The splits cannot overlap: they draw from different streams,
and each key ("old garden"), each pair of numbers to add and, for passages to copy, each half of a book has one split.

The forms suit the package's own tokenizer: a digit is one token, and so is each word of a key. Its pieces end before a
space and on both sides of a line end; parts are joined only there, so the ids are those of the joined text.
"""

import functools
import json
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.random import Generator
from transformers import PreTrainedTokenizerFast as Tokenizer

from minicpm4_hf.training.packing import IGNORED

SPLITS = ("train", "test")
# Of the words that are one token of the shipped vocabulary, with the space before.
ADJECTIVES = """
old new red dark white black strong deep cold bright fair grand slow plain wild soft fresh warm sweet heavy broad loud
blue green quiet strange happy small large great young poor rich thin thick weak pale gentle simple proud narrow noble
silent empty bare clean sharp bold false wide tall broken famous ancient handsome short clear fine pretty honest bitter
solemn calm lost""".split()
NOUNS = """
hand place house room door window garden road street wall table chair book letter paper ship boat horse dog bird fire
wind night sun moon cloud stone wood field forest mill bridge town village city country sea sword bell ring glass coat
dress hat shirt box chest candle carriage coach cart army regiment guard soldier officer captain doctor king prince
princess lady gentleman girl boy child man woman mother father brother sister son aunt uncle cousin daughter wife
husband friend enemy servant master post prison church shop court hall floor corner gate station camp barricade bank
pocket face head neck shoulder breast nose mouth heart mind soul body voice story dream picture journey battle murder
marriage gold dinner breakfast note line list piece sail sofa bed gun cross""".split()

_ABBREVIATIONS = {"Mr", "Mrs", "Ms", "Dr", "St", "Mme", "Mlle", "Prof", "Capt", "Rev", "Hon", "No", "etc"}
_CLOSING, _OPENING = "\"'\u201d\u2019)]_*", "\"'\u201c\u2018(["

Part = tuple[np.ndarray, bool]  # ids, and whether they are labelled


@dataclass(frozen=True)
class Example:
    """One sequence, with the last question in it set apart.

    Labels stand at the token's own place: transformers' models shift by themselves, another loop compares
    `labels[1:]` with the logits of `[:-1]`.
    """

    input_ids: np.ndarray  # [T] int64
    labels: np.ndarray  # [T] int64, the token or -100
    prompt_length: int  # tokens before the last answer
    end: int  # where the text ends and padding begins
    answer: str  # what is to be written
    marker: str  # the answer comes right after the first of these in the completion; empty where it comes at once

    @property
    def prompt_ids(self) -> np.ndarray:
        """What to complete."""
        return self.input_ids[: self.prompt_length]

    @property
    def completion_ids(self) -> np.ndarray:
        """A right completion; its length is how much to generate."""
        return self.input_ids[self.prompt_length : self.end]

    def is_solved_by(self, completion: str) -> bool:
        """Whether a completion gives exactly the answer: "48170" is not "4817", but "4817. And" is."""
        place = completion.find(self.marker)
        rest = completion[place + len(self.marker) :].lstrip()
        return place >= 0 and rest.startswith(self.answer) and not rest[len(self.answer) :][:1].isalnum()


def _encode(tokenizer: Tokenizer, text: str) -> np.ndarray:
    return np.array(tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids, dtype=np.int64)


@functools.lru_cache(maxsize=8)
def _check_tokenizer(tokenizer: Tokenizer):
    """Refuse a tokenizer with other borders: lengths and labels would be wrong."""
    parts = "Call me so.| The old garden| is| 4817|.| And|\n\nWhat of|:| 4817|\n|4+8=?\n".split("|")
    joined = np.concatenate([_encode(tokenizer, part) for part in parts])
    if len(_encode(tokenizer, "4817")) != 4 or not np.array_equal(joined, _encode(tokenizer, "".join(parts))):
        raise ValueError(
            "`tokenizer` must give each digit a token and keep words and line ends apart, as those of "
            "minicpm4_hf.training.tokenizer do."
        )


def split_of(*parts) -> str:
    """The split that a key or a pair of numbers belongs to for good; about half belong to each."""
    return SPLITS[zlib.crc32(" ".join(map(str, parts)).encode()) & 1]


@functools.cache
def keys_of(split: str) -> tuple[str, ...]:
    """The keys of a split, about 4,000 times "adjective noun"; every word is in keys of both splits."""
    return tuple(f"{a} {n}" for a in ADJECTIVES for n in NOUNS if split_of(a, n) == split)


def _draw_keys(rng: Generator, split: str, count: int) -> list[str]:
    keys = keys_of(split)
    if not 1 <= count <= len(keys):
        raise ValueError(f"An example can have 1 to {len(keys)} keys, got {count}; choose another number or `length`.")
    return [keys[i] for i in rng.choice(len(keys), count, replace=False)]


def _draw_numbers(rng: Generator, count: int) -> list[int]:
    """Different numbers of four digits."""
    return [int(number) for number in 1000 + rng.choice(9000, count, replace=False)]


def _draw_pair(rng: Generator, split: str, digits: tuple[int, int]) -> tuple[int, int]:
    """Two numbers of `digits` (fewest, most) digits each; (a, b) and (b, a) are of the same split."""
    if not 1 <= digits[0] <= digits[1] <= 18:
        raise ValueError(f"`digits` must be the fewest and the most digits of a number, 1 to 18, got {digits}.")
    while True:
        sizes = rng.integers(digits[0], digits[1] + 1, 2).tolist()
        a, b = (int(rng.integers(10 ** (size - 1) if size > 1 else 0, 10**size)) for size in sizes)
        if split_of(*sorted((a, b))) == split:
            return a, b


class Prose:
    """Books as token arrays, with the places where they can be cut and joined.

    A sentence begins at a token with a space and a capital or a quote, after one that ends a sentence; not after "Mr."
    and single letters. The first sentence of a paragraph is not used.

    Args:
        books: texts, tokenised here once, or token ids without special tokens.
        tokenizer: one of the package's kind.

    Raises:
        ValueError: a tokenizer of another kind, or no sentence in any book.
    """

    def __init__(self, books: Sequence[str | np.ndarray], tokenizer: Tokenizer):
        _check_tokenizer(tokenizer)
        pieces = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
        words = [piece.lstrip("▁") for piece in pieces]
        ends = np.array([piece.rstrip(_CLOSING).endswith((".", "!", "?")) for piece in pieces])
        opens = np.array([p[0] == "▁" and len(p) > 1 and (p[1].isupper() or p[1] in _OPENING) for p in pieces])
        stops, spaces = (np.array([piece == mark for piece in pieces]) for mark in (".", "▁"))
        abbreviations = np.array([word in _ABBREVIATIONS or len(word) == 1 for word in words])
        blank = np.array([not piece.strip("▁\n") for piece in pieces])
        begins = np.array([piece[0] in "▁\n" for piece in pieces])
        # of each book: tokens [T], where sentences begin, whether one begins [T + 1], whether text may be cut [T + 1]
        self.books: list[tuple[np.ndarray, ...]] = []
        for book in books:
            ids = _encode(tokenizer, book) if isinstance(book, str) else np.asarray(book)
            is_sentence, is_word = np.zeros(len(ids) + 1, dtype=bool), np.zeros(len(ids) + 1, dtype=bool)
            is_sentence[1:-1] = ends[ids[:-1]] & opens[ids[1:]]
            is_sentence[1:-2] |= ends[ids[:-2]] & spaces[ids[1:-1]] & opens[ids[2:]]  # books with two spaces
            is_sentence[2:-1] &= ~(stops[ids[1:-1]] & abbreviations[ids[:-2]])
            is_word[1:-1] = begins[ids[1:]] & ~blank[ids[:-1]]
            if is_sentence.any():
                self.books.append((ids, np.flatnonzero(is_sentence), is_sentence, is_word))
        if not self.books:
            raise ValueError("`books` must hold running text; there is no sentence in them.")

    def passage(
        self, rng: Generator, length: int, *, part: tuple[float, float] = (0.0, 1.0)
    ) -> tuple[np.ndarray, np.ndarray]:
        """Whole sentences from one book, exactly `length` tokens; the last is cut at a word where none are as long.

        Args:
            rng: draws the book, by size, and the place.
            length: tokens.
            part: from where to where a book may be used, as shares of it.

        Returns:
            Tokens `[length]`, int64, the first with a space before; and where sentences begin in them, or end with
            them, ascending from 0.

        Raises:
            ValueError: no book has as much.
        """
        if length == 0:
            return np.zeros(0, dtype=np.int64), np.zeros(1, dtype=np.int64)
        sizes = np.array([len(book[0]) for book in self.books])
        order = rng.choice(len(sizes), len(sizes), replace=False, p=sizes / sizes.sum())
        for kind in (0, 1):  # an end of a sentence, of a word
            for ids, starts, *allowed in (self.books[i] for i in order):
                low, high = np.searchsorted(starts, (int(part[0] * len(ids)), int(part[1] * len(ids)) - length + 1))
                chosen = starts[low:high]
                chosen = chosen[allowed[kind][chosen + length]]
                if len(chosen):
                    start = int(rng.choice(chosen))
                    low, high = np.searchsorted(starts, (start, start + length + 1))
                    return ids[start : start + length].astype(np.int64), starts[low:high] - start
        longest = int((part[1] - part[0]) * sizes.max())
        raise ValueError(f"`books` must have a passage of {length} tokens; the longest part of one has {longest}.")


def _room(length: int, needed: int) -> int:
    """Tokens that are left of `length`."""
    if length < needed:
        raise ValueError(f"`length` must be at least {needed} tokens for this, got {length}.")
    return length - needed


def _example(tokenizer, parts: list[Part], asked: int, answer: str, marker: str = "", length=None) -> Example:
    """The parts one after another, filled up to `length` with padding; `asked` is the last answer's part."""
    sizes = [len(ids) for ids, _ in parts]
    end = sum(sizes)
    input_ids = np.full(length or end, tokenizer.pad_token_id, dtype=np.int64)
    input_ids[:end] = np.concatenate([ids for ids, _ in parts])
    labels = np.full(length or end, IGNORED, dtype=np.int64)
    labels[:end] = np.where(np.repeat([labelled for _, labelled in parts], sizes), input_ids[:end], IGNORED)
    return Example(input_ids, labels, sum(sizes[:asked]), end, answer, marker)


def needle(
    rng: Generator,
    tokenizer: Tokenizer,
    length: int,
    *,
    prose: Prose,
    split: str = "train",
    depth: float | None = None,
    num_facts: int = 1,
    label_prose: bool = False,
) -> Example:
    """Prose with facts between its sentences, and a question for each at the end.

    Args:
        length: tokens in all, as in the other functions.
        depth: where the facts stand, from 0 before the prose to 1 behind it, at the nearest border of sentences; None
            draws a place for each.
        num_facts: several train more for the same tokens.

    Raises:
        ValueError: `length` too small, `depth` outside 0 to 1, or prose too short.
    """
    if depth is not None and not 0 <= depth <= 1:
        raise ValueError(f"`depth` must be from 0 to 1, got {depth}.")
    _check_tokenizer(tokenizer)
    encode = functools.partial(_encode, tokenizer)
    facts = list(zip(_draw_keys(rng, split, num_facts), _draw_numbers(rng, num_facts)))
    hidden = [encode(f" The secret number of the {key} is {number}.") for key, number in facts]
    ask = "\n\nWhat is the secret number of the {0}? The secret number of the {0} is"
    asked = [(encode(ask.format(key)), encode(f" {number}.")) for key, number in facts]
    needed = 1 + sum(map(len, hidden)) + sum(len(question) + len(answer) for question, answer in asked)
    filler, borders = prose.passage(rng, _room(length, needed))
    depths = rng.random(num_facts) if depth is None else [depth] * num_facts
    places = np.array([borders[np.abs(borders - share * len(filler)).argmin()] for share in depths])
    parts, done = [(np.array([tokenizer.bos_token_id]), False)], 0
    for index in places.argsort(kind="stable"):
        parts += [(filler[done : places[index]], label_prose), (hidden[index], False)]
        done = places[index]
    parts.append((filler[done:], label_prose))
    for index in rng.permutation(num_facts):
        parts += [(asked[index][0], False), (asked[index][1], True)]
    return _example(tokenizer, parts, len(parts) - 1, str(facts[index][1]))


def lookup(
    rng: Generator, tokenizer: Tokenizer, length: int, *, split: str = "train", num_queries: int = 1
) -> Example:
    """A list of keys with numbers that fills `length`, then `num_queries` of the keys for their numbers.

    Numbers have four digits; a few that are not asked for have more, so that the length comes out.

    Raises:
        ValueError: `length` too small, or too large for the number of keys, or no query.
    """
    if num_queries < 1:
        raise ValueError(f"`num_queries` must be at least 1, got {num_queries}.")
    _check_tokenizer(tokenizer)
    encode = functools.partial(_encode, tokenizer)
    head, ask = encode("The numbers are:\n"), encode("Look up:\n")
    most = num_queries + max(1, length // len(encode("- old garden: 4817\n")))
    keys, numbers = _draw_keys(rng, split, most), _draw_numbers(rng, most)
    lines = [encode(f"- {key}: {number}\n") for key, number in zip(keys, numbers)]
    # the first are asked for, so they come twice; one more must be there to make up the length
    needed = 1 + len(head) + len(ask) + 2 * sum(map(len, lines[:num_queries])) + len(lines[num_queries])
    room, count = _room(length, needed), num_queries + 1
    while count < most and len(lines[count]) <= room:
        room -= len(lines[count])
        count += 1
    longer = num_queries + rng.permutation(count - num_queries)
    for i, index in enumerate(longer[:room]):
        extra = rng.integers(0, 10, room // len(longer) + (i < room % len(longer)))
        lines[index] = encode(f"- {keys[index]}: {numbers[index]}{''.join(map(str, extra))}\n")
    parts = [(np.array([tokenizer.bos_token_id]), False), (head, False)]
    parts += [(lines[index], False) for index in rng.permutation(count)] + [(ask, False)]
    for key, number in zip(keys[:num_queries], numbers):
        parts += [(encode(f"- {key}:"), False), (encode(f" {number}\n"), True)]
    return _example(tokenizer, parts, len(parts) - 1, str(numbers[num_queries - 1]))


def copy(
    rng: Generator,
    tokenizer: Tokenizer,
    length: int,
    *,
    prose: Prose,
    split: str = "train",
    passage_length: int | None = None,
    label_prose: bool = False,
) -> Example:
    """A passage of a book, other prose, and the passage again.

    The training split takes its passages from the first half of a book, the test split from the second.

    Args:
        passage_length: tokens of the passage; None draws it, from 8 to what leaves no room for other prose.

    Raises:
        ValueError: `length` too small, `passage_length` below 1, or prose too short.
    """
    if passage_length is not None and passage_length < 1:
        raise ValueError(f"`passage_length` must be at least 1, got {passage_length}.")
    _check_tokenizer(tokenizer)
    begin, between, again, end = (_encode(tokenizer, s) for s in ("Remember this:", "\n\n", "\n\nRepeat it:", "\n"))
    room = _room(length, 1 + sum(map(len, (begin, between, again, end))) + 2 * (passage_length or 8))
    if passage_length is None:
        passage_length = 8 + int(rng.integers(room // 2 + 1))
        room -= 2 * (passage_length - 8)
    passage, _ = prose.passage(rng, passage_length, part=(0.0, 0.5) if split == "train" else (0.5, 1.0))
    filler, _ = prose.passage(rng, room)
    parts = [(np.array([tokenizer.bos_token_id, *begin]), False), (passage, label_prose), (between, False)]
    parts += [(filler, label_prose), (again, False), (np.concatenate([passage, end]), True)]
    return _example(tokenizer, parts, len(parts) - 1, tokenizer.decode(passage).strip())


def addition_steps(a: int, b: int) -> str:
    """A sum written out: for each column `digit+digit+carry=sum;result so far`, then the equation.

    For 47 and 85: `7+5+0=12;2`, `4+8+1=13;32`, `0+0+1=01;132`, `47+85=132`, a line each. A column's sum always has two
    digits, the next carry first, so each line follows from the line before and one column.
    """
    lines, result, carry, place = [], "", 0, 0
    while place < max(len(str(a)), len(str(b))) or carry:
        x, y = (number // 10**place % 10 for number in (a, b))
        carry, digit = divmod(total := x + y + carry, 10)
        result = f"{digit}{result}"
        lines.append(f"{x}+{y}+{total - x - y}={total:02d};{result}\n")
        place += 1
    return "".join(lines) + f"{a}+{b}={result}\n"


def _fill(tokenizer, length: int | None, make: Callable[[], tuple[list[Part], str, str]]) -> Example:
    """As many problems as `length` holds and padding, or one where it is None; `make` gives parts, answer, marker."""
    _check_tokenizer(tokenizer)
    parts, asked, size = [], None, 0
    while True:
        made, answer, marker = make()
        made = [(np.array([tokenizer.bos_token_id]), False), *made]
        size += sum(len(ids) for ids, _ in made)
        if length is not None and size > length:
            if asked is None:
                _room(length, size)
            return _example(tokenizer, parts, *asked, length)
        asked = len(parts) + [labelled for _, labelled in made].index(True), answer, marker
        parts += made
        if length is None:
            return _example(tokenizer, parts, *asked)


def addition(
    rng: Generator, tokenizer: Tokenizer, length: int | None, *, split: str = "train", digits: tuple[int, int] = (2, 3)
) -> Example:
    """Sums with the steps written out, see `addition_steps`: one, or as many as `length` holds, then padding.

    Args:
        digits: the fewest and the most digits of a number.

    Raises:
        ValueError: `length` too small for one, or `digits` out of range.
    """

    def problem():
        a, b = _draw_pair(rng, split, digits)
        parts = [(_encode(tokenizer, f"{a}+{b}=?\n"), False), (_encode(tokenizer, addition_steps(a, b)), True)]
        return parts, str(a + b), f"\n{a}+{b}="

    return _fill(tokenizer, length, problem)


# What it does, its parameters, a request and a reply. `thing` and `person` are keys of the split, `a` and `b` one of
# its pairs. What is found is random, so that the reply must be read from the result.
TOOLS = {
    "find_number": ("Find the number of a thing.", ["thing"], "What is the number of the {thing}?", "It is {result}."),
    "find_price": ("Find what a thing costs.", ["thing"], "What does the {thing} cost?", "It costs {result}."),
    "find_room": ("Find the room of a person.", ["person"], "Where is the {person}?", "In room {result}."),
    "add": ("Add two numbers.", ["a", "b"], "What are {a} and {b} together?", "Together they are {result}."),
    "send_letter": ("Send a letter.", ["person", "hour"], "Write to the {person} at {hour}.", "The letter is sent."),
    "ring_bell": ("Ring a bell.", ["hour", "thing"], "At {hour}, ring for the {thing}.", "The bell will ring."),
}
_TYPES = {"thing": "string", "person": "string", "a": "integer", "b": "integer", "hour": "integer"}


def tool_schema(name: str) -> dict:
    """A function of `TOOLS` as chat templates take it."""
    description, parameters, _, _ = TOOLS[name]
    properties = {parameter: {"type": _TYPES[parameter]} for parameter in parameters}
    schema = {"type": "object", "properties": properties, "required": parameters}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": schema}}


def tools(
    rng: Generator, tokenizer: Tokenizer, length: int | None, *, split: str = "train", num_tools: int = 3
) -> Example:
    """Chats in the official format, one or as many as `length` holds, then padding; the answer is the last call.

    A call is what MiniCPM4-MCP writes: a thought, then Python calls with keyword arguments in a code fence, both
    between their marks; its result is the JSON of a message of the role `tool`. Chat templates that know `tools`
    present them; with others, the package's own among them, a system message lists the schemas.

    Args:
        num_tools: functions that are offered, in random order; one is needed.

    Raises:
        ValueError: `length` too small for one chat, or `num_tools` out of range.

    Source: OpenBMB/MiniCPM, demo/minicpm4/MCP, format of training data and of calls.
    """
    if not 1 <= num_tools <= len(TOOLS):
        raise ValueError(f"`num_tools` must be from 1 to {len(TOOLS)}, got {num_tools}.")

    def chat():
        offered = [list(TOOLS)[i] for i in rng.permutation(len(TOOLS))[:num_tools]]
        name = offered[int(rng.integers(num_tools))]
        _, parameters, request, reply = TOOLS[name]
        thing, person = _draw_keys(rng, split, 2)
        a, b = _draw_pair(rng, split, (2, 3))
        values = {"thing": thing, "person": person, "a": a, "b": b, "hour": int(rng.integers(1, 13))}
        result = a + b if name == "add" else _draw_numbers(rng, 1)[0] if name.startswith("find") else "done"
        call = f"{name}({', '.join(f'{key}={json.dumps(values[key])}' for key in parameters)})"
        content = f"<|thought_start|>\nI call {name}.\n<|thought_end|>\n"
        content += f"<|tool_call_start|>\n```python\n{call}\n```\n<|tool_call_end|>\n"
        messages = [
            {"role": "user", "content": request.format(**values)},
            {"role": "assistant", "content": content},
            {"role": "tool", "content": json.dumps({"result": result})},
            {"role": "assistant", "content": reply.format(result=result)},
        ]
        return _chat_parts(tokenizer, messages, [tool_schema(tool) for tool in offered]), call, "```python\n"

    return _fill(tokenizer, length, chat)


def _chat_parts(tokenizer, messages: list[dict], schemas: list[dict]) -> list[Part]:
    """A chat as the tokenizer's template renders it; what the assistant writes, its `<|im_end|>` too, is labelled."""
    render = functools.partial(tokenizer.apply_chat_template, tokenize=False, tools=schemas)
    if schemas[0]["function"]["description"] not in render(messages[:1]):
        listed = "\n".join(map(json.dumps, schemas))
        messages = [{"role": "system", "content": f"You can call these functions:\n{listed}"}, *messages]
    parts, done = [], ""
    for index, message in enumerate(messages):
        if message["role"] == "assistant":
            before = render(messages[:index], add_generation_prompt=True)
            after = render(messages[: index + 1]).rstrip("\n")
            parts += [
                (_encode(tokenizer, before[len(done) :]), False),
                (_encode(tokenizer, after[len(before) :]), True),
            ]
            done = after
    return parts


GENERATORS = {"needle": needle, "lookup": lookup, "copy": copy, "addition": addition, "tools": tools}


def make_example(
    task: str, tokenizer: Tokenizer, length: int | None, *, index: int, split: str = "train", seed: int = 0, **options
) -> Example:
    """Example `index` of a task and split; the same arguments always give the same one.

    Args:
        task: a name of `GENERATORS`, whose function says what `options` there are; "needle" and "copy" need `prose`.
        tokenizer: one of the package's kind, such as that of the shipped checkpoint.
        length: tokens, exactly; None only for "addition" and "tools", where it gives a single problem.

    Raises:
        ValueError: unknown task or split, or what the task's function raises.
    """
    if task not in GENERATORS:
        raise ValueError(f"`task` must be one of {', '.join(GENERATORS)}, got {task!r}.")
    if split not in SPLITS:
        raise ValueError(f"`split` must be one of {', '.join(SPLITS)}, got {split!r}.")
    rng = np.random.default_rng([seed, SPLITS.index(split), zlib.crc32(task.encode()), index])
    return GENERATORS[task](rng, tokenizer, length, split=split, **options)


def needle_grid(
    tokenizer: Tokenizer,
    prose: Prose,
    length: int,
    *,
    num_depths: int = 10,
    num_samples: int = 20,
    split: str = "test",
    seed: int = 0,
) -> Iterator[tuple[float, Example]]:
    """Depth and example, `num_samples` at each of `num_depths` depths from 0 to 1, of `length` tokens with the answer.

    Ten depths as in the needle test of the MiniCPM4 report (arXiv:2506.07900), which is RULER's (arXiv:2404.06654).
    """
    for index in range(num_depths * num_samples):
        depth = index // num_samples / max(1, num_depths - 1)
        options = {"index": index, "split": split, "seed": seed, "prose": prose, "depth": depth}
        yield depth, make_example("needle", tokenizer, length, **options)


def addition_problems(
    tokenizer: Tokenizer, num_problems: int, *, digits: tuple[int, int] = (2, 3), split: str = "test", seed: int = 0
) -> Iterator[Example]:
    """Different sums, one an example.

    Raises:
        ValueError: there are not so many of that many digits in the split.
    """
    seen = set()
    for index in range(50 * num_problems):
        example = make_example("addition", tokenizer, None, index=index, split=split, seed=seed, digits=digits)
        if example.marker not in seen:
            seen.add(example.marker)
            yield example
        if len(seen) == num_problems:
            return
    raise ValueError(f"`num_problems` must be fewer for numbers of {digits} digits, got {num_problems}.")


__all__ = [
    "GENERATORS",
    "Example",
    "Prose",
    "addition_problems",
    "addition_steps",
    "keys_of",
    "make_example",
    "needle_grid",
    "split_of",
    "tool_schema",
]
