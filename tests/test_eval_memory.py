"""`python -m minicpm4_hf.eval.memory`: figures against plain computations, a model that knows, resuming, errors."""

import json
import re
import signal
import subprocess
import sys
import time
from importlib.metadata import version

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from minicpm4_hf import MiniCPM4Config, MiniCPM4ForCausalLM
from minicpm4_hf.eval.memory import __main__ as command
from minicpm4_hf.eval.memory import needle
from minicpm4_hf.eval.memory.answers import complete_batch
from minicpm4_hf.eval.memory.cases import Case, Journal, Plan, run_plan
from minicpm4_hf.eval.memory.heatmap import plot_heatmap
from minicpm4_hf.eval.memory.needle import SharedPrefix, make_needle
from minicpm4_hf.eval.memory.prediction import plan_bits_per_byte, plan_sparse_dense
from minicpm4_hf.eval.memory.subject import Subject, Text, load_subject, read_texts
from minicpm4_hf.eval.tasks.perplexity import evaluate_perplexity
from minicpm4_hf.shipped import shipped_checkpoint, shipped_excerpt
from minicpm4_hf.training.synthetic import Prose, addition_problems, make_example

SPARSE = {
    "kernel_size": 8,
    "kernel_stride": 4,
    "init_blocks": 1,
    "block_size": 16,
    "window_size": 32,
    "topk": 3,
    "dense_len": 64,
    "use_nope": False,
}
NEEDLE = ["--lengths", "96", "160", "--depths", "3", "--samples", "2"]
ALL = ["--window", "64", "--contexts", "96", "128", "--tokens", "300", *NEEDLE, "--problems", "5", "--dialogues", "3"]


def build(cls=MiniCPM4ForCausalLM, seed=0):
    """A random model with the shipped vocabulary, sparse from 64 tokens on."""
    torch.manual_seed(seed)
    config = MiniCPM4Config(
        vocab_size=4096,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        initializer_range=0.3,
        dim_model_base=32,
        max_position_embeddings=1024,
        eos_token_id=[2, 4088],
        pad_token_id=2,
        sparse_config=SPARSE,
    )
    return cls(config).eval()


class Knowing(MiniCPM4ForCausalLM):
    """Writes what follows in the sequences that it was told, and nonsense elsewhere; for one row or several."""

    nonsense = 7

    def forward(self, input_ids=None, attention_mask=None, past_key_values=None, **kwargs):
        output = super().forward(
            input_ids=input_ids, attention_mask=attention_mask, past_key_values=past_key_values, **kwargs
        )
        past = output.past_key_values.get_seq_length() - input_ids.shape[1]
        self.history = torch.cat((self.history[:, :past], input_ids), 1) if past else input_ids
        output.logits = torch.zeros(len(input_ids), 1, self.config.vocab_size)
        for row, ids in enumerate(self.history.tolist()):
            ids = ids[ids.index(1) :]  # without padding
            follows = (known[len(ids)] for known in self.known if len(known) > len(ids) and known[: len(ids)] == ids)
            output.logits[row, 0, next(follows, self.nonsense)] = 1
        return output


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Threads that wait for each other take longer than these small products."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(shipped_checkpoint())


@pytest.fixture(scope="module")
def book():
    """A short text, and where it can lie."""
    content = shipped_excerpt().read_text(encoding="utf-8")[:12_000].encode()
    return Text("book.txt", content)


@pytest.fixture(scope="module")
def prose(book, tokenizer):
    return Prose([book.content.decode("utf-8")], tokenizer)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer, book):
    """Two checkpoints, `model` and `other`, and two texts."""
    folder = tmp_path_factory.mktemp("memory")
    for seed, name in enumerate(("model", "other")):
        build(seed=seed).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    (folder / book.name).write_bytes(book.content)
    (folder / "short.txt").write_text("Too short. A needle has no room here.", encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def subject(folder):
    return load_subject(str(folder / "model"), sparse=None, device="cpu", dtype="float32")


def key_of(place, *, length=160, depths=3, sample=0, mode="dense"):
    depth = place / (depths - 1)
    return {
        "mode": mode,
        "length": length,
        "sample": sample,
        "depth": depth,
        "index": sample * depths + place,
        "seed": 0,
    }


def run(folder, part, *arguments, output=None, model="model"):
    """`main` on the small model, one thread; its exit code."""
    paths = ["--model", str(folder / model), "--dtype", "float32", "--threads", "1"]
    paths += ["--output", str(output)] if output else []
    paths += ["--text", str(folder / "book.txt")] if part not in ("addition", "tools") else []
    return command.main([part, *paths, *arguments])


@pytest.fixture(scope="module")
def record(folder, tmp_path_factory):
    """The record of all parts of the random model, and its file."""
    path = tmp_path_factory.mktemp("records") / "record.json"
    assert run(folder, "all", *ALL, output=path) == 0
    return json.loads(path.read_text()), path


# --- needles


def test_needles_of_a_sample_share_their_prose_and_have_facts_of_their_own(tokenizer, prose):
    depths = 4
    examples = [make_needle(tokenizer, prose, key_of(place, depths=depths, length=220)) for place in range(depths)]
    assert len({example.answer for example in examples}) == depths
    texts = [tokenizer.decode(example.prompt_ids) for example in examples]
    fact = re.compile(r" The secret number of the \w+ \w+ is \d{4}\.")
    haystacks = [fact.sub("", text).partition("\n\nWhat is the secret")[0] for text in texts]
    assert all(fact.search(text) for text in texts) and len(set(haystacks)) == 1
    places = [fact.search(text).start() / len(haystacks[0]) for text in texts]
    assert places == sorted(places) and places[0] < 0.05 and places[-1] > 0.7
    for before, after, place in zip(examples, examples[1:], places):
        differs = int((before.input_ids != after.input_ids).argmax())
        assert abs(differs / 220 - place) < 0.15  # up to the first one's fact
    others = [make_needle(tokenizer, prose, key_of(0, depths=depths, length=220, sample=s)) for s in range(1, 6)]
    begins = {fact.sub("", tokenizer.decode(other.prompt_ids))[:200] for other in others}
    assert len(begins) > 2 and len({other.answer for other in others}) == 5
    again = make_needle(tokenizer, prose, key_of(0, depths=depths, length=220, mode="sparse"))
    assert np.array_equal(again.input_ids, examples[0].input_ids)


@pytest.mark.parametrize("mode", ["dense", "sparse"])
def test_shared_prefix_gives_what_the_whole_prompt_gives(subject, tokenizer, prose, mode, monkeypatch):
    monkeypatch.setattr(needle, "CHUNK_TOKENS", 48)
    examples = [make_needle(tokenizer, prose, key_of(p, sample=s, length=300)) for s in range(2) for p in range(3)]
    with subject.attending(mode), torch.no_grad():
        reader = SharedPrefix(subject.model)
        seen, forward = [], reader._forward
        reader._forward = lambda ids: seen.append(forward(ids)) or seen[-1]
        for example in [*examples, examples[-1]]:  # the last one twice: all but its last token are held
            prompt = torch.from_numpy(example.prompt_ids)
            seen.clear()
            completion = reader.complete(prompt, 4)
            ids = torch.cat((prompt, torch.tensor(completion)))
            expected = subject.model(ids[None, :-1], use_cache=False).logits[0, len(prompt) - 1 :]
            torch.testing.assert_close(torch.stack(seen[-4:]), expected, rtol=1e-4, atol=1e-4)
            assert completion == expected.argmax(-1).tolist()
            assert reader.held.tolist() == ids[:-1].tolist() and reader.cache.get_seq_length() == len(ids) - 1
    # Depths 0, 1/2 and 1 take 1, 1 and 1/2 of a prompt, the repeated prompt one token, and each completion 3.
    assert reader.num_read == pytest.approx((2.5 * 2) * 295 + 1 + 7 * 3, rel=0.12)
    with pytest.raises(AssertionError):  # the modes do differ at this length
        with subject.attending("sparse" if mode == "dense" else "dense"), torch.no_grad():
            other = subject.model(ids[None, :-1], use_cache=False).logits[0, len(prompt) - 1 :]
        torch.testing.assert_close(other, expected, rtol=1e-4, atol=1e-4)


def knowing_subject(tokenizer, known):
    model = build(Knowing)
    model.known = [example.input_ids[: example.end].tolist() for example in known]
    return Subject(model, tokenizer, "knowing", SPARSE, {"weights": {}, "device": "cpu", "dtype": "float32"})


@pytest.fixture
def all_known(tokenizer, prose):
    """Every example that `ALL` asks for, by part."""
    places = [(length, sample, place) for length in (96, 160) for sample in range(2) for place in range(3)]
    return {
        "needle": [make_needle(tokenizer, prose, key_of(p, length=n, sample=s)) for n, s, p in places],
        "addition": list(addition_problems(tokenizer, 5)),
        "tools": [make_example("tools", tokenizer, None, index=i, split="test") for i in range(3)],
    }


def run_knowing(monkeypatch, capsys, folder, tokenizer, known, batch):
    """The figures of a model that knows `known`, by part."""
    monkeypatch.setattr(command, "load_subject", lambda *args, **kwargs: knowing_subject(tokenizer, known))
    figures = {}
    for part, settings in (
        ("needle", NEEDLE),
        ("addition", ["--problems", "5", "--batch", batch]),
        ("tools", ["--dialogues", "3", "--batch", batch]),
    ):
        assert run(folder, part, *settings) == 0
        figures |= json.loads(capsys.readouterr().out.splitlines()[-1])["parts"]
    return figures


def test_model_that_knows_gets_everything_right(monkeypatch, capsys, folder, tokenizer, all_known):
    known = [example for examples in all_known.values() for example in examples]
    parts = run_knowing(monkeypatch, capsys, folder, tokenizer, known, "25")
    assert [(row["length"], row["mode"]) for row in parts["needle"]["rows"]] == [
        (length, mode) for length in (96, 160) for mode in ("dense", "sparse")
    ]
    assert all(row["solved_by_depth"] == [2, 2, 2] and row["accuracy"] == 1 for row in parts["needle"]["rows"])
    assert (parts["addition"]["solved"], parts["addition"]["asked"], parts["addition"]["accuracy"]) == (5, 5, 1)
    assert (parts["tools"]["solved"], parts["tools"]["asked"], parts["tools"]["accuracy"]) == (3, 3, 1)


def test_model_that_knows_some_is_right_where_it_does(monkeypatch, capsys, folder, tokenizer, all_known):
    known = [example for i, example in enumerate(all_known["needle"]) if i not in (1, 4, 8)]
    known += all_known["addition"][:2] + all_known["tools"][1:]
    parts = run_knowing(monkeypatch, capsys, folder, tokenizer, known, "2")
    rows = {(row["length"], row["mode"]): row for row in parts["needle"]["rows"]}
    for mode in ("dense", "sparse"):
        assert rows[96, mode]["solved_by_depth"] == [2, 0, 2] and rows[96, mode]["accuracy"] == pytest.approx(4 / 6)
        assert rows[160, mode]["solved_by_depth"] == [2, 2, 1] and rows[160, mode]["solved"] == 5
    assert (parts["addition"]["solved"], parts["addition"]["accuracy"]) == (2, 0.4)
    assert parts["tools"]["solved"] == 2


# --- sums and calls


def test_batch_gives_what_each_prompt_alone_gives(subject, tokenizer):
    examples = [*addition_problems(tokenizer, 3), make_example("tools", tokenizer, None, index=0, split="test")]
    alone = []
    for example in examples:
        ids = torch.from_numpy(example.prompt_ids)
        with torch.no_grad():
            for _ in example.completion_ids:
                ids = torch.cat((ids, subject.model(ids[None], use_cache=False).logits[0, -1].argmax()[None]))
                if int(ids[-1]) in (2, 4088):
                    ids = ids[:-1]
                    break
        alone.append(tokenizer.decode(ids[example.prompt_length :]))
    assert complete_batch(subject, examples) == alone


def test_completion_ends_with_the_turn(tokenizer, all_known):
    example = all_known["tools"][0]
    (completion,) = complete_batch(knowing_subject(tokenizer, [example]), [example])
    whole = tokenizer.decode(example.completion_ids)
    assert completion == whole.partition("<|im_end|>")[0] and whole.count("<|im_end|>") > 1


# --- prediction


@pytest.mark.parametrize("mode", ["dense", "sparse"])
def test_bits_per_byte_are_those_of_the_task(subject, book, mode):
    plan = plan_bits_per_byte(subject, [book], window=200, modes=[mode])
    (row,) = run_plan("bits-per-byte", plan, Journal(None, "x"))["rows"]
    with subject.attending(mode):
        expected = evaluate_perplexity(subject.model, subject.tokenizer, book.content, context=200)
    for name in ("num_bytes", "num_tokens", "bits_per_byte", "perplexity"):
        assert row[name] == pytest.approx(expected[name], rel=1e-6)
    assert (row["text"], row["mode"]) == ("book.txt", mode)


def test_sparse_against_dense(subject, book):
    plan = plan_sparse_dense(subject, [book], contexts=[128, 33], tokens=300)
    rows = run_plan("sparse-dense", plan, Journal(None, "x"))["rows"]
    ids = subject.tokenizer(book.content.decode(), add_special_tokens=False).input_ids
    for row, context, count in zip(rows, (128, 33), (2, 9)):
        assert (row["context"], row["windows"], row["num_tokens"]) == (context, count, count * (context - 1))
        windows = [[1, *ids[i * (context - 1) : (i + 1) * (context - 1)]] for i in range(count)]
        for mode in ("dense", "sparse"):
            with subject.attending(mode), torch.no_grad():
                logits = subject.model(torch.tensor(windows), use_cache=False).logits[:, :-1].double()
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), torch.tensor(windows)[:, 1:].flatten())
            assert row[f"perplexity_{mode}"] == pytest.approx(loss.exp().item(), rel=1e-5)
        assert row["ratio"] == row["perplexity_sparse"] / row["perplexity_dense"]
    # From 64 tokens on, and beyond the budget of 3 + 2 blocks, four whole blocks and the query's own up to it.
    attended = [n + 1 if n + 1 <= 80 else 64 + n % 16 + 1 for n in range(127)]
    assert rows[0]["attended_tokens_sparse"] == pytest.approx(sum(attended) / 127)
    assert rows[0]["attended_share"] == pytest.approx(sum(attended) / sum(range(1, 128)))
    assert rows[0]["ratio"] != 1
    assert rows[1]["ratio"] == 1 and rows[1]["attended_share"] == 1  # below `dense_len` there is no difference


# --- records and resuming


def test_record_says_what_was_measured(record, folder):
    found, path = record
    assert list(found["parts"]) == ["addition", "tools", "bits-per-byte", "sparse-dense", "needle"]
    weights = subprocess.run(["sha256sum", folder / "model" / "model.safetensors"], capture_output=True, text=True)
    assert found["model"]["weights"] == {"model.safetensors": weights.stdout.split()[0]}
    assert (found["model"]["name"], found["model"]["dtype"]) == ("model", "float32")
    assert found["model"]["sparse_config"] == SPARSE and found["machine"]["threads"] == 1
    assert found["versions"]["torch"] == version("torch")
    for name, part in found["parts"].items():
        assert part["seconds"] > 0 and str(folder) not in part["command"]
        assert part["command"].startswith(f"python -m minicpm4_hf.eval.memory {name} --model model")
        assert part["texts"] == ([] if name in ("addition", "tools") else ["book.txt"])
    assert found["parts"]["needle"]["settings"]["lengths"] == [96, 160]
    lines = [json.loads(line) for line in path.with_suffix(".jsonl").read_text().splitlines()]
    assert sum(line["part"] == "needle" for line in lines) == 2 * 2 * 3 * 2
    assert all(
        len(line["result"]["answer"]) == 4 and line["result"]["completion"]
        for line in lines
        if line["part"] == "needle"
    )


def test_second_run_measures_nothing_and_keeps_other_parts(record, folder, monkeypatch, capsys):
    found, path = record
    monkeypatch.setattr(SharedPrefix, "complete", None)
    monkeypatch.setattr(command.prediction, "score_tokens", None)
    assert run(folder, "needle", *NEEDLE, output=path) == 0
    captured = capsys.readouterr()
    again = json.loads(captured.out.splitlines()[-1])
    assert again == json.loads(path.read_text()) and "needle: 24 of 24 measured before" in captured.err
    assert list(again["parts"]) == list(found["parts"])
    for name, part in again["parts"].items():
        assert {**part, "date": ""} == {**found["parts"][name], "date": ""}
    # Fewer samples are among those that there are; other facts are not.
    assert run(folder, "needle", *NEEDLE, "--samples", "1", output=path) == 0
    with pytest.raises(TypeError):
        run(folder, "needle", *NEEDLE, "--seed", "1", output=path)


def test_run_that_was_stopped_goes_on(record, folder, tmp_path, monkeypatch, capsys):
    calls, complete = [], SharedPrefix.complete

    def stop_after_seven(self, *args):
        if len(calls) == 7:
            raise KeyboardInterrupt
        calls.append(args)
        return complete(self, *args)

    path = tmp_path / "record.json"
    with monkeypatch.context() as patch:
        patch.setattr(SharedPrefix, "complete", stop_after_seven)
        assert run(folder, "needle", *NEEDLE, output=path) == 130
    assert not path.exists() and "goes on from here" in capsys.readouterr().err
    journal = path.with_suffix(".jsonl")
    assert len(journal.read_text().splitlines()) == 7
    with journal.open("a") as file:
        file.write('{"owner": "cut o')  # what a kill leaves
    calls.clear()
    monkeypatch.setattr(SharedPrefix, "complete", lambda self, *args: calls.append(args) or complete(self, *args))
    assert run(folder, "needle", *NEEDLE, output=path) == 0
    assert len(calls) == 24 - 7 and len(journal.read_text().splitlines()) == 24
    wanted = [row["solved_by_depth"] for row in record[0]["parts"]["needle"]["rows"]]
    assert [row["solved_by_depth"] for row in json.loads(path.read_text())["parts"]["needle"]["rows"]] == wanted

    def completions(path):
        lines = map(json.loads, path.with_suffix(".jsonl").read_text().splitlines())
        return {json.dumps(x["case"]): x["result"]["completion"] for x in lines if x["part"] == "needle"}

    assert completions(path) == completions(record[1])


@pytest.mark.slow
def test_killed_run_goes_on(folder, tmp_path):
    path = tmp_path / "record.json"
    many = ["--lengths", "160", "--depths", "10", "--samples", "200"]
    words = ["needle", "--model", folder / "model", "--text", folder / "book.txt", "--output", path, "--threads", "1"]
    process = subprocess.Popen(
        [sys.executable, "-m", "minicpm4_hf.eval.memory", *map(str, words), *many], stderr=subprocess.DEVNULL
    )
    journal = path.with_suffix(".jsonl")
    while not (journal.exists() and journal.stat().st_size > 10_000):
        assert process.poll() is None
        time.sleep(0.02)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    content = journal.read_bytes()
    num_done = content.count(b"\n")
    assert 0 < num_done < 4000 and not path.exists()
    run_again = [*many[:-1], "3"]
    assert command.main([*map(str, words), *run_again]) == 0
    assert journal.read_bytes().startswith(content[: content.rindex(b"\n") + 1])
    assert sum(row["asked"] for row in json.loads(path.read_text())["parts"]["needle"]["rows"]) == 60


def test_journal_keeps_results_apart(tmp_path):
    path = tmp_path / "results.jsonl"
    journal = Journal(path, "mine")
    journal.add("a", [{"x": 1, "y": 2}, {"x": 2}], [{"r": 1}, {"r": 2}])
    again = Journal(path, "mine")
    assert again.find("a", {"y": 2, "x": 1}) == {"r": 1} and again.find("a", {"x": 2}) == {"r": 2}
    assert again.find("b", {"x": 2}) is None and again.find("a", {"x": 3}) is None
    assert Journal(path, "theirs").find("a", {"x": 2}) is None
    path.write_bytes(path.read_bytes()[:-1])  # the last line's end is missing
    assert Journal(path, "mine").find("a", {"x": 2}) is None
    assert path.read_bytes().endswith(b"\n") and len(path.read_bytes().splitlines()) == 1
    path.write_text("[1]\n")
    with pytest.raises(ValueError, match=r"Line 1 of .* is no result of this evaluation"):
        Journal(path, "mine")


def test_batch_with_a_missing_case_runs_whole(capsys):
    ran = []

    def answer(keys):
        ran.append([key["n"] for key in keys])
        return [{"n": key["n"]} for key in keys]

    journal = Journal(None, "x")
    journal.add("p", [{"n": n} for n in (0, 1, 2)], [{"n": n, "seconds": 0.5} for n in (0, 1, 2)])
    plan = Plan([Case({"n": n}, 1) for n in range(5)], answer, lambda r: {"ns": [x["n"] for x in r]}, batch=2)
    figures = run_plan("p", plan, journal)
    assert ran == [[2, 3], [4]] and figures["ns"] == [0, 1, 2, 3, 4] and figures["seconds"] >= 1
    assert "p: 1 of 3 measured before" in capsys.readouterr().err


# --- the figure


def test_heatmap_shows_each_cell(record, tmp_path):
    found = json.loads(json.dumps(record[0]))
    for shown, row in zip(((0, 1, 2), (1, 2, 0), (2, 2, 2), (1, 1, 1)), found["parts"]["needle"]["rows"]):
        row["solved_by_depth"] = list(shown)
    svg = plot_heatmap(found)
    texts = re.findall(r"<text[^>]*>([^<]*)</text>", svg)
    assert {"dense attention", "sparse attention", "96", "160", "0%", "50%", "100%"} <= set(texts)
    cells = [text for text in texts if text in ("0", "50", "100")]
    dense, sparse = ["0", "100", "50", "100", "100", "100"], ["50", "50", "100", "50", "0", "50"]
    joined = " ".join(cells)
    assert " ".join(dense) in joined and " ".join(sparse) in joined and svg == plot_heatmap(found)
    figure = tmp_path / "figure.svg"
    assert command.main(["heatmap", str(record[1]), "--output", str(figure)]) == 0
    assert figure.read_text().startswith("<?xml")


def test_heatmap_without_matplotlib(record, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert command.main(["heatmap", str(record[1]), "--output", str(tmp_path / "figure.svg")]) == 2
    assert capsys.readouterr().err == "error: The figure needs matplotlib: `pip install minicpm4-hf[eval]`.\n"


# --- wrong input

WRONG = {
    "needle --output {tmp}/none/r.json": "The folder of '{tmp}/none/r.json' does not exist.",
    "needle --output {tmp}/r.txt": "`--output` must be a file that ends in .json, got '{tmp}/r.txt'.",
    "needle --lengths 96 96": "`--lengths` must name each value once, got 96 96.",
    "needle --modes dense dense": "`--modes` must name each value once, got dense dense.",
    "needle --lengths 96 2048": "`--lengths` must be at most the model's context of 1024 tokens, got 2048.",
    "needle --lengths 20": "`length` must be at least",
    "needle --lengths 96 --text {tmp}/short.txt": "`books` must",
    "needle --text {tmp}/book.txt {tmp}/book.txt": "`--text` must name each book once, got 'book.txt' twice.",
    "needle --model {tmp}/nowhere": "There is no model folder",
    "needle --sparse topk": "`--sparse` takes KEY=VALUE",
    "bits-per-byte --window 2000": "A context must be from 2 to the model's 1024 tokens, got 2000.",
    "sparse-dense --contexts 900 --text {tmp}/short.txt": "A text must have 899 tokens for a context of 900; ",
    "tools --output {tmp}/list.json": "'{tmp}/list.json' is not a record of `python -m minicpm4_hf.eval.memory`.",
    "tools --output {tmp}/broken.json": "'{tmp}/broken.json' is not JSON",
    "heatmap {tmp}/empty.json --output {tmp}/f.svg": "The record has no `needle` to draw, only nothing; ",
}


@pytest.mark.parametrize("line", WRONG)
def test_wrong_input_is_one_sentence(folder, capsys, line):
    for name, content in (
        ("list.json", "[]"),
        ("broken.json", "{"),
        ("empty.json", '{"benchmark": "memory", "parts": {}}'),
    ):
        (folder / name).write_text(content)
    part, *arguments = line.format(tmp=folder).split()
    code = command.main([part, *arguments]) if part == "heatmap" else run(folder, part, *arguments)
    assert code == 2
    error = capsys.readouterr().err.splitlines()
    assert len(error) == 1 and error[0].startswith("error: " + WRONG[line].format(tmp=folder))


def test_record_of_other_weights_is_not_touched(record, folder, capsys, tmp_path):
    path = tmp_path / "record.json"
    path.write_bytes(record[1].read_bytes())
    assert run(folder, "addition", "--problems", "2", output=path, model="other") == 2
    error = capsys.readouterr().err
    assert "has figures whose model['weights'] is {\"model.safetensors\"" in error and "another --output" in error
    assert run(folder, "addition", "--problems", "2", "--sparse", "topk=4", output=path) == 2
    assert "model['sparse_config']" in capsys.readouterr().err
    assert path.read_bytes() == record[1].read_bytes()
    other = folder / "elsewhere"
    other.mkdir(exist_ok=True)
    (other / "book.txt").write_text("Another book. " * 500)
    assert run(folder, "bits-per-byte", "--text", str(other / "book.txt"), output=path) == 2
    assert "texts['book.txt']" in capsys.readouterr().err


def test_dense_checkpoint(folder, tokenizer, capsys, tmp_path):
    model = build()
    model.config.sparse_config = None
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert run(folder, "needle", *NEEDLE, "--model", str(tmp_path)) == 2
    assert "has no sparse attention (its `sparse_config` is null)" in capsys.readouterr().err
    dense = ["--model", str(tmp_path), "--modes", "dense", "--window", "512"]
    assert run(folder, "bits-per-byte", *dense) == 0
    assert run(folder, "addition", "--problems", "1", "--model", str(tmp_path)) == 0


def test_texts_are_checked(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xff")
    with pytest.raises(ValueError, match="is not UTF-8: byte 0"):
        read_texts([tmp_path / "a.txt"])
    with pytest.raises(FileNotFoundError):
        read_texts([tmp_path / "none.txt"])


def test_help_has_the_commands(capsys):
    with pytest.raises(SystemExit) as stop:
        command.main(["--help"])
    shown = capsys.readouterr().out
    listed = re.findall(r"^    ([a-z-]+)\s", shown, re.MULTILINE)
    assert stop.value.code == 0 and [*command.PARTS, "all", "heatmap"] == listed[: len(command.PARTS) + 2]
