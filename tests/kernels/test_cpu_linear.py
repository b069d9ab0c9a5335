"""Native linear layers of one to eight rows: as close to float64 as torch's own, and the same every time."""

import pytest
import torch
import torch.nn.functional as F

from minicpm4_hf.kernels.cpu import why_missing
from minicpm4_hf.kernels.cpu.linear import MAX_ROWS, linear, serves

pytestmark = pytest.mark.skipif(why_missing() is not None, reason=str(why_missing()))
EPS = torch.finfo(torch.bfloat16).eps
ROWS = pytest.mark.parametrize("rows", range(1, MAX_ROWS + 1), ids=lambda m: f"M{m}")


def make_inputs(rows, features, *sizes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, features, generator=generator).bfloat16()
    return x, [torch.randn(size, features, generator=generator).bfloat16() for size in sizes]


def check_rounding(got, exact, plain):
    """At most torch's own error and one rounding step, and on average what rounding alone costs."""
    assert got.dtype == torch.bfloat16 and got.shape == exact.shape
    error, allowed = (got.double() - exact).abs(), (plain.double() - exact).abs()
    assert (error <= allowed + EPS * exact.abs() + 1e-5 * exact.abs().max()).all()
    assert error.mean() <= 1.05 * allowed.mean() + 1e-6 * exact.abs().max()


@ROWS
@pytest.mark.parametrize("features", [1, 2, 15, 31, 37, 72, 1000, 1027], ids=lambda k: f"K{k}")
def test_parity_over_shapes(rows, features):
    for size in (1, 2, 3, 5, 37, 72, 1000):
        x, (weight,) = make_inputs(rows, features, size, seed=size)
        check_rounding(linear(x, weight), x.double() @ weight.double().T, F.linear(x, weight))


@ROWS
@pytest.mark.parametrize("sizes", [(64, 32), (64, 32, 32), (37, 1, 1000), (1, 1, 1), (33, 65)], ids=str)
def test_weights_side_by_side(rows, sizes):
    x, weights = make_inputs(rows, 72, *sizes)
    assert torch.equal(linear(x, *weights), torch.cat([linear(x, weight) for weight in weights], -1))


@ROWS
@pytest.mark.parametrize(("features", "size"), [(64, 96), (37, 41), (1027, 7), (1, 1)], ids=lambda n: str(n))
def test_gate(rows, features, size):
    x, (up, gate) = make_inputs(rows, features, size, size)
    gate = gate / features**0.5
    left, right = x.double() @ gate.double().T, x.double() @ up.double().T
    plain = F.silu(F.linear(x, gate)) * F.linear(x, up)
    # The roundings before the last one are torch's, but a sum in another order may tip each of them the other way.
    error = (linear(x, up, gate=gate).double() - F.silu(left) * right).abs()
    step = EPS * (F.silu(left) * right).abs() + EPS * (left.abs() + 1) * right.abs()
    assert (error <= (plain.double() - F.silu(left) * right).abs() + step).all()


def test_gate_far_from_zero():
    x = torch.ones(1, 32, dtype=torch.bfloat16)
    rows = torch.tensor([-1000.0, -20.0, -1.0, 0.0, 1.0, 20.0, 1000.0]).bfloat16()
    weight = rows[:, None].expand(-1, 32).contiguous() / 32
    up = torch.full((7, 32), 1 / 32, dtype=torch.bfloat16)
    expected = F.silu(F.linear(x, weight)) * F.linear(x, up)
    torch.testing.assert_close(linear(x, up, gate=weight), expected, rtol=EPS, atol=1e-6)


@pytest.mark.parametrize("features", [37, 64, 1000], ids=lambda k: f"K{k}")
def test_any_layout_of_the_rows(features):
    x, (weight,) = make_inputs(6, features, 50)
    expected = linear(x, weight)
    wide = x.new_full((6, features + 5), torch.nan)
    shifted = wide[:, 5:]
    shifted.copy_(x)
    spread = x.new_full((12, 2 * features), torch.nan)[1::2, ::2]
    spread.copy_(x)
    end = x.new_full((6 * features + 1,), torch.nan)[1:].view(6, features)
    end.copy_(x)
    for name, same in {
        "wide": shifted,
        "spread": spread,
        "end": end,
        "transposed": x.T.contiguous().T,
        "batched": x.view(2, 3, features),
        "batched and cut": wide.view(2, 3, -1)[..., 5:],
        "middle transposed": x.view(2, 3, features).transpose(0, 1).contiguous().transpose(0, 1),
    }.items():
        assert torch.equal(linear(same, weight).reshape(6, -1), expected), name
    assert linear(x.view(2, 3, features), weight).shape == (2, 3, 50)
    assert torch.equal(linear(x[:1].expand(4, -1), weight), expected[:1].expand(4, -1))


@pytest.mark.parametrize("features", [37, 64, 1000], ids=lambda k: f"K{k}")
def test_weights_that_are_slices(features):
    """A checkpoint's weights may begin at any element of a larger tensor, and end where it ends."""
    x, (weight,) = make_inputs(3, features, 50)
    memory = torch.full((weight.numel() + 1,), torch.nan, dtype=torch.bfloat16)
    memory[1:] = weight.flatten()
    assert torch.equal(linear(x, memory[1:].view(50, features)), linear(x, weight))
    assert torch.equal(linear(x, weight[20:]), linear(x, weight)[:, 20:])


@ROWS
def test_rows_do_not_see_each_other(rows, poisoned_empty):
    x, (weight, gate) = make_inputs(rows, 100, 70, 70)
    x[0] = torch.nan
    out = linear(x, weight)
    assert out[0].isnan().all() and out[1:].isfinite().all()
    assert linear(x, weight, gate=gate)[1:].isfinite().all()


@ROWS
def test_same_every_time_and_with_any_number_of_threads(rows):
    x, (weight, up) = make_inputs(rows, 1000, 300, 300)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 1, 2, 3, 7, 7):
            torch.set_num_threads(threads)
            results.append((linear(x, weight), linear(x, weight, gate=up)))
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for result in results for a, b in zip(result, results[0]))


def test_what_it_serves():
    x, (weight,) = make_inputs(MAX_ROWS, 64, 32)
    assert serves(x, weight) and serves(x.view(2, 4, 64), weight)
    assert not serves(torch.cat((x, x[:1])), weight)
    assert not serves(x[:0], weight)
    assert not serves(x.float(), weight) and not serves(x, weight.float())
    assert not serves(x, weight[:, :32]) and not serves(x[:, :32], weight[:, ::2])
    assert not serves(x.to("meta"), weight)
    assert not serves(x, weight.clone().requires_grad_()) and not serves(x.clone().requires_grad_(), weight)
    with torch.no_grad():
        assert serves(x, weight.clone().requires_grad_())


def test_more_rows_go_to_torchs_product():
    x, (weight,) = make_inputs(MAX_ROWS + 1, 64, 32)
    assert not serves(x, weight) and serves(x, weight, max_rows=None)
    assert torch.equal(linear(x, weight), torch.nn.functional.linear(x, weight))
