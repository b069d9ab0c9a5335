"""Run as a program: every native kernel once over shapes that reach its branches, checked against float64.

It runs in a process of its own, as the instruction set, a library with a sanitizer and the memory that `malloc` hands
out are settled by the environment. Prints one JSON document.
"""

import argparse
import json
import sys
from functools import partial
from itertools import product
from pathlib import Path

import torch
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))
from definitions import causal_mask, check_rounding, check_sparse_parity, make_inputs, masked_attention
from small_models import SMALL_SPARSE, build_model
from transformers import DynamicCache

from minicpm4_hf.kernels.cpu import attention, decoder_layer, isa_names, load_library
from minicpm4_hf.kernels.cpu.linear import MAX_ROWS, linear
from minicpm4_hf.kernels.dense import dense_attention
from minicpm4_hf.kernels.infllm_v2 import sparse_attention

NAMES = ("kernel_size", "kernel_stride", "block_size", "init_blocks", "window_size", "topk")
# Blocks that fill a vector and that do not; a window of many blocks; no coarse windows, and none at all.
GEOMETRIES = [(8, 4, 16, 1, 32, 3), (24, 12, 24, 2, 24, 4), (80, 8, 8, 0, 0, 2), (400, 16, 16, 1, 16, 3)]
# Head sizes and groups: each template of the engines, and lanes left over.
SHAPES = [(64, 1), (64, 4), (128, 2), (128, 8), (64, 16), (48, 1), (16, 3), (80, 5), (96, 12), (160, 20)]


def sweep_attention(dtype, dim, group, share):
    """Prefill, a chunk and one token; rows of unlike length, one of them too short to choose; a sixth of the cases."""
    operation = partial(sparse_attention, backend="cpu")
    cases = 0
    for i, (num_queries, geometry) in enumerate(product((139, 21, 1), GEOMETRIES)):
        if i % 6 != share % 6:
            continue
        q, k, v = make_inputs(2, 139, 1, group, dim, num_queries=num_queries, dtype=dtype, seed=i)
        kv_start = torch.tensor([0, (41, 130)[i % 2]]) if i // 2 % 2 else None
        options = {**dict(zip(NAMES, geometry)), "kv_start": kv_start, "lse_approx": i % 4 != 3}
        check_sparse_parity(operation, attention.pool_streams, q, k, v, **options)
        window = (0, 19)[i % 2]
        out = dense_attention(q, k, v, kv_start=kv_start, sliding_window=window, backend="cpu")
        mask = causal_mask(num_queries, 139, window, kv_start)
        exact = masked_attention(q.double(), k.double(), v.double(), mask)
        check_rounding(out, exact, masked_attention(q, k, v, mask))
        cases += 2
    return cases


def sweep_linear(rows):
    generator = torch.Generator().manual_seed(rows)
    for features, size in product((1, 37, 72, 129), (1, 7, 33, 70)):
        x, weight, gate = (torch.randn(n, features, generator=generator).bfloat16() for n in (rows, size, size))
        exact, plain = x.double() @ weight.double().T, F.linear(x, weight)
        check_rounding(linear(x, weight), exact, plain)
        assert torch.equal(linear(x, weight, gate), torch.cat((linear(x, weight), linear(x, gate)), -1))
        gated = F.silu(x.double() @ gate.double().T) * exact
        check_rounding(linear(x, weight, gate=gate), gated, F.silu(F.linear(x, gate)) * plain)
    return 3 * 16


def sweep_layer(sparse):
    """Decoder layers in one call, against the same in parts: keys that the call itself puts into the cache."""
    model, ids = build_model(8, sparse=sparse).to(torch.bfloat16), torch.arange(100)[None] % 97
    packed = decoder_layer._pack_attention
    results = []
    for pack in (packed, lambda *args, **kwargs: (None, ())):
        decoder_layer._pack_attention = pack
        cache = DynamicCache(config=model.config)
        with torch.no_grad():
            results.append(
                [model(part, past_key_values=cache).logits for part in ids.split([70, 1, 4, 1, 7, 1, 16], 1)]
            )
    decoder_layer._pack_attention = packed
    assert all(map(torch.equal, *results))
    return len(results[0])


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    # The kernels' threads alone: a sanitizer does not know what holds torch's own together, and would report those.
    torch.get_num_threads = lambda: arguments.threads
    cases = 0
    for dtype in attention.DTYPES:
        for share, (dim, group) in enumerate(SHAPES):
            cases += sweep_attention(dtype, dim, group, share)
    for rows in range(1, MAX_ROWS + 1):
        cases += sweep_linear(rows)
    for sparse in (None, SMALL_SPARSE):
        cases += sweep_layer(sparse)
    print(json.dumps({"isa": load_library().isa, "isas": isa_names(), "threads": arguments.threads, "cases": cases}))


if __name__ == "__main__":
    main()
