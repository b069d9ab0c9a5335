"""`python -m minicpm4_hf.eval ruler`: samples read back by other means, scores, lengths, resuming, errors."""

import json
import re
from collections import Counter

import pytest
import torch
from transformers import AutoTokenizer

from minicpm4_hf import MiniCPM4Config, MiniCPM4ForCausalLM
from minicpm4_hf.eval.__main__ import main
from minicpm4_hf.eval.memory.__main__ import main as memory
from minicpm4_hf.eval.memory.cases import Journal, run_plan
from minicpm4_hf.eval.memory.subject import Subject
from minicpm4_hf.eval.ruler import plan as plan_module
from minicpm4_hf.eval.ruler import record as record_module
from minicpm4_hf.eval.ruler.fitting import Generator, choose_format, encode_sample, largest_fit
from minicpm4_hf.eval.ruler.needles import NUM_DEPTHS, hide_in_prose, spell_list
from minicpm4_hf.eval.ruler.plan import plan_ruler
from minicpm4_hf.eval.ruler.questions import generate_questions, read_hotpot, read_squad
from minicpm4_hf.eval.ruler.scoring import clean_answer, match_all, match_part
from minicpm4_hf.eval.ruler.source import Sample, Source, split_sentences
from minicpm4_hf.eval.ruler.tasks import DEPTH_TASKS, TASKS
from minicpm4_hf.shipped import shipped_checkpoint, shipped_excerpt

LENGTH = 1600
SPARSE = {"kernel_size": 8, "kernel_stride": 4, "block_size": 16, "window_size": 32, "topk": 3, "dense_len": 64}


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(shipped_checkpoint())


@pytest.fixture(scope="module")
def source():
    text = shipped_excerpt().read_text(encoding="utf-8")
    return Source(text, {task: generate_questions(task, text.split(), 0) for task in ("qa_1", "qa_2")})


@pytest.fixture(scope="module")
def subject(tokenizer):
    """A random model with the shipped vocabulary."""
    torch.manual_seed(0)
    config = MiniCPM4Config(
        vocab_size=4096,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        dim_model_base=32,
        max_position_embeddings=4096,
        eos_token_id=[2, 4088],
        pad_token_id=2,
        sparse_config=SPARSE,
    )
    model = MiniCPM4ForCausalLM(config).eval()
    return Subject(model, tokenizer, "random", model.config.sparse_config, {})


@pytest.fixture(scope="module")
def folder(subject, tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ruler") / "model"
    subject.model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


# Solvers, which know a prompt's text only and read it in another way than it was written.


def solve_needles(prompt):
    context, question = prompt.rsplit("\n", 1)
    asked = re.search(r"magic \w+ for (.+) mentioned", question)[1]
    facts = re.findall(r"special magic \w+ for (\S+) is: (\S+)\.", context)
    return [value for key in re.split(r", and |, ", asked) for found, value in facts if found == key]


def solve_tracing(prompt):
    text = prompt.rsplit("Memorize and track", 1)[1]
    (value,) = re.findall(r"assigned the value (\d+) in the text", text)
    known = {}
    for name, right in re.findall(r"VAR (\w+) = (?:VAR )?(\w+)", text):
        known[name] = known.get(right, right)
    return [name for name, held in known.items() if held == value]


def solve_common(prompt):
    entries = re.findall(r"\d+\. (\S+)", prompt.rsplit("Memorize the ones", 1)[1])
    return [word for word, _ in Counter(entries).most_common(10)]


def solve_coded(prompt):
    text = re.search(r"coded words\. (.*)\nQuestion", prompt, re.DOTALL)[1]
    (noise, _), *rest = Counter(text.split()).most_common(4)
    assert noise == "..."
    return [word for word, _ in rest]


def solve_answering(prompt):
    facts = {
        name: {"town": town, "year": year, "trade": trade}
        for name, town, year, trade in re.findall(r"(\w+ \w+) was born in (\w+) in (\d+) and became a (\w+)\.", prompt)
    }
    teachers = dict(re.findall(r"(\w+ \w+) learned the trade from (\w+ \w+)\.", prompt))
    question = prompt.rsplit("Question: ", 1)[1]
    (person,) = re.findall(r"([A-Z]\w+ [A-Z]\w+)", question.removeprefix("In which").removeprefix("What did"))
    person = teachers[person] if "learned the trade from" in question else person
    asked = "town" if "town" in question else "year" if "year" in question else "trade"
    return [facts[person][asked]]


SOLVERS = {"niah": solve_needles, "vt": solve_tracing, "cwe": solve_common, "fwe": solve_coded, "qa": solve_answering}


@pytest.mark.parametrize("length", [LENGTH, 5000])
@pytest.mark.parametrize("task", TASKS)
def test_samples(task, length, source, tokenizer):
    generator = Generator(source, tokenizer, "chat", seed=3)
    prompts = set()
    for index in range(4):
        sample, ids = generator.make(task, length, index)
        # Whoever reads the prompt finds the answers, all of them and no others.
        assert sorted(SOLVERS[task.split("_")[0]](sample.prompt)) == sorted(sample.outputs)
        assert len(ids) + TASKS[task].answer_tokens <= length
        prompts.add(sample.prompt)
    assert len(prompts) == 4
    size = generator.sizes[task, length]
    sample, ids = generator.make(task, length, 0)
    larger = TASKS[task].sample(source, size + 200, task=task, length=length, index=0, seed=3)
    assert len(encode_sample(tokenizer, larger, "chat")) + TASKS[task].answer_tokens > length
    assert len(ids) > 0.75 * length or task.startswith("qa") or task == "cwe"
    again, _ = Generator(source, tokenizer, "chat", seed=3).make(task, length, 2)
    assert again == generator.make(task, length, 2)[0]
    assert again != Generator(source, tokenizer, "chat", seed=4).make(task, length, 2)[0]


def test_task_forms(source):
    """What sets the thirteen apart: how many answers, of what kind, in what."""

    def make(task):
        return TASKS[task].sample(source, 400, task=task, length=LENGTH, index=0, seed=0)

    uuid = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}")
    forms = {task: make(task) for task in TASKS}
    assert [len(sample.outputs) for sample in forms.values()] == [1] * 6 + [4, 4, 5, 10, 3, 1, 1]
    assert set(TASKS) == set(forms) and len(TASKS) == 13
    assert all(uuid.fullmatch(forms[task].outputs[0]) for task in ("niah_single_3", "niah_multikey_3"))
    assert re.fullmatch(r"\d{7}", forms["niah_single_1"].outputs[0])
    needles = {task: len(re.findall("One of the special magic", sample.prompt)) for task, sample in forms.items()}
    assert [needles[task] for task in list(TASKS)[:8]] == [1, 1, 1, 4, 401, 401, 4, 4]
    assert forms["niah_single_1"].prompt.count("The grass is green.") == 400
    assert "A special magic number is hidden" in forms["niah_single_2"].prompt
    assert "Some special magic numbers are hidden" in forms["niah_multivalue"].prompt
    assert forms["vt"].prompt.count("VAR ") == 2 * 9 and "12345" not in forms["vt"].prompt
    entries = re.findall(r"\d+\. (\S+)", forms["cwe"].prompt.rsplit("Memorize", 1)[1])
    assert set(Counter(entries).values()) == {6, 1} and len(set(entries)) == 400
    longer = TASKS["cwe"].sample(source, 50, task="cwe", length=4096, index=0, seed=0).prompt
    assert set(Counter(re.findall(r"\d+\. (\S+)", longer.rsplit("Memorize", 1)[1])).values()) == {30, 3}
    assert forms["qa_1"].prompt.count("Document ") == 400


def test_depths_spread_over_the_text(source):
    import random

    words = source.words[:3000]
    places = []
    for seed in range(200):
        text = hide_in_prose(random.Random(seed), words, ["NEEDLE"])
        places.append(text.index("NEEDLE") / len(text))
        assert text.replace("NEEDLE ", "").replace(" NEEDLE", "") == " ".join(words)
    assert min(places) == 0 and max(places) > 0.98
    assert NUM_DEPTHS / 2 < len(set(places)) <= NUM_DEPTHS
    assert split_sentences('He said "No." Then he left! Why?') == ['He said "No."', "Then he left!", "Why?"]
    assert spell_list(["a"]) == "a" and spell_list(["a", "b", "c"]) == "a, b, and c"


@pytest.mark.parametrize(
    ("answer", "outputs", "all_of", "one_of"),
    [
        ("It is 4817 and 23.", ["4817", "23"], 1.0, 1.0),
        ("the NEEDLE, 4817", ["needle", "5", "6", "7"], 0.5, 1.0),  # 7 is in 4817: containing is enough
        ("nothing", ["a", "b"], 0.0, 0.0),
        ("", ["a"], 0.0, 0.0),
        ("one\x00two", ["one", "onetwo", "two\n", "two"], 0.5, 1.0),
    ],
)
def test_scores(answer, outputs, all_of, one_of):
    assert match_all(answer, outputs) == all_of
    assert match_part(answer, outputs) == one_of


def test_scores_are_those_of_the_definition():
    """RULER's, written out over a list of answers."""
    answers, outputs = ["x Y", "\tq\x1f ", "zz top"], [["y", "w"], ["q"], ["top", "zz", "no", "x"]]
    cleaned = [re.sub(r"[\x00-\x1f]", "\n", answer.strip()).strip() for answer in answers]
    assert [clean_answer(answer) for answer in answers] == cleaned
    expected = sum(
        sum(1.0 if o.lower() in a.lower() else 0.0 for o in found) / len(found) for a, found in zip(cleaned, outputs)
    )
    assert sum(map(match_all, answers, outputs)) == expected == 0.5 + 1 + 0.5
    assert sum(map(match_part, answers, outputs)) == 3


@pytest.mark.parametrize("largest", [float("inf"), 37, 5])
@pytest.mark.parametrize("limit", [0, 10, 61, 62, 1000])
def test_largest_fit(limit, largest):
    found = largest_fit(lambda size: 2 * size, 5, limit, largest)
    fitting = [size for size in range(5, 1001) if 2 * size <= limit and size <= largest]
    assert found == max(fitting, default=5)


class Answering:
    """Stands where the model is read: gives what a function says of the prompt's ids."""

    def __init__(self, tell):
        self.tell = tell

    def __call__(self, model):
        return self

    def complete(self, prompt_ids, num_tokens, ends):
        assert ends == {2, 4088}
        return self.tell(prompt_ids)[:num_tokens]


@pytest.mark.parametrize(("knows", "expected"), [(True, 100.0), (False, 0.0)], ids=["oracle", "empty"])
def test_oracle_and_floor(knows, expected, source, subject, tokenizer, monkeypatch):
    generator = Generator(source, tokenizer, "chat", seed=0)
    answers = {}
    for task in TASKS:
        for index in range(2):
            sample, ids = generator.make(task, LENGTH, index)
            answers[tuple(ids.tolist())] = tokenizer(" ".join(sample.outputs), add_special_tokens=False).input_ids
    reader = Answering(lambda ids: answers[tuple(ids.tolist())] if knows else [])
    monkeypatch.setattr(plan_module, "SharedPrefix", reader)
    plan = plan_ruler(subject, generator, lengths=[LENGTH], tasks=list(TASKS), samples=2, modes=["dense", "sparse"])
    figures = run_plan("ruler", plan, Journal(None, ""))
    assert {row["score"] for row in figures["rows"]} == {expected} and len(figures["rows"]) == 26
    assert [row["score"] for row in figures["averages"]] == [expected] * 2
    assert [row["tasks"] for row in figures["averages"]] == [13] * 2


def test_command_goes_on_where_it_was(folder, tmp_path, capsys):
    output = tmp_path / "r.json"
    command = ["ruler", "--model", str(folder), "--lengths", str(LENGTH), "--tasks", "niah_single_2", "fwe"]
    command += ["--samples", "2", "--output", str(output)]
    assert main(command) == 0
    printed = capsys.readouterr().out
    record = json.loads(output.read_text())
    assert json.loads(printed.splitlines()[-1]) == record
    assert [(row["task"], row["mode"]) for row in record["rows"]] == [
        ("niah_single_2", "dense"),
        ("fwe", "dense"),
        ("niah_single_2", "sparse"),
        ("fwe", "sparse"),
    ]
    assert record["settings"]["questions"] == {} and record["settings"]["format"] == "chat"
    assert "niah_single_2" in printed and record["commit"] == record_module.find_commit()
    journal = output.with_suffix(".jsonl")
    lines = journal.read_text().splitlines()
    assert len(lines) == 8
    dense, sparse = (
        [json.loads(line) for line in lines if json.loads(line)["case"]["mode"] == mode]
        for mode in ("dense", "sparse")
    )
    assert [x["result"]["outputs"] for x in dense] == [x["result"]["outputs"] for x in sparse]
    journal.write_text("\n".join(lines[:5]) + "\n" + lines[5][:30])  # as a kill leaves it
    assert main(command) == 0
    assert journal.read_text().splitlines()[:5] == lines[:5]
    again = json.loads(output.read_text())
    assert again["rows"] == record["rows"]
    assert (
        json.loads(journal.read_text().splitlines()[5])["result"]["answer"] == json.loads(lines[5])["result"]["answer"]
    )


def test_modes_differ_only_where_sparse_is_sparse(subject, source, tokenizer):
    """The mode reaches the model: with random weights, answers of dense and sparse attention differ."""
    generator = Generator(source, tokenizer, "plain", seed=0)
    plan = plan_ruler(
        subject, generator, lengths=[LENGTH], tasks=["niah_single_2"], samples=1, modes=["dense", "sparse"]
    )
    seen = []
    original = subject.model.forward
    subject.model.forward = lambda *a, **k: (seen.append(subject.model.config.sparse_config), original(*a, **k))[1]
    try:
        for case in plan.cases:
            seen.clear()
            plan.run([case.key])
            assert seen and {bool(config) for config in seen} == {case.key["mode"] == "sparse"}
    finally:
        del subject.model.forward


def test_grid(folder, tmp_path, subject, source, tokenizer, monkeypatch, capsys):
    """Needles at their depths, and each depth's answers in its own cell."""
    generator = Generator(source, tokenizer, "plain", 0, depths=5)
    for task in DEPTH_TASKS:
        places = []
        for index in range(6):
            prompt = generator.make(task, 3000, index)[0].prompt
            begin, end = prompt.index("\n"), prompt.rindex("\n")
            places.append((prompt.index("One of the special") - begin) / (end - begin))
        assert places[:5] == pytest.approx([0, 0.25, 0.5, 0.75, 1], abs=0.08) and places[5] == pytest.approx(
            0, abs=0.01
        )
    known = {}
    for index in range(10):
        sample, ids = generator.make("niah_single_2", LENGTH, index)
        right = index % 5 == 3 or index == 6  # everywhere at one depth, and once at another
        known[tuple(ids.tolist())] = tokenizer(sample.outputs[0] if right else "?", add_special_tokens=False).input_ids
    monkeypatch.setattr(plan_module, "SharedPrefix", Answering(lambda ids: known[tuple(ids.tolist())]))
    output, figure = tmp_path / "r.json", tmp_path / "f.json"
    command = ["ruler", "--model", str(folder), "--lengths", str(LENGTH), "--tasks", "niah_single_2", "--depths", "5"]
    command += ["--samples", "10", "--modes", "sparse", "--format", "plain", "--output", str(output)]
    assert main(command) == 0
    needle = json.loads(output.read_text())["parts"]["needle"]
    assert needle["samples"] == 2 and needle["rows"] == [
        {"length": LENGTH, "mode": "sparse", "depths": [0, 0.25, 0.5, 0.75, 1], "solved_by_depth": [0, 1, 0, 2, 0]}
    ]
    assert memory(["heatmap", str(output), "--output", str(figure)]) == 0
    assert json.loads(figure.read_text())["accuracy"] == {"sparse": [[0], [0.5], [0], [1], [0]]}
    assert memory(["heatmap", str(output), "--output", str(tmp_path / "f.png")]) == 0
    assert (tmp_path / "f.png").read_bytes().startswith(b"\x89PNG")
    assert memory(["heatmap", str(output), "--output", str(tmp_path / "f.gif")]) == 2
    assert "A heat map is a file that ends in .svg, .png, .json, got '.gif'." in capsys.readouterr().err


def test_prompt_formats(tokenizer):
    sample = Sample("What is it?", " It is", ("x",))
    chat = tokenizer.decode(encode_sample(tokenizer, sample, "chat"))
    assert chat == "<|im_start|>user\nWhat is it?<|im_end|>\n<|im_start|>assistant\n It is"
    assert tokenizer.decode(encode_sample(tokenizer, sample, "plain")) == "<s>What is it? It is"
    assert choose_format("auto", tokenizer) == "chat" and choose_format("plain", tokenizer) == "plain"


def squad(tmp_path, content):
    path = tmp_path / "questions.json"
    path.write_text(json.dumps(content) if not isinstance(content, bytes) else "", encoding="utf-8")
    if isinstance(content, bytes):
        path.write_bytes(content)
    return path


ARTICLES = [
    {
        "paragraphs": [
            {
                "context": f"Text {article}{number}.",
                "qas": [
                    {"question": f"What {article}{number}?", "answers": [{"text": "a"}, {"text": "b"}]},
                    {"question": "Never?", "answers": [], "is_impossible": True},
                ],
            }
            for number in range(3)
        ]
    }
    for article in range(4)
]
HOTPOT = [
    {"question": f"Who {i}?", "answer": f"n{i}", "context": [["A", ["One. ", "Two."]], [f"B{i}", ["C."]]]}
    for i in range(3)
]


def test_question_files(tmp_path, source, tokenizer):
    found = read_squad(squad(tmp_path, {"data": ARTICLES}))
    assert len(found.documents) == 12 and len(found.questions) == 12
    question = found.questions[4]
    assert question.query == "What 11?" and question.outputs == ("a", "b")
    assert [found.documents[place] for place in question.gold] == ["Text 11."]
    assert sorted(found.documents[place] for place in question.near) == ["Text 10.", "Text 12."]
    own = Source(source.text, {"qa_1": found})
    for size, least in ((1, {"Text 11."}), (3, {"Text 10.", "Text 11.", "Text 12."}), (30, set(found.documents))):
        prompt = TASKS["qa_1"].sample(own, size, task="qa_1", length=1, index=4, seed=0).prompt
        shown = re.findall(r"Document \d+:\n(.*)\n", prompt)
        assert len(shown) == size and least <= set(shown)
    found = read_hotpot(squad(tmp_path, HOTPOT))
    assert found.documents == ["A\nOne. Two.", "B0\nC.", "B1\nC.", "B2\nC."]
    assert found.questions[1].gold == (0, 2) and found.questions[1].outputs == ("n1",)


@pytest.mark.parametrize(
    ("read", "content", "sentence"),
    [
        (read_squad, HOTPOT, "is not a file of SQuAD 2.0"),
        (read_hotpot, {"data": ARTICLES}, "is not a file of HotpotQA"),
        (read_squad, {"data": []}, "has no questions with answers"),
        (read_squad, b"{", "is not a file of SQuAD 2.0"),
        (read_hotpot, b"\xff{}", "is not UTF-8: byte 0"),
    ],
)
def test_wrong_question_files(read, content, sentence, tmp_path):
    with pytest.raises(ValueError, match=re.escape(sentence)):
        read(squad(tmp_path, content))


def fails(arguments, capsys):
    assert main(["ruler", *arguments]) == 2
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--lengths", "8192"], "must be at most the model's context of 4096 tokens, got 8192; extend it"),
        (["--lengths", "300"], "`--lengths` 300 is too short for `vt`: its smallest sample takes"),
        (["--lengths", "900", "900"], "`--lengths` must name each value once, got 900 900."),
        (["--output", "absent/r.json"], "The folder of 'absent/r.json' does not exist."),
        (["--output", "r.txt"], "`--output` must be a file that ends in .json, got 'r.txt'."),
        (["--text", "absent.txt"], "absent.txt"),
        (["--squad", "absent.json", "--tasks", "qa_1"], "absent.json"),
        (["--samples", "2000", "--tasks", "qa_1", "--lengths", "900"], "generated has 1600 questions for `qa_1`"),
        (
            ["--depths", "5"],
            "`--depths` needs `--tasks` with one of niah_single_1, niah_single_2, niah_single_3, got vt.",
        ),
        (["--depths", "3", "--tasks", "niah_single_1"], "`--samples` must be a multiple of `--depths` 3, got 50."),
        (["--sparse", "topk"], "`--sparse` takes KEY=VALUE pairs"),
    ],
)
def test_wrong_input(arguments, sentence, folder, capsys):
    tasks = [] if "--tasks" in arguments else ["--tasks", "vt"]
    assert sentence in fails(["--model", str(folder), *tasks, *arguments], capsys)


def test_text_that_cannot_be_used(folder, tmp_path, capsys):
    text = tmp_path / "text.txt"
    common = ["--model", str(folder), "--text", str(text), "--tasks", "cwe", "--lengths"]
    text.write_bytes(b"\xe9t\xe9")
    assert "is not UTF-8: byte 0" in fails([*common, "1200"], capsys)
    text.write_text(" \n")
    assert "The text for the haystack has no words." in fails([*common, "1200"], capsys)


def test_words_run_out(source, tokenizer, monkeypatch):
    few = Source("one two three four five six seven eight nine ten eleven twelve " * 9, {})
    monkeypatch.setattr(Source, "all_words", [f"word{i}" for i in range(60)])
    with pytest.raises(ValueError, match="`cwe` at 3000 tokens needs more than the 60 different words"):
        Generator(few, tokenizer, "plain", 0).make("cwe", 3000, 0)


def test_models_that_cannot(folder, tokenizer, tmp_path, capsys):
    plain = tmp_path / "plain"
    model = MiniCPM4ForCausalLM.from_pretrained(folder)
    model.config.sparse_config = None
    model.save_pretrained(plain)
    tokenizer.save_pretrained(plain)
    (plain / "chat_template.jinja").unlink()
    common = ["--model", str(plain), "--tasks", "vt", "--lengths", str(LENGTH), "--samples", "1"]
    assert "has no sparse attention (its `sparse_config` is null): give settings" in fails(common, capsys)
    wrong = fails([*common, "--modes", "dense", "--format", "chat"], capsys)
    assert "`--format chat` needs a chat template, and the tokenizer of this checkpoint has none" in wrong
    assert main(["ruler", *common, "--modes", "dense"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["settings"]["format"] == "plain"


def test_records_of_others_are_left_alone(folder, tmp_path, capsys):
    output = tmp_path / "r.json"
    common = ["--model", str(folder), "--tasks", "fwe", "--lengths", str(LENGTH), "--samples", "1", "--modes", "dense"]
    common += ["--output", str(output)]
    assert main(["ruler", *common]) == 0
    record = json.loads(output.read_text())
    capsys.readouterr()
    for change, sentence in (
        ({"commit": "0123abc"}, "was measured at commit 0123abc, and this is"),
        ({"benchmark": "speed"}, "is not a record of `ruler`; name another --output."),
        ({"model": {**record["model"], "dtype": "float16"}}, "figures whose model['dtype'] is \"float16\", not"),
        ({"versions": {**record["versions"], "torch": "1.0"}}, "figures whose versions['torch'] is \"1.0\", not"),
    ):
        output.write_text(json.dumps({**record, **change}))
        assert sentence in fails(common, capsys)
    output.write_text("{")
    assert "is not JSON" in fails(common, capsys)


def test_commit_outside_a_checkout(monkeypatch):
    def absent(*arguments, **settings):
        raise FileNotFoundError("git")

    monkeypatch.setattr(record_module.subprocess, "run", absent)
    assert record_module.find_commit() is None


def test_help_names_every_task(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["ruler", "--help"])
    shown = capsys.readouterr().out
    assert stopped.value.code == 0 and all(task in shown for task in TASKS)
    assert shown.count("python -m minicpm4_hf.eval ruler --") == 4
