"""Fine-tuning on chats: what has a loss, that packing changes nothing, that a kill loses nothing, what is refused."""

import importlib.util
import json
import os
import random
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from small_models import SMALL_SPARSE, build_model
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from minicpm4_cli import main
from minicpm4_hf.training.tokenizer import CHAT_TEMPLATE, train_tokenizer
from minicpm4_hf.training.trainer import read_log

HAS_TRL = importlib.util.find_spec("trl") is not None
needs_trl = pytest.mark.skipif(not HAS_TRL, reason="TRL is not installed: pip install minicpm4-hf[sft]")
if HAS_TRL:
    import datasets
    import pyarrow.parquet
    from peft import PeftModel
    from trl import SFTConfig, SFTTrainer, pack_dataset

    from minicpm4_hf.training.schedule import WSDSettings
    from minicpm4_hf.training.sft import MiniCPM4SFTTrainer, SFTSettings, encode_chat, fine_tune, load_chats

WORDS = "the quick brown fox jumps over a lazy dog while seven wizards box quietly and sing of home".split()
# The template of the published checkpoints, which has no marks.
OFFICIAL_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def chat(seed: int, turns: int = 2) -> dict:
    rng = random.Random(seed)
    messages = []
    for _ in range(turns):
        messages.append({"role": "user", "content": " ".join(rng.choices(WORDS, k=rng.randint(2, 9)))})
        messages.append({"role": "assistant", "content": " ".join(rng.choices(WORDS, k=rng.randint(2, 15)))})
    return {"messages": messages}


def talk(*messages) -> dict:
    return {"messages": [{"role": role, "content": content} for role, content in messages]}


def write_jsonl(path, rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="module")
def tokenizer():
    rng = random.Random(0)
    return train_tokenizer([" ".join(rng.choices(WORDS, k=4000)) + "\n" * 30], vocab_size=400)


@pytest.fixture(scope="module")
def base(tmp_path_factory, tokenizer):
    """A folder with a random model of 32 dimensions and its tokenizer."""
    folder = tmp_path_factory.mktemp("base")
    sizes = {"hidden_size": 32, "intermediate_size": 48, "dim_model_base": 16, "max_position_embeddings": 512}
    special = {"eos_token_id": 2, "pad_token_id": 2}
    model = build_model(2, heads=1, sparse=None, vocab_size=len(tokenizer), initializer_range=0.1, **sizes, **special)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "eos_token": "</s>"}))
    return folder


@pytest.fixture
def settings(base, tmp_path):
    """`settings(rows, **changes)`: a short run on these chats."""

    def make(rows, **changes):
        data = write_jsonl(tmp_path / "chats.jsonl", rows)
        options = {"model": str(base), "data": [data], "output": str(tmp_path / "run"), "length": 128, "batch": 2}
        return SFTSettings(**{**options, **changes})

    return make


def losses(folder, key="loss") -> list[tuple[int, float]]:
    return [(record["step"], record[key]) for record in read_log(folder) if key in record]


def scored_loss(model, tokenizer, rows) -> float:
    """The mean loss of the labelled tokens by the model's own logits, each chat by itself."""
    total, count = 0.0, 0
    for row in rows:
        ids, labels = (torch.tensor(part) for part in encode_chat(tokenizer, row))
        with torch.no_grad():
            log_probs = model(ids[None], use_cache=False).logits[0, :-1].double().log_softmax(-1)
        for place, label in enumerate(labels[1:].tolist()):
            if label != -100:
                total, count = total - log_probs[place, label].item(), count + 1
    return total / count


def test_without_trl_the_extra_is_named(monkeypatch, capsys, base):
    monkeypatch.setitem(sys.modules, "trl", None)
    monkeypatch.delitem(sys.modules, "minicpm4_hf.training.sft", raising=False)
    assert main(["sft", "--model", str(base), "--data", "chats.jsonl", "--output", "run"]) == 2
    error = capsys.readouterr().err
    if HAS_TRL:
        assert "needs trl; it comes with `pip install minicpm4-hf[sft]`" in error
    assert error.count("\n") == 1 and "minicpm4-hf[sft]" in error


def test_the_marks_change_no_text(tokenizer):
    chats = [chat(1), talk(("system", "be brief"), ("user", "a\n"), ("assistant", ""), ("tool", "{}"), ("user", "é"))]
    for messages in (row["messages"] for row in chats):
        for prompt in (False, True):
            one, other = (
                tokenizer.apply_chat_template(messages, chat_template=t, add_generation_prompt=prompt, tokenize=False)
                for t in (CHAT_TEMPLATE, OFFICIAL_TEMPLATE)
            )
            assert one == other


MIXED = talk(
    ("system", "be brief"),
    ("user", "the quick fox?"),
    ("assistant", "jumps over — 🦊 \u2581 a dog"),
    ("tool", "assistant says <b>"),
    ("assistant", " sing"),
    ("user", "more"),
    ("assistant", ""),
)


@needs_trl
@pytest.mark.parametrize("template", [CHAT_TEMPLATE, OFFICIAL_TEMPLATE], ids=["marked", "official"])
def test_labels_are_what_the_assistant_writes(base, template):
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = template
    ids, labels = encode_chat(tokenizer, MIXED)

    text, spans = "", []
    for message in MIXED["messages"]:
        text += f"<|im_start|>{message['role']}\n"
        if message["role"] == "assistant":
            spans.append((len(text), len(text) + len(message["content"] + "<|im_end|>")))
        text += message["content"] + "<|im_end|>\n"
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    assert ids == encoded.input_ids
    expected = [
        token if any(begin <= first and last <= end for begin, end in spans) else -100
        for token, (first, last) in zip(ids, encoded.offset_mapping)
    ]
    assert labels == expected
    written = tokenizer.decode([label for label in labels if label != -100])
    assert written == "jumps over — 🦊 \u2581 a dog<|im_end|> sing<|im_end|><|im_end|>"


@needs_trl
def test_labels_are_those_of_trl(base, tmp_path):
    rows = [chat(seed) for seed in range(5)]
    tokenizer = AutoTokenizer.from_pretrained(base)
    options = {"assistant_only_loss": True, "packing": True, "max_length": 128, "bf16": False, "use_cpu": True}
    theirs = SFTTrainer(
        AutoModelForCausalLM.from_pretrained(base),
        SFTConfig(str(tmp_path), report_to="none", gradient_checkpointing=None, **options),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tokenizer,
    ).train_dataset
    ours = pack_dataset(load_chats([write_jsonl(tmp_path / "c.jsonl", rows)], tokenizer, length=128), 128)
    assert ours["input_ids"] == theirs["input_ids"] and ours["seq_lengths"] == theirs["seq_lengths"]
    assert ours["labels"] == theirs["labels"]


@needs_trl
@pytest.mark.parametrize("sparse", [None, SMALL_SPARSE], ids=["dense", "sparse"])
def test_packed_rows_have_the_loss_of_their_chats(tokenizer, tmp_path, sparse):
    rows = [chat(1, turns=8), chat(2, turns=1), chat(3, turns=4)]
    data = load_chats([write_jsonl(tmp_path / "chats.jsonl", rows)], tokenizer, length=1024)
    packed = pack_dataset(data, 1024)
    assert packed["seq_lengths"] == [sorted(map(len, data["input_ids"]), reverse=True)]
    model = build_model(2, heads=1, sparse=sparse, vocab_size=len(tokenizer))
    trainer = MiniCPM4SFTTrainer(
        model,
        trl_config(tmp_path),
        train_dataset=packed,
        processing_class=tokenizer,
        schedule=WSDSettings(num_warmup_steps=0),
    )
    batch = trainer.data_collator([packed[0]])
    with torch.no_grad():
        loss = trainer.compute_loss(model, dict(batch)).item()
        merged = {**batch, "position_ids": torch.arange(batch["input_ids"].shape[1])[None]}
        without_borders = trainer.compute_loss(model, merged).item()
    expected = scored_loss(model, tokenizer, rows)
    assert loss == pytest.approx(expected, rel=3e-6)
    assert abs(without_borders - expected) > 1e-4


def trl_config(folder, **changes):
    options = {"packing": True, "max_length": 1024, "dataset_kwargs": {"skip_prepare_dataset": True}, "bf16": False}
    options |= {"use_cpu": True, "report_to": "none", "gradient_checkpointing": None, "learning_rate": 0.01}
    return SFTConfig(str(folder), **{**options, "weight_decay": 0.1, **changes})


@needs_trl
def test_learning_rates_are_mups_and_adapters_have_one(tokenizer, tmp_path):
    from peft import LoraConfig

    data = load_chats([write_jsonl(tmp_path / "chats.jsonl", [chat(1)])], tokenizer, length=1024)

    def groups(**changes):
        model = build_model(2, heads=1, sparse=None, vocab_size=len(tokenizer), tie_word_embeddings=True)
        trainer = MiniCPM4SFTTrainer(
            model,
            trl_config(tmp_path),
            train_dataset=pack_dataset(data, 1024),
            processing_class=tokenizer,
            schedule=WSDSettings(num_warmup_steps=0),
            **changes,
        )
        optimizer = trainer.create_optimizer()
        rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
        return {name: rates[id(p)] for name, p in trainer.model.named_parameters() if id(p) in rates}

    rates = groups()
    assert rates["model.embed_tokens.weight"] == rates["model.norm.weight"] == 0.01
    assert rates["model.layers.0.mlp.up_proj.weight"] == 0.01 / (64 / 32)
    adapters = groups(peft_config=LoraConfig(r=2, target_modules="all-linear"))
    assert len(adapters) == 2 * 7 * 2 and set(adapters.values()) == {0.01}
    assert all("lora_" in name and "lm_head" not in name for name in adapters)


@needs_trl
def test_two_chats_are_learned_by_heart(settings, tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("nothing of a run is told to anybody")

    monkeypatch.setattr("trl.trainer.base_trainer.send_telemetry", refuse)
    monkeypatch.setattr("minicpm4_hf.training.sft.POINTS", 2)
    pairs = [("the fox", "jumps over a lazy dog"), ("a dog", "box")]
    rows = [talk(("user", asked), ("assistant", answer)) for asked, answer in pairs]
    options = {"num_steps": 60, "learning_rate": 0.02, "batch": 1}
    result = fine_tune(settings(rows, held_out=[write_jsonl(tmp_path / "held.jsonl", rows)], **options))
    assert result["last_loss"] < 0.05 and result["held_out_loss"] < 0.05 < 4 < result["held_out_loss_before"]
    assert result["steps"] == 60 and result["chats"] == 2 and result["adapter"] is None
    model = AutoModelForCausalLM.from_pretrained(result["model"], dtype="auto")
    assert model.config.use_cache
    tokenizer = AutoTokenizer.from_pretrained(result["model"])
    assert model.dtype == torch.bfloat16
    for asked, answer in pairs:
        messages = talk(("user", asked))["messages"]
        prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")
        output = model.generate(**prompt, max_new_tokens=40, do_sample=False)
        # it stops by itself, at a token that neither the base model nor its tokenizer had as an end
        assert tokenizer.decode(output[0, prompt["input_ids"].shape[1] :]) == answer + "<|im_end|>"
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [
        "checkpoint-60", "log.jsonl", "model", "result.json", "run.json",
    ]  # fmt: skip
    assert not list((tmp_path / "run" / "model").glob("*.bin"))


@needs_trl
def test_held_out_loss_is_the_mean_over_tokens(settings, base, tokenizer, tmp_path):
    held = [chat(seed, turns) for seed, turns in ((50, 1), (51, 4), (52, 2), (53, 1))]
    folder = tmp_path / "held"
    folder.mkdir()
    source = [write_jsonl(folder / "held.jsonl", held)]
    result = fine_tune(settings([chat(1), chat(2)], num_steps=2, held_out=source, length=256))
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    assert result["held_out_loss_before"] == pytest.approx(scored_loss(model, tokenizer, held), rel=1e-5)
    evaluated = losses(tmp_path / "run", "eval_loss")
    assert [step for step, _ in evaluated] == [0, 1, 2] and evaluated[-1][1] == result["held_out_loss"]


@needs_trl
def test_lora_trains_adapters_alone(settings, base, tmp_path):
    result = fine_tune(settings([chat(seed) for seed in range(4)], num_steps=4, lora_rank=4, learning_rate=0.05))
    before, after = load_file(base / "model.safetensors"), load_file(tmp_path / "run" / "model" / "model.safetensors")
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name].bfloat16(), after[name])}
    assert changed and all("_proj" in name for name in changed) and len(changed) == 2 * 7
    adapter = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    assert len(adapter) == 2 * 7 * 2 and all("lora_" in name for name in adapter)
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    merged = PeftModel.from_pretrained(plain, result["adapter"]).merge_and_unload()
    loaded = AutoModelForCausalLM.from_pretrained(result["model"]).state_dict()
    assert all(torch.equal(loaded[name], weight.bfloat16()) for name, weight in merged.state_dict().items())


@needs_trl
def test_interrupted_and_resumed_is_the_run_never_interrupted(settings, tmp_path, monkeypatch):
    rows = [chat(seed) for seed in range(8)]
    options = {"num_steps": 8, "lora_rank": 2, "held_out": [write_jsonl(tmp_path / "h.jsonl", [chat(9)])]}
    whole = fine_tune(settings(rows, output=str(tmp_path / "whole"), **options))
    step = MiniCPM4SFTTrainer.training_step

    def interrupted(self, *args, **kwargs):
        if self.state.global_step == 5:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(MiniCPM4SFTTrainer, "training_step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            fine_tune(settings(rows, **options))
    resumed = fine_tune(settings(rows, **options), resume=True)
    for key in ("loss", "eval_loss"):
        assert losses(tmp_path / "run", key) == losses(tmp_path / "whole", key)
    same = ("last_loss", "held_out_loss_before", "held_out_loss", "steps", "chats")
    assert [resumed[name] for name in same] == [whole[name] for name in same]
    one, other = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("run", "whole"))
    assert all(torch.equal(one[name], other[name]) for name in other)
    # cut off after the last checkpoint, then finished, then asked for once more
    (tmp_path / "run" / "result.json").unlink()
    shutil.rmtree(tmp_path / "run" / "model")
    again = fine_tune(settings(rows, **options), resume=True)
    assert again["held_out_loss"] == whole["held_out_loss"] and (tmp_path / "run" / "model").is_dir()
    assert {**fine_tune(settings(rows, **options), resume=True), "seconds": 0} == {**again, "seconds": 0}


KILLED_RUN = """
import os, signal, sys
from minicpm4_cli import main
from minicpm4_hf.training.sft import MiniCPM4SFTTrainer

real = MiniCPM4SFTTrainer.training_step

def training_step(self, *args, **kwargs):
    if self.state.global_step == 4:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(self, *args, **kwargs)

MiniCPM4SFTTrainer.training_step = training_step
main(["sft", *sys.argv[1:]])
"""


@needs_trl
def test_the_command_killed_and_resumed(base, tmp_path):
    data = write_jsonl(tmp_path / "chats.jsonl", [chat(seed) for seed in range(12)])
    flags = ["--model", str(base), "--data", data, "--held-out", write_jsonl(tmp_path / "h.jsonl", [chat(20)])]
    flags += ["--length", "128", "--batch", "4", "--epochs", "2", "--json"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # another number of threads adds in another order

    def run(*arguments):
        return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=environment)

    command = ["-m", "minicpm4_cli", "sft", *flags, "--output"]
    done = run(*command, str(tmp_path / "whole"))
    assert done.returncode == 0, done.stderr
    whole = json.loads(done.stdout)
    assert "12 chats, " in done.stderr and "parameters learn" in done.stderr
    assert run("-c", KILLED_RUN, *flags, "--output", str(tmp_path / "run")).returncode == -signal.SIGKILL
    done = run(*command, str(tmp_path / "run"), "--resume")
    assert done.returncode == 0, done.stderr
    assert "going on after step 4" in done.stderr
    resumed = json.loads(done.stdout)
    assert losses(tmp_path / "run") == losses(tmp_path / "whole") and len(losses(tmp_path / "run")) == whole["steps"]
    for name in ("last_loss", "held_out_loss_before", "held_out_loss"):
        assert resumed[name] == whole[name]


@needs_trl
def test_sources_give_the_same_chats(tokenizer, tmp_path, monkeypatch, capsys):
    rows = [chat(1), {**MIXED, "tools": None}, chat(2)]
    jsonl = write_jsonl(tmp_path / "a.jsonl", rows)
    table = datasets.Dataset.from_list(rows)  # fills what a row lacks with None
    pyarrow.parquet.write_table(table.data.table, tmp_path / "b.parquet")
    (tmp_path / "notes.txt").write_text("no chat")
    monkeypatch.setattr(datasets, "load_dataset", lambda name, *args, **options: iter(table))
    expected = load_chats([jsonl], tokenizer, length=512)
    for source in (str(tmp_path / "b.parquet"), "hub:someone/chats"):
        other = load_chats([source], tokenizer, length=512)
        assert other["input_ids"] == expected["input_ids"] and other["labels"] == expected["labels"]
    assert len(load_chats([str(tmp_path)], tokenizer, length=512)) == 6
    assert len(load_chats([str(tmp_path)], tokenizer, length=512, without=[jsonl])) == 3
    capsys.readouterr()
    shorter = load_chats([jsonl], tokenizer, length=30)
    assert max(map(len, shorter["input_ids"])) == 30 and all(set(row) != {-100} for row in shorter["labels"])
    assert "of 3 chats in" in capsys.readouterr().err


TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}
SHOWS_TOOLS = (
    "{% if tools %}{% for tool in tools %}{{ tool | tojson }}{% endfor %}{% endif %}{% for m in messages %}"
    "{{ m.role }}:{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% for c in m.tool_calls or [] %}"
    "{{ c | tojson }}{% endfor %}<|im_end|>{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}"
)


@needs_trl
def test_tools_are_rendered_or_refused(base):
    tokenizer = AutoTokenizer.from_pretrained(base)
    row = chat(1)
    with pytest.raises(ValueError, match="leaves 'tools' out of the text; describe them in the system message"):
        encode_chat(tokenizer, {**row, "tools": [TOOL]})
    called = {"messages": [row["messages"][0], {**row["messages"][1], "tool_calls": [TOOL]}]}
    with pytest.raises(ValueError, match="leaves 'tool_calls' out of the text; write them into the content"):
        encode_chat(tokenizer, called)
    tokenizer.chat_template = SHOWS_TOOLS
    ids, labels = encode_chat(tokenizer, {**called, "tools": [TOOL]})
    assert tokenizer.decode(ids).startswith('{"type": "function"')
    written = tokenizer.decode([label for label in labels if label != -100])
    assert written.startswith(row["messages"][1]["content"] + '{"type"') and written.endswith("<|im_end|>")


def says(reply="b", role="assistant", **extra):
    return {"messages": [{"role": "user", "content": "a"}, {"role": role, "content": reply}], **extra}


BAD_CHATS = [
    ({"text": "a"}, r"line 2: there is no field 'messages' (only text); a chat is"),
    ({"messages": []}, "line 2: 'messages' must be a list of at least one message"),
    (says(role="gpt"), "line 2: the role of message 2 must be one of system, user, assistant, tool, got 'gpt'"),
    ({"messages": ["hello"]}, "line 2: the role of message 1 must be one of"),
    (says(reply=[{"type": "text", "text": "b"}]), "line 2: the content of message 2 must be text, got list"),
    (says(reply=None), "line 2: the content of message 2 must be text, got NoneType"),
    (says(reply="\ud800"), "line 2: message 2 holds half of a surrogate pair"),
    (says(role="user"), "line 2: no message is the assistant's"),
    (says(tools="[{"), "line 2: 'tools' is not JSON"),
    (says(tools={"name": "add"}), "line 2: 'tools' must be a list of schemas, got dict"),
    (says(tools=[TOOL]), "line 2: the chat template leaves 'tools' out"),
    ([says()], "line 2: there is no field 'messages' (only none)"),
]


@needs_trl
@pytest.mark.parametrize(("row", "message"), BAD_CHATS)
def test_a_bad_chat_is_named(base, tmp_path, capsys, row, message):
    data = write_jsonl(tmp_path / "chats.jsonl", [says(), row])
    assert main(["sft", "--model", str(base), "--data", data, "--output", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "run").exists()


def leave_out_the_template(folder):
    (folder / "chat_template.jinja").unlink()


def set_template(text):
    return lambda folder: (folder / "chat_template.jinja").write_text(text)


OTHER_TEMPLATE = OFFICIAL_TEMPLATE.replace("<|im_start|>", "### ")
BAD_TEMPLATES = [
    (leave_out_the_template, "The tokenizer has no chat template; put the chat_template.jinja"),
    (
        set_template(OTHER_TEMPLATE),
        "line 1: the tokenizer's chat template has no generation marks, and",
    ),
    (set_template("{{ raise_exception('no') }}"), "line 1: the chat template fails on it (no)"),
    (set_template("a{% generation %}{% endgeneration %}"), "line 1: only 0 of the assistant's 1 messages have tokens"),
]


@needs_trl
@pytest.mark.parametrize(("change", "message"), BAD_TEMPLATES)
def test_a_template_that_cannot_be_trained_on(base, tmp_path, capsys, change, message):
    shutil.copytree(base, tmp_path / "model")
    change(tmp_path / "model")
    data = write_jsonl(tmp_path / "chats.jsonl", [says()])
    command = ["sft", "--model", str(tmp_path / "model"), "--data", data, "--output", str(tmp_path / "run")]
    assert main(command) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


@needs_trl
def test_what_does_not_fit_is_named(base, tmp_path, capsys):
    data = write_jsonl(tmp_path / "chats.jsonl", [says(), says("c")])

    def error_of(*flags, data=data):
        flags = ["--model", str(base), "--data", data, "--output", str(tmp_path / "run"), "--steps", "1", *flags]
        assert main(["sft", *flags]) == 2
        return capsys.readouterr().err.splitlines()[-1]

    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "cut.jsonl").write_text('{"messages": [')
    (tmp_path / "latin.jsonl").write_bytes(b'{"messages": "\xe9"}')
    (tmp_path / "chats.csv").write_text("a,b")
    (tmp_path / "broken.parquet").write_text("PAR1")
    (tmp_path / "folder").mkdir()
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a"]}), tmp_path / "text.parquet")
    for name, message in (
        ("empty.jsonl", "There is no chat in"),
        ("cut.jsonl", "line 1: not JSON"),
        ("latin.jsonl", "line 1: not JSON ('utf-8' codec"),
        ("chats.csv", "ends in '.csv'; chats are read from .jsonl and .parquet"),
        ("broken.parquet", "is not a whole .parquet file"),
        ("text.parquet", "there is no field 'messages' (only text)"),
        ("absent.jsonl", "There is no file or folder"),
        ("folder", "holds no file that ends in"),
    ):
        assert message in error_of(data=str(tmp_path / name))
    assert "has a token of the assistant in its first 3; raise `length`" in error_of("--length", "3")
    assert "`length` must be at least 2, got 1" in error_of("--length", "1")
    assert "`learning_rate` must be a number greater than 0, got -1.0" in error_of("--learning-rate", "-1")
    assert "nothing in" in error_of("--held-out", data)
    assert "`length` must be at most the model's context of 512 tokens, got 513" in error_of("--length", "513")
    assert not (tmp_path / "run").exists()  # a slip does not take the folder

    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "diary.txt").write_text("dear diary")
    assert "is not empty and holds no such run" in error_of()
    shutil.rmtree(tmp_path / "run")
    assert main(["sft", "--model", str(base), "--data", data, "--output", str(tmp_path / "run"), "--steps", "1"]) == 0
    told = capsys.readouterr()
    assert told.out.startswith("1 steps on 2 chats, loss ") and "fill only 1 rows of 512 tokens" in told.err
    assert "already holds a run: go on with `--resume`" in error_of()
    assert "holds a run with another `batch` (8, now 2)" in error_of("--resume", "--batch", "2")
    write_jsonl(tmp_path / "chats.jsonl", [says("d")])
    assert "holds a run with another `data`; choose" in error_of("--resume")


@needs_trl
def test_settings_are_checked(settings):
    with pytest.raises(ValueError, match="`num_epochs` or `num_steps`, not both"):
        settings([chat(1)], num_epochs=1, num_steps=1)
    assert settings([chat(1)]).num_epochs == 3 and settings([chat(1)], lora_rank=1).learning_rate == 2e-4
    with pytest.raises(ValueError, match="`lora_rank` must be at least 1, got 0"):
        settings([chat(1)], lora_rank=0)


@needs_trl
def test_a_model_that_does_not_fit_is_named(settings, monkeypatch):
    llama = LlamaForCausalLM(LlamaConfig(vocab_size=400, hidden_size=16, num_hidden_layers=1, num_attention_heads=1))
    with pytest.raises(ValueError, match="is a llama model; this trains MiniCPM4"):
        fine_tune(settings([chat(1)]), load_model=lambda dtype: llama)
    with pytest.raises(ValueError, match="The tokenizer has 400 tokens, but the model only 97"):
        fine_tune(settings([chat(1)]), load_model=lambda dtype: build_model())
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ValueError, match="`batch` must be a multiple of the 3 processes, got 2"):
        fine_tune(settings([chat(1)]))


@needs_trl
def test_a_head_for_the_second_token_is_left_out_and_said_so(settings, base, tmp_path, capsys):
    AutoModelForCausalLM.from_pretrained(base).add_mtp_head_().save_pretrained(tmp_path / "with-head")
    tokenizer = AutoTokenizer.from_pretrained(base)
    changes = {"model": str(tmp_path / "with-head"), "num_steps": 1}
    result = fine_tune(settings([chat(1)], **changes), tokenizer=tokenizer)
    assert "head for multi-token prediction is not trained and will not be in the result" in capsys.readouterr().err
    assert not any(name.startswith("mtp") for name in load_file(result["model"] + "/model.safetensors"))
    assert AutoModelForCausalLM.from_pretrained(result["model"]).config.num_mtp_layers is None


@needs_trl
def test_a_loss_that_is_not_finite_stops(settings, monkeypatch):
    compute = MiniCPM4SFTTrainer.compute_loss

    def broken(self, *args, **kwargs):
        return compute(self, *args, **kwargs) * (float("nan") if self.state.global_step == 1 else 1)

    monkeypatch.setattr(MiniCPM4SFTTrainer, "compute_loss", broken)
    with pytest.raises(ValueError, match="The loss is nan at step 2"):
        fine_tune(settings([chat(seed) for seed in range(4)], num_steps=3))
