"""`python -m minicpm4_hf.kernels.bench --op lowbit` at a size that takes no time."""

import json

import pytest
import torch

from minicpm4_hf.kernels.bench import lowbit as bench
from minicpm4_hf.kernels.bench.__main__ import main


def test_tiny_shape(capsys, tmp_path):
    out = tmp_path / "lowbit.json"
    arguments = ["--op", "lowbit", "--device", "cpu", "--shape", bench.TINY, "--group", "64", "--repeats", "2"]
    assert main([*arguments, "--json", str(out)]) == 0
    printed = capsys.readouterr().out
    document = json.loads(printed.splitlines()[-1])
    assert document == json.loads(out.read_text()) and document["op"] == "lowbit"
    result = document["shapes"][bench.TINY]
    rows = {row["name"]: row for row in result["times"]}
    assert {"torch bf16 linear", "torch int4pack_mm", "ours ternary", "ours int4", "ours int8"} <= set(rows)
    assert all(row["median_ms"] > 0 and row["iqr_ms"] >= 0 and row["over_limit"] > 0 for row in rows.values())
    assert rows["torch bf16 linear"]["speedup"] == 1 and rows["ours ternary"]["weight_bytes"] == 64 * (64 + 4 * 4)
    assert all(row["error"] <= row["limit"] for row in result["parity"]) and result["group_size"] == 64
    assert "x bf16 linear" in printed


def test_llama_cpp_computes_with_the_same_weights():
    if reason := bench.ggml.missing_reason():
        pytest.skip(reason)
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    for kind, name in (("ternary", "TQ2_0"), ("int4", "Q4_0")):
        _, held = bench.pack_weight(kind, weight, 256 if kind == "ternary" else 32)
        layers = bench.ggml.GgmlLayers(held, name, 3, 2, 1)
        x = torch.randn(3, 256, generator=torch.Generator().manual_seed(1))
        layers.set_input(x)
        layers.compute()
        expected = x.double() @ held.T
        error = (layers.output() - expected).norm() / expected.norm()
        layers.close()
        assert error < (0.02 if kind == "ternary" else 0.1)  # its inputs have 8 bits; its 4-bit scales end at -8


@pytest.mark.parametrize("fault", [lambda out: out * 1.01, lambda out: out * float("nan")], ids=["wrong", "nan"])
def test_a_wrong_kernel_is_not_timed(fault, monkeypatch):
    real = bench.OURS["ternary"]
    monkeypatch.setitem(bench.OURS, "ternary", lambda *a, **k: fault(real(*a, **k)))
    monkeypatch.setattr(bench, "time_in_turns", lambda *args: pytest.fail("timed"))
    with pytest.raises(RuntimeError, match="ours ternary differs from float64"):
        bench.measure(bench.parse_case(bench.TINY), torch.float32, "cpu", 2)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--shape", "huge"], "--shape huge: it is not OUTPUTSxINPUTS-rROWS"),
        (["--shape", "64x250-r1"], "--shape 64x250-r1: inputs must be a multiple of 256"),
        (["--shape", "64x256-r1", "--group", "96"], "--group must be a power of two from 32 on"),
    ],
    ids=["name", "inputs", "group"],
)
def test_wrong_arguments(arguments, sentence, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--op", "lowbit", *arguments])
    assert stop.value.code == 2 and sentence in capsys.readouterr().err
