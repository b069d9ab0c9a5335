"""The bench: its registry runs at the tiny shape, its gate closes on a wrong kernel, and its last line is JSON."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from minicpm4_hf.kernels.bench import figures
from minicpm4_hf.kernels.bench.__main__ import bench_shape, main
from minicpm4_hf.kernels.bench.registry import OPS, dense_reference, max_error, measure_parity


def test_every_op_has_a_tiny_shape_and_known_defaults():
    for op in OPS.values():
        assert "tiny" in op.shapes
        assert set(op.default_shapes) <= set(op.shapes)


def test_shapes_are_the_models():
    shapes = OPS["infllm_v2"].shapes
    assert len(shapes) == 1 + 2 * 4 * 2
    small, large = shapes["0.5b-16k-decode"], shapes["8b-32k-prefill"]
    assert (small.num_query_heads, small.num_kv_heads, small.head_dim) == (16, 2, 64)
    assert (small.num_keys, small.num_queries) == (16384, 1)
    assert (large.num_query_heads, large.num_kv_heads, large.head_dim) == (32, 2, 128)
    assert (large.num_keys, large.num_queries) == (32768, 32768)


@pytest.mark.parametrize("num_queries", [1, 203], ids=["decode", "prefill"])
@pytest.mark.parametrize("op", OPS.values(), ids=OPS)
def test_dense_forms_agree(op, num_queries):
    shape = replace(op.shapes["tiny"], num_queries=num_queries)
    inputs = op.make_inputs(shape, torch.float32, "cpu", 0)
    expected = dense_reference(*inputs, torch.float64)
    for name, form in op.dense_forms(shape).items():
        assert max_error(form(*inputs), expected) < 1e-5, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("op", OPS.values(), ids=OPS)
def test_tiny_shape_runs(op, dtype):
    result = bench_shape(op, op.shapes["tiny"], dtype, "cpu", repeats=2)
    assert {row["backend"] for row in result["parity"]} == set(op.backends("cpu"))
    assert {row["name"] for row in result["times"]} > {f"ours {name}" for name in op.backends("cpu")}
    assert all(row["median_ms"] > 0 and row["iqr_ms"] >= 0 for row in result["times"])
    dense = [row["speedup"] for row in result["times"] if not row["name"].startswith("ours")]
    assert max(dense) == pytest.approx(1)
    assert all(rate > 0 for rate in result["ceilings"].values())
    decode = bench_shape(op, replace(op.shapes["tiny"], num_queries=1), dtype, "cpu", repeats=2)
    assert all(row["over_limit"] > 0 for row in decode["times"] if row["name"].startswith("ours"))


def test_tiny_budget_is_sparse():
    op = OPS["infllm_v2"]
    shape = op.shapes["tiny"]
    inputs = op.make_inputs(shape, torch.float32, "cpu", 0)
    assert max_error(op.call(shape, "reference")(*inputs), dense_reference(*inputs, torch.float64)) > 0.1


@pytest.mark.parametrize("fault", [lambda out: out * 1.001, lambda out: out * float("nan")], ids=["wrong", "nan"])
def test_a_wrong_kernel_is_not_timed(fault):
    op = OPS["infllm_v2"]
    shape = op.shapes["tiny"]

    def broken(shape, backend):
        return lambda q, k, v: fault(op.call_covering_all(shape, backend)(q, k, v))

    timed = []
    wrong = replace(op, call_covering_all=broken, call=lambda *args: timed.append)
    error, limit = measure_parity(wrong, shape, "reference", op.make_inputs(shape, torch.float32, "cpu", 0))
    assert error > limit
    with pytest.raises(RuntimeError, match="differs from dense attention"):
        bench_shape(wrong, shape, torch.float32, "cpu", repeats=2)
    assert not timed


def test_command_prints_one_json_document_last(tmp_path):
    out = tmp_path / "speed.json"
    command = [sys.executable, "-m", "minicpm4_hf.kernels.bench", "--op", "infllm_v2", "--shape", "tiny"]
    run = subprocess.run(
        [*command, "--repeats", "2", "--json", str(out)], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    document = json.loads(run.stdout.splitlines()[-1])
    assert document == json.loads(out.read_text())
    assert document["op"] == "infllm_v2" and document["dtype"] == "bfloat16" and document["repeats"] == 2
    assert document["machine"]["threads"] >= 1
    assert "median ms" in run.stdout and "spread ms" in run.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["speed.json"]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--op", "infllm_v2", "--shape", "huge"], "--shape huge is not one of tiny"),
        (["--op", "infllm_v2", "--repeats", "1"], "--repeats must be at least 2, got 1"),
        (["--op", "infllm_v2", "--json", "missing/speed.json"], "its folder does not exist"),
        (["--op", "matmul"], "invalid choice: 'matmul'"),
    ],
    ids=["shape", "repeats", "json", "op"],
)
def test_wrong_arguments(arguments, sentence, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert sentence in capsys.readouterr().err


def test_figures_in_the_readme_are_those_of_the_records(tmp_path, capsys):
    root = Path(__file__).parents[2]
    for readme in figures.READMES:
        assert figures.render(root, readme) == (root / readme).read_text(encoding="utf-8"), readme
    assert figures.main(["--root", str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith("figures: ")
