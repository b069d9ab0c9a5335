"""`python -m minicpm4_hf.eval speed`: a whole run that is killed and resumed, its parts, and wrong input."""

import json
import math
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from minicpm4_hf import MiniCPM4Config
from minicpm4_hf.eval.__main__ import main
from minicpm4_hf.eval.speed import contestants as contestants_module
from minicpm4_hf.eval.speed import packed_files
from minicpm4_hf.eval.speed.contestants import (
    CONTESTANTS,
    SCORE_BYTES,
    TINY_SHAPE,
    build_model,
    choose_chunk,
    describe_shape,
    estimate_bytes,
    llama_config,
)
from minicpm4_hf.eval.speed.pool import Pool, Worker, WorkerError
from minicpm4_hf.eval.speed.records import Records, sidecar_path
from minicpm4_hf.eval.speed.report import build_document
from minicpm4_hf.eval.speed.schedule import Benchmark, DisagreementError, Settings, Task, order_cells
from minicpm4_hf.eval.speed.torch_engine import TorchEngine, fill_weights_
from minicpm4_hf.eval.speed.weights import make_weight, random_buffer, take

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

ENTRIES = ["ours-sparse", "ours-dense", "llama-sdpa"]
RUN = ["speed", "--preset", "tiny", "--threads", "1", "--dtype", "float32", "--steps", "3", "--rounds", "2"]
RUN += ["--contestants", *ENTRIES, "--prompt", "200", "--depth", "0", "300"]
CELLS = [("prompt", 200), ("decode", 0), ("decode", 300)]


def read_measurements(path):
    """The whole lines with measurements."""
    if not path.exists():
        return []
    lines = [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
    return [line for line in lines if line["kind"] == "measurement"]


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_for(condition, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.005)


@pytest.mark.slow
def test_run_survives_a_kill(tmp_path, capsys):
    output, sidecar = tmp_path / "speed.json", tmp_path / "speed.jsonl"
    # The last one joins when the run is resumed.
    first = [argument for argument in RUN if argument != ENTRIES[-1]]
    command = [sys.executable, "-m", "minicpm4_hf.eval", *first, "--output", str(output)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            wait_for(lambda: read_measurements(sidecar) or process.poll() is not None)
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
            workers = children.read_text().split() if children.exists() else []
        finally:
            process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL and not output.exists()
    wait_for(lambda: not any(map(is_running, workers)), 10)
    kept = read_measurements(sidecar)
    assert 1 <= len(kept) < 12
    with sidecar.open("a") as file:
        file.write('{"kind": "measurement", "contest')  # cut off while it was written

    assert main([*RUN, "--output", str(output)]) == 2
    assert "add --resume to go on with it" in capsys.readouterr().err
    assert main([*RUN, "--seed", "1", "--output", str(output), "--resume"]) == 2
    assert "was made with seed 0, and now it is 1" in capsys.readouterr().err
    assert main([*RUN, "--output", str(output), "--resume"]) == 0
    captured = capsys.readouterr()

    lines = read_measurements(sidecar)
    assert lines[: len(kept)] == kept
    keys = [(line["measure"], line["tokens"], line["round"], line["contestant"]) for line in lines]
    planned = [(*cell, i, name) for cell in CELLS for i in range(2) for name in ENTRIES]
    assert keys[len(kept) :] == [key for key in planned if key not in keys[: len(kept)]]
    assert sorted(keys) == sorted(planned)
    assert captured.err.count("round") == 18 - len(kept) and " left" in captured.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["speed.json", "speed.jsonl"]

    document = json.loads(captured.out.splitlines()[-1])
    assert document == json.loads(output.read_text())
    assert document["machine"]["threads"] == 1 and document["dtype"] == "float32" and not document["left_out"]
    assert document["contestants"]["ours-sparse"]["sparse_backend"]
    assert [(row["contestant"], row["against"]) for row in document["parity"]] == [("ours-sparse", "ours-dense")]
    assert document["parity"][0]["error"] < 1e-5
    assert [(row["tokens"], row["contestant"]) for row in document["prompt"]] == [(200, name) for name in ENTRIES]
    assert document["against"] == ["llama-sdpa"]
    for measure, field in (("prompt", "ttft_s"), ("decode", "step_s")):
        for row in document[measure]:
            own = [line for line in lines if all(line[k] == row[k] for k in ("contestant", "tokens"))]
            own = [line for line in own if line["measure"] == measure]
            seconds = [float(np.median(line["seconds"])) for line in own]
            assert all(len(line["seconds"]) == (1 if measure == "prompt" else 3) for line in own)
            assert row[field] == pytest.approx(np.median(seconds)) and row["rounds"] == 2
            size = row["tokens"] if measure == "prompt" else 1
            assert row["tokens_per_s"] == pytest.approx(np.median([size / value for value in seconds]))
            assert 0 < row["peak_gib"] < 1 and row["tokens_per_s_iqr"] >= 0 and row["ratios"]["llama-sdpa"] > 0
    assert "decode at 300" in captured.out and "x llama-sdpa" in captured.out

    assert main([*RUN, "--output", str(output), "--resume", "--against", "ours-dense"]) == 0
    again = capsys.readouterr()
    assert "round" not in again.err and read_measurements(sidecar) == lines
    assert "x ours-dense" in again.out


def test_low_bit_models_are_packed_once_and_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    arguments = ["speed", "--preset", "tiny", "--rounds", "1", "--steps", "2", "--threads", "1", "--prompt", "200"]
    names, written = ["ours-ternary", "ours-int4"], []
    for _ in range(2):
        assert main([*arguments, "--depth", "0", "150", "--contestants", *names]) == 0
        document = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert [(row["contestant"], row["tokens"]) for row in document["decode"]] == [
            (name, depth) for depth in (150, 0) for name in names
        ]
        files = [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]
        written.append({path: path.stat().st_mtime_ns for path in files})
        assert len(list((tmp_path / "cache" / "minicpm4_hf" / "speed").iterdir())) == 2
    configs = [json.loads(path.read_text()) for path in written[0] if path.name == "config.json"]
    assert sorted(config["quantization_config"]["bits"] for config in configs) == [2, 4]
    assert written[0] == written[1]  # the second run has written nothing


@pytest.mark.slow
def test_low_bit_files_of_llama_cpp_have_the_same_codes(tmp_path, monkeypatch):
    gguf = pytest.importorskip("gguf")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    shape = {**TINY_SHAPE, "hidden_size": 256, "intermediate_size": 256, "head_dim": 32}
    for kind, name in (("ternary", "TQ2_0"), ("int4", "Q4_0")):
        path = packed_files.ensure_gguf(kind, MiniCPM4Config(dim_model_base=64, **shape), 0)
        tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
        assert tensors["blk.0.ffn_up.weight"].tensor_type.name == name
        assert tensors["token_embd.weight"].tensor_type.name == packed_files.EMBEDDING_TYPES[kind].upper()
        model = AutoModelForCausalLM.from_pretrained(path.with_suffix(""), dtype=torch.float32)
        x = torch.eye(256)
        ours = model.model.layers[0].mlp.up_proj(x).T.detach()
        theirs = gguf.dequantize(tensors["blk.0.ffn_up.weight"].data, tensors["blk.0.ffn_up.weight"].tensor_type)
        np.testing.assert_allclose(ours.numpy(), theirs, rtol=1e-6, atol=1e-8)


@pytest.mark.slow
def test_llama_cpp(tmp_path, monkeypatch, capsys):
    pytest.importorskip("llama_cpp")
    pytest.importorskip("gguf")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    arguments = ["speed", "--preset", "tiny", "--threads", "1", "--dtype", "float32", "--steps", "2", "--rounds", "1"]
    arguments += ["--contestants", "llama-sdpa", "llama.cpp", "--prompt", "600", "--depth", "0", "300", "900"]
    assert main(arguments) == 0
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    # The same weights: rotation, grouped heads and tied embeddings are llama.cpp's own.
    assert document["parity"][0]["contestant"] == "llama.cpp" and document["parity"][0]["error"] < 0.01
    rows = {(row["contestant"], row["tokens"]) for row in document["decode"]}
    assert rows == {("llama-sdpa", 0), ("llama-sdpa", 300), ("llama-sdpa", 900), ("llama.cpp", 0), ("llama.cpp", 300)}
    (entry,) = document["left_out"]
    assert (
        entry["contestant"] == "llama.cpp" and entry["tokens"] == 900 and "longest --prompt is 600" in entry["reason"]
    )

    from minicpm4_hf.eval.speed.llama_cpp_engine import LlamaCppEngine

    settings = {"contestant": "llama.cpp", "preset": "tiny", "seed": 0, "threads": 1, "context_tokens": 700}
    engine = LlamaCppEngine(settings)
    for depth in (300, 200, 600):  # evaluated, cut, evaluated on
        assert len(engine.decode(depth, 2)["seconds"]) == 2 and engine.length == depth + 3
    assert [path.suffix for path in (tmp_path / "minicpm4_hf" / "speed").iterdir()] == [".gguf"]


@pytest.mark.parametrize("name", [name for name, entry in CONTESTANTS.items() if entry.engine == "torch"])
def test_every_model_runs(name):
    threads = torch.get_num_threads()
    settings = {
        "device": DEVICE,
        "contestant": name,
        "preset": "tiny",
        "dtype": "float32",
        "seed": 0,
        "threads": threads,
    }
    engine = TorchEngine(settings)
    assert engine.prompt(40, 16)["seconds"][0] > 0
    assert len(engine.decode(150, 2)["seconds"]) == 2
    logits = engine.probe(60)["logits"]
    assert all(map(math.isfinite, logits)) and np.std(logits) > 0.01
    cache = engine._filled_cache(150)
    assert cache.get_seq_length() == 150
    engine._step(torch.tensor([[3]], device=DEVICE), cache)
    assert cache.get_seq_length() == 151
    twin = CONTESTANTS[name].twin
    if twin:
        expected = TorchEngine({**settings, "contestant": twin}).probe(60)["logits"]
        assert np.linalg.norm(np.subtract(logits, expected)) < 1e-5 * np.linalg.norm(expected)


def test_weights_are_exact_in_16_bits_and_tied_once():
    buffer = random_buffer(0)
    weight = make_weight(buffer, "model.layers.0.mlp.up_proj.weight", (300, 200))
    assert weight.std() == pytest.approx(200**-0.5, rel=0.5) and abs(weight.mean()) < 0.01
    for dtype in (torch.bfloat16, torch.float16):
        rounded = torch.from_numpy(weight).to(dtype).float().numpy()
        assert np.abs(rounded - weight).max() < 1e-7
    assert (make_weight(buffer, "model.norm.weight", (8,)) == 1).all()
    assert (take(buffer, len(buffer) + 2, 5) == np.concatenate((buffer[5:], buffer[:7]))).all()
    model = build_model(llama_config("tiny"), torch.float32, "sdpa")
    fill_weights_(model, buffer)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.model.rotary_emb.inv_freq[0] == 1


def make_benchmark(tmp_path=None, *, names=("ours-sparse", "llama-sdpa"), **changes):
    settings = Settings(
        **{
            "contestants": names,
            "prompts": (100,),
            "depths": (0,),
            "rounds": 3,
            "steps": 2,
            "preset": "tiny",
            "dtype": "bfloat16",
            "threads": 1,
            "seed": 0,
            "chunk": None,
            "once_above_s": 60.0,
            "memory_limit": 4 * 1024**3,
            **changes,
        }
    )
    shapes = {name: describe_shape(CONTESTANTS[name].make_config(settings.preset)) for name in names}
    return Benchmark(settings, shapes, Records(tmp_path, {"seed": 0}))


def answer_with(logits=1.0, seconds=0.01):
    """In place of `Benchmark.ask`: no worker, the same answer to everything."""

    def ask(name, measure, tokens, **request):
        if measure == "probe":
            return {"logits": [logits] * 4}
        return {"seconds": [seconds], "peak_bytes": 1}

    return ask


def test_order():
    cells = order_cells((300, 100, 300), (0, 500, 200, 400, 300))
    assert cells[:2] == [("prompt", 100), ("prompt", 300)]
    assert cells[2:] == [("decode", n) for n in (300, 200, 0, 400, 500)]
    benchmark = make_benchmark(names=("llama-sdpa", "llama.cpp"), depths=(0, 200), rounds=2)
    tasks = benchmark.plan()
    assert tasks[:4] == [Task("prompt", 100, i, name) for i in range(2) for name in ("llama-sdpa", "llama.cpp")]
    assert ("llama.cpp", "decode", 200) in benchmark.left_out
    assert Task("decode", 200, 1, "llama-sdpa") in tasks and Task("decode", 200, 1, "llama.cpp") not in tasks


def test_failure_leaves_a_cell_out(monkeypatch):
    benchmark = make_benchmark()
    answer = answer_with()

    def ask(name, measure, tokens, **request):
        if (name, measure) == ("llama-sdpa", "prompt"):
            raise WorkerError("the worker was ended by signal 9 (out of memory?)")
        return answer(name, measure, tokens, **request)

    monkeypatch.setattr(benchmark, "ask", ask)
    benchmark.run()
    document = build_document(benchmark, ["llama-sdpa"], {"llama.cpp": "not installed"})
    assert [row["contestant"] for row in document["prompt"]] == ["ours-sparse"]
    assert document["prompt"][0]["ratios"] == {} and len(document["decode"]) == 2
    assert len(benchmark.records.find("failure")) == 1
    assert document["left_out"][0] == {"contestant": "llama.cpp", "reason": "not installed"}
    assert "out of memory" in document["left_out"][1]["reason"]


def test_figures_of_another_commit_are_not_added_to(monkeypatch):
    benchmark = make_benchmark()
    worker = SimpleNamespace(facts={"commit": "one"}, ask=lambda request: {"seconds": [1.0]})
    monkeypatch.setattr(benchmark.pool, "get", lambda *arguments: worker)
    benchmark.ask("ours-sparse", "prompt", 100)
    assert benchmark.records.find("worker")[0]["facts"] == {"commit": "one"}
    worker.facts = {"commit": "two"}
    with pytest.raises(ValueError, match=r"ours-sparse was measured with commit one, and now it is two: .*--output"):
        benchmark.ask("ours-sparse", "prompt", 100)


def test_slow_measurement_is_not_repeated(monkeypatch):
    benchmark = make_benchmark(once_above_s=-1.0)
    monkeypatch.setattr(benchmark, "ask", answer_with())
    benchmark.run()
    document = build_document(benchmark, ["llama-sdpa"], {})
    assert [row["rounds"] for row in document["prompt"]] == [1, 1]
    assert document["prompt"][0]["tokens_per_s_iqr"] is None
    json.dumps(document, allow_nan=False)


@pytest.mark.parametrize("fault", [1.2, float("nan")], ids=["wrong", "nan"])
def test_no_speed_where_logits_differ(fault, monkeypatch):
    benchmark = make_benchmark(names=("ours-dense", "ours-sparse"))

    def ask(name, measure, tokens, **request):
        assert measure == "probe"
        return answer_with(fault if name == "ours-sparse" else 1.0)(name, measure, tokens)

    monkeypatch.setattr(benchmark, "ask", ask)
    with pytest.raises(DisagreementError, match="ours-sparse differs from ours-dense"):
        benchmark.run()
    assert not benchmark.records.lines


@pytest.mark.parametrize(
    ("error", "code"),
    [(DisagreementError("a differs from b"), 1), (KeyboardInterrupt(), 130)],
    ids=["parity", "ctrl-c"],
)
def test_exit_code(error, code, monkeypatch, capsys):
    def run(self):
        raise error

    monkeypatch.setattr(Benchmark, "run", run)
    assert main(RUN) == code
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err in ("error: a differs from b\n", "stopped\n")


def test_time_left():
    benchmark = make_benchmark(prompts=(8192, 16384), names=("llama-sdpa",), rounds=2, depths=())
    tasks = benchmark.plan()
    assert benchmark.time_left(tasks) == "time left not known yet"
    benchmark.records.add("measurement", **tasks[0].key, wall_s=10.0, seconds=[9.0])
    assert benchmark.time_left(tasks[1:]) == "about 70 s left"  # 10, and 30 twice
    benchmark.records.add("measurement", **tasks[1].key, wall_s=200.0, seconds=[190.0])
    assert benchmark.time_left(tasks[2:]) == "about 10 min left"  # 600 once: too slow to repeat


def test_memory():
    name, gib = "qwen3-0.6b", 1024**3
    shape = describe_shape(CONTESTANTS[name].make_config("MiniCPM4-0.5B"))
    assert shape["num_parameters"] == 596_049_920  # as published: 0.6B, 0.44B of them not embeddings
    cache = 131072 * 28 * 2 * 8 * 128 * 2
    need = estimate_bytes(CONTESTANTS[name], shape, torch.bfloat16, "decode", 131072, 1, 0)
    assert cache + 2 * 596_049_920 < need < 18.5 * gib
    eager = CONTESTANTS["llama-eager"]
    shape = describe_shape(eager.make_config("MiniCPM4-0.5B"))
    assert choose_chunk(CONTESTANTS["llama-sdpa"], shape, 32768, None) == 32768
    assert choose_chunk(CONTESTANTS["llama-sdpa"], shape, 32768, 1000) == 1000
    chunk = choose_chunk(eager, shape, 32768, None)
    assert 64 <= chunk and 12 * 16 * 32768 * chunk <= SCORE_BYTES
    benchmark = make_benchmark(memory_limit=gib)
    with pytest.raises(ValueError, match=r"Nothing can be measured: takes about 1\.0 GiB"):
        benchmark.run()


def test_room_is_made_for_the_largest(monkeypatch):
    class Idle:
        def __init__(self, settings):
            self.name, self.resident_bytes = settings["contestant"], 10

        def end(self):
            self.resident_bytes = 0

    monkeypatch.setattr("minicpm4_hf.eval.speed.pool.Worker", Idle)
    pool = Pool({}, 50)
    for name in ("a", "llama.cpp", "b"):
        pool.get(name, "torch", 30)
    pool.workers["b"].resident_bytes = 15
    pool.get("c", "torch", 30)
    assert list(pool.workers) == ["a", "llama.cpp", "c"]
    pool.get("c", "torch", 35)
    assert list(pool.workers) == ["llama.cpp", "c"]
    pool.end_all()
    assert not pool.workers


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("raise KeyError('none')", "ended with exit code 1: KeyError: 'none'"),
        ("import os; os.kill(os.getpid(), 9)", "was ended by signal 9 (out of memory?)"),
        ("import json; print(json.dumps({'error': 'no such file'}))", "no such file"),
    ],
    ids=["exception", "killed", "answer"],
)
def test_a_worker_that_cannot_start_says_why(code, message, monkeypatch):
    monkeypatch.setattr("minicpm4_hf.eval.speed.pool.COMMAND", [sys.executable, "-c", code])
    with pytest.raises(WorkerError, match=re.escape(message)):
        Worker({"contestant": "llama-sdpa", "threads": 1})


def test_records(tmp_path):
    path = tmp_path / "run.jsonl"
    Records(path, {"seed": 0})
    records = Records(path, {"seed": 0})  # nothing was measured yet
    records.add("measurement", tokens=1)
    assert Records(path, {"seed": 0}, resume=True).find("measurement", tokens=1)
    with pytest.raises(ValueError, match="add --resume"):
        Records(path, {"seed": 0})
    path.write_text("nonsense\n" + path.read_text())
    with pytest.raises(ValueError, match="line 1 is not JSON"):
        Records(path, {"seed": 0}, resume=True)
    assert sidecar_path(Path("a/speed.json")) == Path("a/speed.jsonl")
    assert sidecar_path(Path("a/speed.jsonl")) == Path("a/speed.jsonl.jsonl")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--resume"], "--resume needs the --output"),
        (["--prompt", "--depth"], "--prompt and --depth are both empty"),
        (["--output", "missing/speed.json"], "The folder of 'missing/speed.json' does not exist."),
        (
            ["--against", "llama-eager"],
            "--against llama-eager is not among the --contestants: ours-sparse, ours-dense",
        ),
        (["--preset", "BitCPM-CANN-1B"], "is a Llama model without sparse attention"),
        (["--device", "cuda"], "needs an NVIDIA GPU"),
        (["--memory-limit", "0.5"], "Nothing can be measured: takes about"),
        (["--memory-limit", "0"], "Nothing can be measured: takes about"),
    ],
    ids=lambda value: "=".join(value) if isinstance(value, list) else "",
)
def test_wrong_input(arguments, sentence, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.chdir(tmp_path)
    assert main([*RUN, *arguments]) == 2
    captured = capsys.readouterr()
    assert sentence in captured.err and captured.err.startswith("error: ") and captured.err.count("\n") == 1
    assert captured.out == "" and not list(tmp_path.iterdir())


@pytest.mark.parametrize("flags", [["--contestants", "gpt-2"], ["--depth", "-1"], ["--rounds", "0"]], ids=" ".join)
def test_wrong_flags(flags, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["speed", *flags])
    assert stop.value.code == 2 and "error: " in capsys.readouterr().err


@pytest.mark.parametrize("asked", [["--contestants", "ours-dense", "llama.cpp"], ["--against", "llama.cpp"]])
def test_llama_cpp_not_installed(asked, monkeypatch, capsys):
    monkeypatch.setattr(contestants_module.importlib.util, "find_spec", lambda name: None)
    assert main(["speed", "--preset", "tiny", *asked]) == 2
    captured = capsys.readouterr()
    assert "pip install llama-cpp-python gguf" in captured.err and captured.err.count("\n") == 1


def test_help_has_examples(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["speed", "--help"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in CONTESTANTS) and shown.count("python -m minicpm4_hf.eval speed --") >= 3
