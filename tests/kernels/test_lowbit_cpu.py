"""Native products of packed weights: against float64 over what the codes stand for, at odd sizes and every layout."""

import json
import os
import subprocess
import sys
from pathlib import Path

import packed_weights
import pytest
import torch
from packed_weights import OPERATIONS, make_packed, make_rows

from minicpm4_hf.kernels import lowbit
from minicpm4_hf.kernels.cpu import isa_names, load_library, why_missing
from minicpm4_hf.kernels.cpu.linear import linear
from minicpm4_hf.kernels.cpu.packed import int4_weight, int8_weight, ternary_weight

pytestmark = pytest.mark.skipif(why_missing() is not None, reason=str(why_missing()))
ROOT = Path(__file__).parents[2]
KINDS = pytest.mark.parametrize("kind", OPERATIONS)
DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16], ids=lambda d: str(d)[6:])
MAKE = {"ternary": ternary_weight, "int4": int4_weight, "int8": int8_weight}


def assert_exact(out, x, packed):
    packed_weights.assert_exact(out, x, packed, rounds_inputs=load_library().isa in ("amx", "avx512_bf16"))


def run(packed, x, backend="cpu"):
    return getattr(lowbit, OPERATIONS[packed.kind])(x, *packed.tensors, backend=backend)


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@DTYPES
@KINDS
@pytest.mark.parametrize("rows", [1, 2, 5, 7, 8, 9, 64, 65, 300], ids=lambda m: f"M{m}")
def test_sizes(kind, dtype, rows, poisoned_empty):
    smallest = {"ternary": 4, "int4": 8, "int8": 1}[kind]
    for columns in (smallest, 3 * smallest, 256, 264, 1032):
        for outputs in (1, 7, 16, 33, 130):
            packed = make_packed(kind, outputs, columns, -1, seed=columns + outputs)
            x = make_rows(rows, columns, dtype)
            assert_exact(run(packed, x), x, packed)


@DTYPES
@KINDS
@pytest.mark.parametrize("group_size", [-1, 256, 128, 64, 32, 16], ids=lambda g: f"g{g}")
def test_groups(kind, dtype, group_size):
    for scale_dtype in (torch.float32, torch.bfloat16, torch.float16):
        packed = make_packed(kind, 70, 768, group_size, scale_dtype=scale_dtype)
        for rows in (1, 6, 19):
            x = make_rows(rows, 768, dtype, seed=rows)
            assert_exact(run(packed, x), x, packed)


@DTYPES
@pytest.mark.parametrize("group_size", [-1, 8, 24, 120], ids=lambda g: f"g{g}")
@pytest.mark.parametrize("act_order", [False, True], ids=["in-order", "act-order"])
def test_groups_of_gptq(dtype, group_size, act_order):
    packed = make_packed("int4", 72, 360, group_size, scale_dtype=torch.float16, act_order=act_order)
    for rows in (1, 4, 8, 20):
        x = make_rows(rows, 360, dtype)
        assert_exact(run(packed, x), x, packed)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("columns", [64, 600])
def test_inputs_that_are_not_finite_do_not_vanish(columns, bad):
    packed = make_packed("ternary", 9, columns, -1)
    x = make_rows(3, columns, torch.bfloat16)
    clean = run(packed, x)
    x[1, columns - 3] = bad
    out = run(packed, x)
    assert (~out[1].isfinite() | (packed.weight[:, columns - 3] == 0)).all()
    assert torch.equal(out[[0, 2]], clean[[0, 2]])


def test_small_and_large_inputs_keep_their_digits():
    """A million beside ones, tiny and huge numbers: 16 neighbours share what they are rounded to."""
    packed = make_packed("ternary", 33, 512, 128)
    for scale in (1e-30, 1.0, 1e30):
        x = make_rows(2, 512, torch.float32) * scale
        x[0, 100] *= 1e6
        x = x.bfloat16()
        assert_exact(run(packed, x), x, packed)


@KINDS
def test_rows_of_no_row(kind):
    packed = make_packed(kind, 24, 32, -1)
    assert run(packed, torch.zeros(0, 32)).shape == (0, 24)
    assert run(packed, torch.zeros(2, 0, 32, dtype=torch.bfloat16)).shape == (2, 0, 24)


@KINDS
@pytest.mark.parametrize("rows", [6, 18], ids=lambda m: f"M{m}")
def test_any_layout_of_the_rows(kind, rows):
    packed = make_packed(kind, 50, 320, 32 if kind != "int8" else -1)
    for dtype in (torch.bfloat16, torch.float32):
        x = make_rows(rows, 320, dtype)
        expected = run(packed, x)
        wide = x.new_full((rows, 325), torch.nan)
        wide[:, 5:] = x
        spread = x.new_full((2 * rows, 640), torch.nan)[1::2, ::2]
        spread.copy_(x)
        for same in (wide[:, 5:], spread, x.T.contiguous().T, x.view(2, -1, 320)):
            assert torch.equal(run(packed, same).reshape(rows, -1), expected)
        assert torch.equal(run(packed, x[:1].expand(4, -1)), run(packed, x[:1].repeat(4, 1)))


@KINDS
@pytest.mark.parametrize("rows", [1, 3, 8, 9, 70], ids=lambda m: f"M{m}")
def test_same_every_time_and_with_any_number_of_threads(kind, rows, threads):
    packed = make_packed(kind, 1000, 512, -1 if kind == "int8" else 64)
    results = []
    for dtype in (torch.bfloat16, torch.float32):
        x = make_rows(rows, 512, dtype)
        for count in (1, 1, 2, 5):
            threads(count)
            results.append(run(packed, x))
        assert all(torch.equal(result, results[-4]) for result in results[-3:])


@KINDS
@pytest.mark.parametrize("rows", [2, 12], ids=lambda m: f"M{m}")
def test_rows_do_not_see_each_other(kind, rows, poisoned_empty):
    packed = make_packed(kind, 70, 96, -1)
    x = make_rows(rows, 96, torch.bfloat16)
    x[0] = torch.nan
    out = run(packed, x)
    assert out[0].isnan().all() and out[1:].isfinite().all()


def test_damaged_codes_read_no_other_memory():
    """The bit pattern 3 stands for no code; it is computed with as 2, as the reference does."""
    packed = make_packed("ternary", 16, 64, -1)
    weight = torch.full_like(packed.tensors[0], 255)
    x = make_rows(3, 64, torch.float32)
    torch.testing.assert_close(
        lowbit.ternary_linear(x, weight, packed.tensors[1], backend="cpu"),
        2 * x.sum(-1, keepdim=True) * packed.tensors[1].T,
    )


@pytest.mark.parametrize("rows", [1, 4, 8, 9, 40], ids=lambda m: f"M{m}")
@pytest.mark.parametrize("kind", ["ternary", "int4"])
def test_what_stands_around_is_the_same_as_around_bfloat16(kind, rows):
    """Weights that bfloat16 holds exactly, so that the packed layer must round as the dense one."""
    torch.manual_seed(rows)
    packed = [make_packed(kind, n, 256, -1, seed=n) for n in (96, 32, 32)]
    for p in packed:
        p.tensors[1].fill_(2.0**-4)
    codes = [getattr(lowbit, OPERATIONS[kind])(torch.eye(256), *p.tensors, backend="reference").T for p in packed]
    dense = [c.bfloat16().contiguous() for c in codes]
    weights = [MAKE[kind](*p.tensors) for p in packed]
    x, residual = torch.randn(rows, 256).bfloat16(), torch.randn(rows, 96).bfloat16()
    norm = (1 + torch.randn(256) / 8).bfloat16()
    cosine, sine = torch.randn(2, rows, 32)
    for options, count in (
        ({}, 1),
        ({"norm": (norm, 1e-5)}, 1),
        ({"residual": (residual, 0.3)}, 1),
        ({"rope": (cosine, sine, 4), "norm": (norm, 1e-5)}, 3),
    ):
        got, expected = linear(x, *weights[:count], **options), linear(x, *dense[:count], **options)
        torch.testing.assert_close(got, expected, rtol=2**-6, atol=2**-6)
    up, gate = make_packed(kind, 96, 256, -1, seed=7), make_packed(kind, 96, 256, -1, seed=8)
    for p in (up, gate):
        p.tensors[1].fill_(2.0**-5)
    plain = [getattr(lowbit, OPERATIONS[kind])(torch.eye(256), *p.tensors, backend="reference").T for p in (up, gate)]
    plain = [weight.bfloat16().contiguous() for weight in plain]
    got = linear(x, MAKE[kind](*up.tensors), gate=MAKE[kind](*gate.tensors), norm=(norm, 1e-5))
    torch.testing.assert_close(got, linear(x, plain[0], gate=plain[1], norm=(norm, 1e-5)), rtol=2**-5, atol=2**-5)


@KINDS
def test_operators_of_the_library_take_the_kernels(kind):
    """Under `torch.no_grad()` and with gradients, compiled, and by the rules of `torch.library`."""
    packed = make_packed(kind, 40, 96, -1, scale_dtype=torch.float16 if kind == "int4" else torch.float32)
    operator = getattr(torch.ops.minicpm4_hf, OPERATIONS[kind])
    for dtype in (torch.bfloat16, torch.float32):
        x = make_rows(3, 96, dtype)
        with torch.no_grad():
            assert torch.equal(operator(x, *packed.tensors), run(packed, x))
    leaf = x.clone().requires_grad_()
    out = operator(leaf, *packed.tensors)
    assert torch.equal(out.detach(), run(packed, x))
    (gradient,) = torch.autograd.grad(out, leaf, torch.ones_like(out))
    torch.testing.assert_close(gradient, packed.weight.sum(0).float().expand(3, -1), rtol=1e-4, atol=1e-4)
    torch.library.opcheck(operator.default, (leaf, *packed.tensors))
    compiled = torch.compile(lambda x: operator(x, *packed.tensors) * 2, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), 2 * run(packed, x))


def test_auto_falls_back_to_the_reference():
    packed = make_packed("ternary", 24, 48, 12)  # groups that are no power of two
    x = make_rows(2, 48, torch.float32)
    expected = (x.double() @ packed.weight.T).float()
    torch.testing.assert_close(lowbit.ternary_linear(x, *packed.tensors), expected)
    torch.testing.assert_close(torch.ops.minicpm4_hf.ternary_linear(x, *packed.tensors), expected)
    strided = packed.tensors[0].T.contiguous().T
    torch.testing.assert_close(lowbit.ternary_linear(x, strided, packed.tensors[1]), expected)
    assert lowbit.ternary_linear(x.double(), *packed.tensors).dtype == torch.float64


def ternary(rows=2, columns=32, outputs=8, **changes):
    tensors = {
        "x": torch.zeros(rows, columns),
        "weight": torch.zeros(outputs, columns // 4, dtype=torch.uint8),
        "scales": torch.ones(outputs, 1),
        **changes,
    }
    return lowbit.ternary_linear(*tensors.values(), backend="cpu")


def int4(g_idx=None, **changes):
    tensors = {
        "x": torch.zeros(2, 32),
        "qweight": torch.zeros(4, 8, dtype=torch.int32),
        "scales": torch.ones(2, 8),
        **changes,
    }
    return lowbit.int4_linear(*tensors.values(), g_idx, backend="cpu")


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: ternary(weight=torch.zeros(8, 8)), "must be a matrix of torch.uint8, got torch.float32"),
        (lambda: ternary(weight=torch.zeros(8, dtype=torch.uint8)), r"of shape \[8\]"),
        (lambda: ternary(x=torch.zeros(2, 36)), "floating with 32 columns"),
        (lambda: ternary(x=torch.zeros(2, 32, dtype=torch.int64)), "floating with 32 columns"),
        (lambda: ternary(scales=torch.ones(7, 1)), "one row or column for each of 8 outputs"),
        (lambda: ternary(scales=torch.ones(8)), r"got torch.float32 of shape \[8\]"),
        (lambda: ternary(scales=torch.ones(8, 1, device="meta")), "on one device, got cpu, cpu and meta"),
        (lambda: ternary(scales=torch.ones(8, 3)), "does not serve this call: .* power of two"),
        (lambda: ternary(x=torch.zeros(2, 32, dtype=torch.float64)), "`x` is torch.float64"),
        (lambda: ternary(x=torch.zeros(2, 32, requires_grad=True)), "gradients are recorded"),
        (lambda: int4(qweight=torch.zeros(4, 8, dtype=torch.int64)), "matrix of torch.int32"),
        (lambda: int4(torch.zeros(31, dtype=torch.int64)), r"`g_idx` must have shape \[32\], got \[31\]"),
        (lambda: int4(torch.full((32,), 2)), "`g_idx` must lie in 0 to 1, got 2 to 2"),
        (lambda: int4(torch.full((32,), -1)), "`g_idx` must lie in 0 to 1, got -1 to -1"),
        (lambda: int4(qweight=torch.zeros(8, 4, dtype=torch.int32).T), "contiguous"),
    ],
)
def test_what_it_does_not_take(call, words):
    with pytest.raises(ValueError, match=words) as error:
        call()
    assert "\n" not in str(error.value) and str(error.value).endswith(".")


def test_modules_of_the_library():
    from minicpm4_hf.quantization import Int4Linear, PackedHead, TernaryLinear, pack_gptq, quantize_int4

    torch.manual_seed(0)
    source = torch.nn.Linear(256, 64)
    x = torch.randn(2, 3, 256)
    layer = TernaryLinear.from_linear(source, 64)
    torch.testing.assert_close(layer(x), torch.nn.functional.linear(x, layer.dequantize(), source.bias))
    packed = Int4Linear(256, 64, group_size=32).load_tensors_(pack_gptq(*quantize_int4(source.weight.detach(), 32)))
    torch.testing.assert_close(packed(x), x @ packed.dequantize(torch.float32).T, rtol=1e-5, atol=1e-5)
    before = packed.qweight.clone(), packed.scales.clone()
    assert torch.equal(packed.qweight, before[0]) and torch.equal(packed.scales, before[1])
    for bits in (4, 8):
        head = PackedHead(256, 64, bits=bits)
        head.weight.random_(-100, 100)
        torch.testing.assert_close(head(x), x @ head.dequantize(torch.float32).T, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("name", isa_names() if why_missing() is None else [])
def test_every_instruction_set(name):
    """In processes of their own; memory is handed out filled, so that what is read before it is written shows."""
    sweep = subprocess.run(
        [sys.executable, ROOT / "tests/kernels/lowbit_sweep.py"],
        env={**os.environ, "OMP_NUM_THREADS": "1", "MINICPM4_CPU_ISA": name, "MALLOC_PERTURB_": "1"},
        capture_output=True,
        text=True,
    )
    assert sweep.returncode == 0, sweep.stdout[-2000:] + sweep.stderr[-6000:]
    document = json.loads(sweep.stdout.splitlines()[-1])
    assert document["isa"] == name and document["cases"] > 300
    assert load_library().isa in isa_names()
