"""Ternary, int4 and int8 codes: against definitions written out by hand, round trips, what is refused."""

import pytest
import torch

from minicpm4_hf.quantization import (
    dequantize_int4,
    dequantize_ternary,
    detect_group_size,
    pack_gptq,
    pack_ternary,
    quantize_int4,
    quantize_int8,
    quantize_ternary,
    unpack_gptq,
    unpack_ternary,
)
from minicpm4_hf.quantization.ternary import EPS, GROUP_SIZES, recover_ternary

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def random_codes(rows, columns, low, high, seed=0):
    codes = torch.randint(low, high, (rows, columns), generator=torch.Generator().manual_seed(seed))
    return codes.to(torch.int8)


class TestTernary:
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("group_size", GROUP_SIZES)
    def test_definition(self, group_size, dtype):
        weight = normal(6, 512, dtype=dtype)
        codes, scales = quantize_ternary(weight, group_size)
        size = 512 if group_size == -1 else group_size
        assert codes.dtype == torch.int8 and scales.dtype == torch.float32
        assert scales.shape == (6, 512 // size)
        for row in range(6):
            for group in range(512 // size):
                columns = slice(group * size, (group + 1) * size)
                values = [float(value) for value in weight[row, columns]]
                scale = sum(abs(value) for value in values) / size
                assert scales[row, group].item() == pytest.approx(scale, rel=1e-6)
                for value, code in zip(values, codes[row, columns].tolist()):
                    if abs(abs(value) / scale - 0.5) > 1e-6:
                        assert code == (0 if abs(value) < 0.5 * scale else 1 if value > 0 else -1)

    def test_ties_go_to_zero(self):
        codes, scales = quantize_ternary(torch.tensor([[0.5, -0.5, 1.5, -1.5]]))
        assert scales.item() == 1.0 and codes.tolist() == [[0, 0, 1, -1]]

    def test_zeros_and_tiny_weights(self):
        codes, scales = quantize_ternary(torch.tensor([[0.0] * 4, [1e-6, -1e-6, 8e-6, -8e-6]]))
        assert (scales == EPS).all() and codes.tolist() == [[0] * 4, [0, 0, 1, -1]]

    def test_bfloat16_first_flips_codes_and_ours_flips_none(self):
        """A definition in numpy's float32 agrees in every code; one that casts first does not."""
        weight = normal(256, 1024, seed=3) * 0.02
        codes, _ = quantize_ternary(weight)
        values = weight.numpy().astype("float64")
        exact = abs(values) / abs(values).mean(1, keepdims=True)
        threshold = torch.from_numpy(abs(exact - 0.5)) < 1e-6  # float32 sums decide
        expected = torch.from_numpy(exact.round().clip(0, 1)).copysign(weight)
        assert threshold.float().mean() < 1e-4
        assert torch.equal(codes[~threshold].double(), expected[~threshold].double() + 0.0)
        cast, _ = quantize_ternary(weight.to(torch.bfloat16))
        assert 1e-4 < (cast != codes).float().mean() < 0.018

    def test_the_weight_is_not_changed(self):
        weight = normal(4, 64)
        before = weight.clone()
        quantize_ternary(weight, 32)
        recover_ternary(weight, 32)
        assert torch.equal(weight, before)

    @pytest.mark.parametrize("columns", [4, 12, 256])
    def test_packing_round_trip(self, columns):
        codes = random_codes(5, columns, -1, 2)
        packed = pack_ternary(codes)
        assert packed.dtype == torch.uint8 and packed.shape == (5, columns // 4)
        assert torch.equal(unpack_ternary(packed), codes)
        for row in range(5):
            for byte in range(columns // 4):
                fields = [int(codes[row, 4 * byte + i]) + 1 for i in range(4)]
                assert packed[row, byte].item() == sum(field << 2 * i for i, field in enumerate(fields))

    def test_every_byte_is_a_code_or_refused(self):
        for byte in range(256):
            packed = torch.tensor([[byte]], dtype=torch.uint8)
            if 3 in [(byte >> shift) & 3 for shift in (0, 2, 4, 6)]:
                with pytest.raises(ValueError, match="the bit pattern 3, which stands for no code"):
                    unpack_ternary(packed)
            else:
                assert torch.equal(pack_ternary(unpack_ternary(packed)), packed)

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("group_size", GROUP_SIZES)
    def test_a_ternary_weight_comes_back_exactly(self, group_size, dtype):
        codes, scales = quantize_ternary(normal(8, 512, seed=1), group_size)
        weight = dequantize_ternary(codes, scales, dtype)
        assert weight.dtype == dtype and detect_group_size(weight) == group_size
        found_codes, found_scales = recover_ternary(weight, group_size)
        assert found_scales.dtype == dtype and torch.equal(found_codes, codes)
        packed = pack_ternary(found_codes)
        assert torch.equal(dequantize_ternary(unpack_ternary(packed), found_scales), weight)

    def test_detection(self):
        weight = dequantize_ternary(*quantize_ternary(normal(8, 96, seed=1), 32))
        assert detect_group_size(weight) == 32  # 256, 128 and 64 do not divide 96
        assert detect_group_size(weight, (-1, 96)) is None
        weight[3, 40] *= 1.0001
        assert detect_group_size(weight) is None and recover_ternary(weight, 32) is None
        assert recover_ternary(torch.tensor([[float("nan")] * 4])) is None
        assert detect_group_size(torch.zeros(2, 64)) == -1
        negative_zero = torch.tensor([[-0.0, 2.0, -2.0, 0.0]])
        assert torch.equal(dequantize_ternary(*recover_ternary(negative_zero)), negative_zero)

    @pytest.mark.parametrize(
        ("call", "message"),
        [
            (lambda: quantize_ternary(torch.ones(4)), r"must be a matrix \[out, in\], got shape \[4\]"),
            (lambda: quantize_ternary(torch.ones(2, 8), 3), "must be -1 .* or divide the 8 columns .*, got 3"),
            (lambda: quantize_ternary(torch.ones(2, 8), 0), "got 0"),
            (lambda: quantize_ternary(torch.tensor([[1.0, float("nan")]])), "holds NaN or infinity"),
            (lambda: quantize_ternary(torch.tensor([[1.0, float("inf")]])), "holds NaN or infinity"),
            (lambda: pack_ternary(torch.zeros(2, 6, dtype=torch.int8)), r"a multiple of 4, got shape \[2, 6\]"),
            (lambda: pack_ternary(torch.full((1, 4), 2)), "must be -1, 0 or 1, got 2 to 2"),
            (lambda: unpack_ternary(torch.zeros(2, 2)), "must be a uint8 matrix, got torch.float32"),
            (lambda: dequantize_ternary(torch.zeros(2, 8), torch.ones(2, 3)), "do not fit codes of shape"),
            (lambda: dequantize_ternary(torch.zeros(2, 8), torch.ones(3, 2)), "do not fit codes of shape"),
        ],
    )
    def test_what_is_refused(self, call, message):
        with pytest.raises(ValueError, match=message):
            call()


class TestInt4:
    @pytest.mark.parametrize("group_size", [32, 128, -1])
    def test_definition(self, group_size):
        weight = normal(8, 256)
        codes, scales = quantize_int4(weight, group_size)
        size = 256 if group_size == -1 else group_size
        assert scales.dtype == torch.float16 and scales.shape == (8, 256 // size)
        expanded = scales.double().repeat_interleave(size, 1)
        largest = weight.view(8, -1, size).abs().amax(-1)
        torch.testing.assert_close(scales.float(), largest * 2 / 15, rtol=2**-11, atol=0)
        assert codes.min() >= -8 and codes.max() <= 7
        # No other code is nearer; at the ends, where 7 is the last, the distance is at most half a scale and rounding.
        distance = (codes * expanded - weight).abs()
        for other in (codes - 1).clamp(-8, 7), (codes + 1).clamp(-8, 7):
            assert (distance <= (other * expanded - weight).abs() + 1e-6).all()
        assert (distance <= 0.5 * expanded * (1 + 2**-7)).all()

    @pytest.mark.parametrize("act_order", [False, True])
    def test_gptq_round_trip(self, act_order):
        codes, scales = random_codes(16, 64, -8, 8), normal(16, 2).abs().half()
        groups = torch.arange(64) // 32
        groups = groups[torch.randperm(64, generator=torch.Generator().manual_seed(2))] if act_order else groups
        parts = pack_gptq(codes, scales, groups if act_order else None)
        assert {name: list(part.shape) for name, part in parts.items()} == {
            "qweight": [8, 16],
            "scales": [2, 16],
            "qzeros": [2, 2],
            "g_idx": [64],
        }
        for i in range(8):
            assert torch.equal((parts["qweight"] >> 4 * i & 15) - 8, codes.T[i::8].int())
        found, found_scales, g_idx = unpack_gptq(**parts)
        assert torch.equal(found, codes) and torch.equal(found_scales, scales)
        assert (g_idx is not None) == act_order
        expected = codes.double() * scales.double()[:, groups]
        assert torch.equal(dequantize_int4(found, found_scales, g_idx, torch.float32), expected.float())

    @pytest.mark.parametrize(
        ("call", "message"),
        [
            (lambda: quantize_int4(torch.full((2, 8), float("inf")), -1), "too large for float16 scales"),
            (lambda: quantize_int4(torch.full((2, 8), 1e6), -1), "too large for float16 scales"),
            (lambda: pack_gptq(torch.zeros(8, 12), torch.ones(8, 1)), "a multiple of 8, got shape"),
            (lambda: pack_gptq(torch.zeros(9, 8), torch.ones(9, 1)), "outputs that are a multiple of 8, got 9"),
            (lambda: pack_gptq(torch.zeros(8, 8), torch.ones(8, 3)), "do not fit codes of shape"),
            (lambda: pack_gptq(torch.full((8, 8), 8), torch.ones(8, 1)), "must lie in -8 to 7, got 8 to 8"),
        ],
    )
    def test_what_is_refused(self, call, message):
        with pytest.raises(ValueError, match=message):
            call()

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"qzeros": torch.full((2, 2), 0x88888888 - 2**32, dtype=torch.int32)}, "'gptq_v2' need GPTQModel"),
            ({"g_idx": torch.full((64,), 2, dtype=torch.int32)}, "must lie in 0 to 1, got 2 to 2"),
            ({"g_idx": torch.zeros(63, dtype=torch.int32)}, r"must have shape \[64\], got \[63\]"),
            ({"scales": torch.ones(2, 15)}, "do not fit `qweight`"),
        ],
        ids=["zero points", "group", "length", "scales"],
    )
    def test_files_that_are_refused(self, change, message):
        parts = pack_gptq(random_codes(16, 64, -8, 8), torch.ones(16, 2)) | change
        with pytest.raises(ValueError, match=message):
            unpack_gptq(**parts)


def test_int8_is_the_nearest_code():
    weight = normal(7, 33)
    weight[2] = 0
    codes, scales = quantize_int8(weight)
    assert (
        codes.dtype == torch.int8
        and scales.shape == (7, 1)
        and codes.abs().amax(1).tolist() == [127, 127, 0] + [127] * 4
    )
    assert ((codes * scales - weight).abs() <= 0.5 * scales * (1 + 1e-5)).all()
    with pytest.raises(ValueError, match="holds NaN or infinity"):
        quantize_int8(torch.tensor([[float("nan")]]))
