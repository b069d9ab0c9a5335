"""Run as a program, like native_sweep.py: packed products over shapes that reach every branch, against float64."""

import argparse
import json
import sys
from itertools import product
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))
from packed_weights import OPERATIONS, assert_exact, make_packed, make_rows

from minicpm4_hf.kernels import lowbit
from minicpm4_hf.kernels.cpu import load_library


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.get_num_threads = lambda: arguments.threads  # the kernels' threads alone, as in native_sweep.py
    # columns and group size: a part of a vector, whole ones and a part; groups in a vector, of one, of several
    geometries = [(8, -1), (36, -1), (48, 16), (192, 32), (320, 64), (640, 128), (768, 256), (1032, -1)]
    scale_dtypes = (torch.float32, torch.bfloat16, torch.float16)
    cases = 0
    for kind, rows, (i, (columns, group)) in product(OPERATIONS, (*range(1, 10), 21), enumerate(geometries)):
        if kind == "int4" and columns % 8:
            continue
        outputs = (1, 7, 33, 70, 130)[(i + rows) % 5]
        options = {"scale_dtype": scale_dtypes[(i + rows) % 3], "act_order": kind == "int4" and (i + rows) % 4 == 0}
        packed = make_packed(kind, outputs, columns, group, **options, seed=i)
        for dtype in (torch.bfloat16, torch.float32):
            x = make_rows(rows, columns, dtype, seed=rows)
            out = getattr(lowbit, OPERATIONS[kind])(x, *packed.tensors, backend="cpu")
            assert_exact(out, x, packed, rounds_inputs=load_library().isa in ("amx", "avx512_bf16"))
            cases += 1
    print(json.dumps({"isa": load_library().isa, "threads": arguments.threads, "cases": cases}))


if __name__ == "__main__":
    main()
