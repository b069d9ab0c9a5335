"""GPTQ of one matrix against a plain float64 definition, its properties, and what it refuses."""

import pytest
import torch

from minicpm4_hf.conversion.gptq import inverse_factor, output_error, quantize_gptq
from minicpm4_hf.conversion.gptq_smoothing import POWERS, fold_into_norm, search_scales, share_between_heads
from minicpm4_hf.quantization.int4 import dequantize_int4, quantize_int4


def make_problem(num_rows=24, num_columns=256, num_inputs=600, seed=0):
    """A weight, and inputs whose channels are correlated and of very different size."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(num_columns, num_columns, generator=generator) / num_columns**0.5
    inputs = torch.randn(num_inputs, num_columns, generator=generator) @ mixing
    inputs = inputs * torch.randn(num_columns, generator=generator).exp()
    weight = torch.randn(num_rows, num_columns, generator=generator) / num_columns**0.5
    return weight, inputs


def reference_gptq(weight, hessian, group_size, damping=0.01, act_order=False):
    """GPTQ as in its paper's text: the inverse Hessian of the columns left, updated by elimination. All float64.

    Returns codes, scales and how far the nearest quotient was from where it would have been rounded otherwise.
    """
    weight, hessian = weight.double().clone(), hessian.double().clone()
    num_columns = weight.shape[1]
    hessian += damping * hessian.diagonal().mean() * torch.eye(num_columns, dtype=torch.float64)
    order = hessian.diagonal().argsort(descending=True, stable=True) if act_order else torch.arange(num_columns)
    inverse = torch.linalg.inv(hessian[order][:, order])
    left, codes, margin = weight[:, order], torch.zeros(weight.shape, dtype=torch.int8), 1.0

    def scales_of(columns):
        return (columns.abs().amax(1) * 2 / 15).float().half().double()

    scales = torch.stack([scales_of(columns) for columns in weight.split(group_size, 1)], 1)
    for step, column in enumerate(order.tolist()):
        if not act_order and step % group_size == 0:
            scales[:, step // group_size] = scales_of(left[:, :group_size])
        scale = scales[:, column // group_size]
        quotient = left[:, 0] / scale
        margin = min(margin, (quotient - quotient.floor() - 0.5).abs().min().item())
        codes[:, column] = quotient.round().clamp(-8, 7)
        error = (left[:, 0] - codes[:, column] * scale) / inverse[0, 0]
        left = left[:, 1:] - error[:, None] * inverse[0, 1:]
        inverse = inverse[1:, 1:] - inverse[1:, :1] @ inverse[:1, 1:] / inverse[0, 0]
    return codes, scales.half(), margin


@pytest.mark.parametrize("act_order", [False, True], ids=["in-order", "act-order"])
@pytest.mark.parametrize("group_size", [32, 128, 256])
def test_codes_are_those_of_the_definition(group_size, act_order):
    weight, inputs = make_problem(num_rows=4, seed=2 * group_size + act_order)
    hessian = inputs.t() @ inputs
    codes, scales, margin = reference_gptq(weight, hessian, group_size, act_order=act_order)
    assert margin > 1e-5, "float32 may round the other way; take another seed"
    ours, our_scales = quantize_gptq(weight, hessian, group_size=group_size, act_order=act_order)
    assert ours.dtype == torch.int8 and our_scales.dtype == torch.float16
    assert torch.equal(ours, codes)
    torch.testing.assert_close(our_scales, scales, rtol=2**-10, atol=0)


def test_whole_rows_and_odd_sizes():
    weight, inputs = make_problem(num_rows=3, num_columns=200, seed=4)
    hessian = inputs.t() @ inputs
    codes, scales = quantize_gptq(weight, hessian, group_size=-1)
    reference, _, margin = reference_gptq(weight, hessian, 200)
    assert margin > 1e-5 and torch.equal(codes, reference) and scales.shape == (3, 1)


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("hessian", [torch.eye(256), 7.5 * torch.eye(256), torch.zeros(256, 256)])
def test_without_correlations_it_rounds_to_nearest(hessian, act_order):
    weight, _ = make_problem()
    codes, scales = quantize_gptq(weight, hessian, act_order=act_order)
    nearest, nearest_scales = quantize_int4(weight)
    assert torch.equal(codes, nearest) and torch.equal(scales, nearest_scales)


def test_rows_are_independent_and_nothing_is_changed_in_place():
    weight, inputs = make_problem()
    hessian = inputs.t() @ inputs
    before = weight.clone(), hessian.clone()
    codes, scales = quantize_gptq(weight, hessian)
    assert torch.equal(weight, before[0]) and torch.equal(hessian, before[1])
    parts = [quantize_gptq(part, hessian) for part in weight.split([5, 19])]
    assert torch.equal(codes, torch.cat([part[0] for part in parts]))
    assert torch.equal(scales, torch.cat([part[1] for part in parts]))
    # A weight whose transpose is contiguous could be worked on without a copy.
    assert torch.equal(quantize_gptq(weight.t().contiguous().t(), hessian)[0], codes)
    assert torch.equal(weight, before[0])


def test_only_the_hessians_shape_matters():
    weight, inputs = make_problem()
    hessian = inputs.t() @ inputs
    assert torch.equal(quantize_gptq(weight, hessian)[0], quantize_gptq(weight, 1024 * hessian)[0])


@pytest.mark.parametrize("seed", range(3))
def test_errors_are_in_order_also_on_inputs_not_seen(seed):
    weight, inputs = make_problem(num_inputs=2000, seed=seed)
    hessian, unseen = (part.t() @ part for part in inputs.split([1500, 500]))
    results = [quantize_int4(weight), quantize_gptq(weight, hessian), quantize_gptq(weight, hessian, act_order=True)]
    for moments in (hessian, unseen):
        nearest, plain, ordered = (output_error(weight, *result, moments)[0] for result in results)
        assert ordered < plain < 0.8 * nearest


def test_an_input_that_was_never_seen_is_rounded_and_not_dropped():
    weight, inputs = make_problem()
    inputs[:, 17] = 0.0
    codes, scales = quantize_gptq(weight, inputs.t() @ inputs)
    expected = (weight[:, 17] / scales[:, 0].float()).round().clamp(-8, 7)
    assert torch.equal(codes[:, 17], expected.to(torch.int8)) and codes[:, 17].any()


def test_output_error_is_that_of_the_outputs():
    weight, inputs = make_problem()
    codes, scales = quantize_int4(weight)
    error, norm = output_error(weight, codes, scales, inputs.t() @ inputs)
    dequantized = dequantize_int4(codes, scales, dtype=torch.float32)
    wanted = (inputs.double() @ (dequantized - weight).double().t()).square().sum().item()
    assert error == pytest.approx(wanted, rel=1e-3)
    assert norm == pytest.approx((inputs @ weight.t()).double().square().sum().item(), rel=1e-3)
    assert output_error(weight, codes, scales, None)[1] == pytest.approx(weight.square().sum().item(), rel=1e-5)


def test_factor_is_that_of_the_damped_inverse():
    _, inputs = make_problem()
    hessian = inputs.t() @ inputs
    factor = inverse_factor(hessian, 0.05).double()
    damped = hessian.double() + 0.05 * hessian.diagonal().double().mean() * torch.eye(256, dtype=torch.float64)
    assert torch.equal(factor, factor.triu())
    torch.testing.assert_close(factor.t() @ factor @ damped, torch.eye(256, dtype=torch.float64), rtol=0, atol=1e-4)


def broken_hessian(value):
    hessian = torch.eye(256)
    hessian[3, 3] = value
    return hessian


@pytest.mark.parametrize(
    ("hessian", "settings", "message"),
    [
        (torch.eye(128), {}, r"`hessian` must be \[256, 256\] for a weight of shape \[24, 256\], got \[128, 128\]\."),
        (broken_hessian(float("nan")), {}, "The Hessian is not finite: an input of this layer is infinite or NaN."),
        (broken_hessian(float("inf")), {}, "The Hessian is not finite"),
        (broken_hessian(-10.0), {}, "not positive definite with a damping of 0.01; give a larger one, such as 0.1."),
        (torch.eye(256), {"damping": 0.0}, "`damping` must be greater than 0, got 0.0."),
    ],
)
def test_what_is_refused(hessian, settings, message):
    with pytest.raises(ValueError, match=message):
        quantize_gptq(make_problem()[0], hessian, **settings)


def test_weights_that_are_not_finite_are_refused():
    weight, inputs = make_problem()
    weight[2, 5] = float("nan")
    with pytest.raises(ValueError, match="NaN, infinity"):
        quantize_gptq(weight, inputs.t() @ inputs)


def smoothed_error(weight, hessian, scales):
    """Squared output error of a weight that is smoothed, rounded to nearest and smoothed back."""
    rounded = dequantize_int4(*quantize_int4(weight * scales, 64), dtype=torch.float32) / scales
    return ((rounded - weight).double() @ hessian.double() * (rounded - weight)).sum().item()


def test_smoothing_takes_the_best_power_of_the_grid():
    weight, inputs = make_problem()
    hessian, magnitudes = inputs.t() @ inputs, inputs.abs().mean(0)
    scales, power = search_scales(weight, hessian, magnitudes, group_size=64)
    candidates = {}
    for p in POWERS:
        candidate = magnitudes**p
        candidates[p] = smoothed_error(weight, hessian, candidate / (candidate.max() * candidate.min()) ** 0.5)
    assert power == min(candidates, key=candidates.get) and power > 0
    assert smoothed_error(weight, hessian, scales) == pytest.approx(candidates[power], rel=1e-4)
    assert candidates[power] < 0.9 * candidates[0.0]


def test_smoothing_of_dead_channels_is_harmless():
    weight, inputs = make_problem()
    inputs[:, 3] = 0.0
    scales, _ = search_scales(weight, inputs.t() @ inputs, inputs.abs().mean(0), group_size=64)
    assert scales.isfinite().all() and (scales > 0).all()
    scales, power = search_scales(weight, torch.zeros(256, 256), torch.zeros(256), group_size=64)
    assert torch.equal(scales, torch.ones(256)) and power == 0.0


def test_query_heads_of_one_value_head_share_scales():
    tie = share_between_heads(4, 2, 3)
    magnitudes = torch.arange(12.0)
    assert tie(magnitudes).tolist() == [1.5, 2.5, 3.5, 1.5, 2.5, 3.5, 7.5, 8.5, 9.5, 7.5, 8.5, 9.5]
    assert torch.equal(share_between_heads(2, 2, 6)(magnitudes), magnitudes)


def test_a_folded_norm_and_its_scales_belong_together():
    norm = torch.tensor([1.0, -0.37, 0.0, 2.5, 1e-30], dtype=torch.bfloat16)
    scales = torch.tensor([3.0, 0.7, 2.0, 1.1, 1e20])
    divided, exact = fold_into_norm(norm, scales)
    assert divided.dtype == torch.bfloat16
    torch.testing.assert_close(divided.float() * exact, norm.float(), rtol=1e-6, atol=0)
    torch.testing.assert_close(exact[[0, 1, 3]], scales[[0, 1, 3]], rtol=2**-8, atol=0)
    assert exact[2] == 1.0 and divided[2] == 0.0
    assert exact[4] == 1.0 and divided[4] == norm[4]  # the quotient is below bfloat16's range
