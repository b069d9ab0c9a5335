"""The native library as a whole: instruction sets, absence, threads, memory, `torch.library`, errors, sanitizers."""

import json
import os
import platform
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from definitions import make_inputs, rounding

from minicpm4_hf.kernels import resolve_backend
from minicpm4_hf.kernels.cpu import attention, isa_names, load_library, why_missing
from minicpm4_hf.kernels.cpu.library import ISA_VARIABLE, LIBRARY_VARIABLE
from minicpm4_hf.kernels.cpu.linear import linear
from minicpm4_hf.kernels.dense import dense_attention
from minicpm4_hf.kernels.infllm_v2 import sparse_attention

ROOT = Path(__file__).parents[2]
SMALL = {"kernel_size": 8, "kernel_stride": 4, "block_size": 16, "init_blocks": 1, "window_size": 32, "topk": 3}
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=lambda d: str(d)[6:])
needs_native = pytest.mark.skipif(why_missing() is not None, reason=str(why_missing()))
NAMES = isa_names() if why_missing() is None else []


def run_python(arguments, **environment):
    """Output of a Python process with one OpenMP thread; fails with what it said on stderr."""
    result = subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-8000:]
    return result


def sweep(threads=1, **environment):
    result = run_python([ROOT / "tests/kernels/native_sweep.py", "--threads", str(threads)], **environment)
    return json.loads(result.stdout.splitlines()[-1])


def run_both(q, k, v, **options):
    out, blocks = sparse_attention(q, k, v, **SMALL, **options, backend="cpu")
    return out, blocks, dense_attention(q, k, v, **options, backend="cpu")


@pytest.mark.parametrize("name", NAMES)
@needs_native
def test_every_instruction_set_agrees_with_the_definition(name):
    # what `malloc` hands out is filled with -1.7e38, so that scratch read before it is written shows
    document = sweep(**{ISA_VARIABLE: name, "MALLOC_PERTURB_": "1"})
    assert document["isa"] == name and document["isas"] == NAMES and document["cases"] > 400


@needs_native
def test_names_of_instruction_sets():
    assert NAMES[-1] == "portable" and len(set(NAMES)) == len(NAMES)
    assert load_library().isa in NAMES
    if platform.machine() != "x86_64":
        assert NAMES == ["portable"]
    assert resolve_backend("cpu") == ("cpu", f"native kernels, instruction set {load_library().isa}")


@pytest.mark.skipif("amx" not in NAMES, reason="the processor or the build has no AMX")
def test_tile_registers_shapes_are_given_back(tmp_path):
    """Others use them on the same threads, torch's own products among them."""
    source = Path(__file__).with_name("tile_registers.cpp")
    flags = ["-std=c++17", "-mamx-tile", "-mamx-bf16", "-mavx512f", f"-I{ROOT / 'kernels/cpu/csrc'}"]
    compiler = os.environ.get("CXX", "c++")
    subprocess.run([compiler, *flags, "-o", tmp_path / "program", source], check=True)
    assert subprocess.run([tmp_path / "program"]).returncode == 0


# A library that is not there.


@pytest.fixture
def reload_library(monkeypatch):
    """`reload_library(VARIABLE=value)`: as a new process with that environment would load the library."""

    def reload(**environment):
        for variable, value in environment.items():
            monkeypatch.setenv(variable, value)
        load_library.cache_clear()

    yield reload
    monkeypatch.undo()
    load_library.cache_clear()
    why_missing()  # chooses the instruction set anew


@pytest.mark.parametrize(
    ("variable", "value", "words"),
    [
        pytest.param(ISA_VARIABLE, "mmx", "'mmx', but this build and machine have .*portable", marks=needs_native),
        (LIBRARY_VARIABLE, "/nowhere/_native.so", "native library"),
        (LIBRARY_VARIABLE, __file__, "does not load"),
    ],
    ids=["instruction set", "no file", "no library"],
)
@pytest.mark.filterwarnings("ignore:.*PyTorch runs instead")
def test_without_the_library_pytorch_runs(variable, value, words, reload_library):
    q, k, v = make_inputs(1, 150, 2, 4, 16, dtype=torch.float32)
    expected = sparse_attention(q, k, v, **SMALL, backend="reference")
    expected_dense = dense_attention(q, k, v, backend="reference")
    reload_library(**{variable: value})
    with pytest.warns(UserWarning, match=f"{words}.*; PyTorch runs instead"):
        name, reason = resolve_backend("cpu")
    assert name == "reference" and "\n" not in reason and reason == f"plain PyTorch: {why_missing()}"
    assert all(torch.equal(a, b) for a, b in zip(sparse_attention(q, k, v, **SMALL), expected))
    assert torch.equal(dense_attention(q, k, v), expected_dense)
    for call in (lambda: run_both(q, k, v), lambda: dense_attention(q, k, v, backend="cpu")):
        with pytest.raises(RuntimeError, match=words) as error:
            call()
        assert "\n" not in str(error.value) and str(error.value).endswith(".")


# Threads.


@pytest.fixture
def threads():
    """`threads(n)` sets torch's number; the old one comes back."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@needs_native
@pytest.mark.parametrize("num_queries", [203, 16, 1], ids=lambda n: f"TQ{n}")
@pytest.mark.parametrize("group", [1, 5, 16], ids=lambda g: f"G{g}")
@DTYPES
def test_number_of_threads_changes_rounding_only(dtype, group, num_queries, threads, poisoned_empty):
    """One token of two key heads makes two tiles: three threads and more also share a tile's keys."""
    q, k, v = make_inputs(1, 603, 2, group, 64, num_queries=num_queries, dtype=dtype)
    threads(1)
    out, blocks, dense = run_both(q, k, v)
    for count in (1, 2, 3, 7):
        threads(count)
        first, again = run_both(q, k, v), run_both(q, k, v)
        assert torch.get_num_threads() == count
        assert all(torch.equal(a, b) for a, b in zip(first, again))
        assert torch.equal(first[1], blocks)
        torch.testing.assert_close(first[0], out, **rounding(dtype))
        torch.testing.assert_close(first[2], dense, **rounding(dtype))


@needs_native
@DTYPES
def test_shared_keys_with_padding_and_windows(dtype, threads, poisoned_empty):
    """More threads than runs of keys, so that some get none; a row without any key."""
    q, k, v = make_inputs(3, 90, 1, 4, 32, num_queries=2, dtype=dtype)
    kv_start = torch.tensor([0, 70, 90])
    threads(1)
    out, blocks, dense = run_both(q, k, v, kv_start=kv_start)
    window = dense_attention(q, k, v, kv_start=kv_start, sliding_window=1, backend="cpu")
    for count in (3, 7, 40):
        threads(count)
        got, got_blocks, got_dense = run_both(q, k, v, kv_start=kv_start)
        assert torch.equal(got_blocks, blocks)
        torch.testing.assert_close(got, out, **rounding(dtype))
        torch.testing.assert_close(got_dense, dense, **rounding(dtype))
        got_window = dense_attention(q, k, v, kv_start=kv_start, sliding_window=1, backend="cpu")
        torch.testing.assert_close(got_window, window, **rounding(dtype))


@needs_native
def test_python_threads_at_once(threads):
    threads(2)
    inputs = [make_inputs(1, 300, 2, 4, 64, num_queries=n, dtype=torch.bfloat16, seed=n) for n in (300, 1, 70, 2)]
    x, weight = torch.randn(3, 100).bfloat16(), torch.randn(80, 100).bfloat16()

    def work(tensors):
        return [(*run_both(*tensors), linear(x, weight)) for _ in range(10)]

    with ThreadPoolExecutor(1) as pool:
        alone = [pool.submit(work, tensors).result()[0] for tensors in inputs]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(work, inputs))
    for expected, results in zip(alone, together):
        assert all(torch.equal(a, b) for result in results for a, b in zip(result, expected))


@needs_native
def test_other_python_threads_go_on_meanwhile(monkeypatch, threads):
    threads(1)
    library, ticks, seen, done = load_library(), [0], [], threading.Event()

    class Watched:
        @staticmethod
        def mc_attention(arguments):
            before = ticks[0]
            code = library.mc_attention(arguments)
            seen.append(ticks[0] - before)
            return code

    def tick():
        while not done.wait(1e-5):
            ticks[0] += 1

    monkeypatch.setattr(attention, "load_library", lambda: Watched)
    tensors = make_inputs(1, 2000, 2, 8, 64, dtype=torch.float32)
    interval = sys.getswitchinterval()
    worker = threading.Thread(target=tick)
    try:
        sys.setswitchinterval(60)  # Python itself hands over to nobody: only the native call can
        worker.start()
        dense_attention(*tensors, backend="cpu")
    finally:
        done.set()
        sys.setswitchinterval(interval)
        worker.join()
    assert len(seen) == 1 and seen[0] > 0


# Memory.

MEMORY_SCRIPT = """
import json, resource, sys, torch
sys.path.insert(0, sys.argv[1])
from small_models import build_model
from minicpm4_hf.kernels.cpu import attention
from minicpm4_hf.sparse_attention import COARSE

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

settings = dict(kernel_size=8, kernel_stride=4, block_size=16, init_blocks=1, window_size=32, topk=3)
q, k, v = (torch.randn(1, heads, tokens, 16) for heads, tokens in ((4, 1), (2, 2048), (2, 2048)))
compressed = attention.pool_streams(k, None, 8, 4)

def steps(count):
    for i in range(count):
        keys = slice(2048 - i % 1000)
        attention.sparse_attention(q, k[:, :, keys], v[:, :, keys], **settings, compressed=compressed)
        if i % 10 == 0:
            attention.dense_attention(q, k[:, :, :100], v[:, :, :100])
            attention.pool_keys(k[:, :, -40:], 8, 4)

model = build_model(dtype=torch.bfloat16).to(torch.bfloat16)
prompt = torch.randint(1, 96, (1, 200), generator=torch.Generator().manual_seed(0))

def generate(count):
    return model.generate(prompt, max_new_tokens=count, min_new_tokens=count, do_sample=False)

steps(1000)
before = peak()
steps(10000)
after = peak()
generate(100)
generate(100)
generated_before = peak()
for _ in range(3):
    generate(100)
print(json.dumps([after - before, peak() - generated_before]))
"""


@needs_native
def test_memory_stays_flat_over_many_steps():
    result = run_python(["-c", MEMORY_SCRIPT, ROOT / "tests/support"])
    steps, generated = json.loads(result.stdout)
    assert steps < 1 and generated < 4  # MiB


# torch.library.


def operator_arguments(kv_start):
    q, k, v = make_inputs(2, 150, 2, 4, 16, num_queries=9, dtype=torch.float32)
    compressed = attention.pool_streams(k, kv_start, 8, 4)
    ops = torch.ops.minicpm4_hf
    return {
        ops.cpu_sparse_attention: (q, k, v, *compressed, None, kv_start, 0.25, 8, 4, 16, 1, 32, 3, True),
        ops.cpu_dense_attention: (q, k, v, kv_start, 0.25, 20),
        ops.cpu_pool_keys: (k, 8, 4),
    }


@needs_native
@pytest.mark.parametrize("name", ["cpu_sparse_attention", "cpu_dense_attention", "cpu_pool_keys"])
@pytest.mark.parametrize("kv_start", [None, torch.tensor([0, 40])], ids=["whole", "padded"])
def test_operators_follow_the_rules(name, kv_start):
    operator = getattr(torch.ops.minicpm4_hf, name)
    torch.library.opcheck(operator.default, operator_arguments(kv_start)[operator])


@needs_native
def test_compiles_as_one_graph():
    ops = torch.ops.minicpm4_hf

    def step(q, k, v):
        fine, coarse = ops.cpu_pool_keys(k, 8, 4), ops.cpu_pool_keys(k, 32, 16)
        sparse, blocks = ops.cpu_sparse_attention(q, k, v, fine, coarse, None, None, 0.25, 8, 4, 16, 1, 32, 3, True)
        return sparse + ops.cpu_dense_attention(q, k, v, None, 0.25, 0), blocks

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for num_queries in (150, 9):
        tensors = make_inputs(2, 150, 2, 4, 16, num_queries=num_queries, dtype=torch.bfloat16)
        for got, expected in zip(compiled(*tensors), step(*tensors)):
            assert torch.equal(got, expected) and got.stride() == expected.stride()


# Errors.


def zeros(*shape, **options):
    return torch.zeros(shape, **options)


@needs_native
@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ([zeros(1, 4, 8, 16, dtype=torch.float64), zeros(1, 2, 8, 16, dtype=torch.float64)], "dtype is torch.float64"),
        ([zeros(1, 4, 8, 16, dtype=torch.int64), zeros(1, 2, 8, 16, dtype=torch.int64)], "one floating dtype"),
        ([zeros(1, 4, 8, 16, dtype=torch.bfloat16), zeros(1, 2, 8, 16)], "one floating dtype"),
        ([zeros(1, 4, 8, 24), zeros(1, 2, 8, 24)], "head size is 24"),
        ([zeros(1, 4, 8, 16), zeros(1, 2, 8, 16, requires_grad=True)], "gradients are recorded"),
        ([zeros(1, 4, 8, 16, requires_grad=True), zeros(1, 2, 8, 16)], "gradients are recorded"),
        ([zeros(1, 4, 8, 16, device="meta"), zeros(1, 2, 8, 16)], "on one device, got meta, cpu"),
        ([zeros(1, 4, 8, 16), zeros(1, 2, 8, 16, device="meta")], "on one device, got cpu, meta"),
        ([zeros(1, 4, 8, 16, device="meta"), zeros(1, 2, 8, 16, device="meta")], "takes tensors on the CPU, got meta"),
        ([zeros(1, 4, 8, 16), zeros(1, 2, 8, 32)], "batch and head_dim"),
        ([zeros(2, 4, 8, 16), zeros(1, 2, 8, 16)], "batch and head_dim"),
        ([zeros(1, 3, 8, 16), zeros(1, 2, 8, 16)], "multiple"),
        ([zeros(1, 4, 9, 16), zeros(1, 2, 8, 16)], "1 to 8"),
        ([zeros(1, 4, 8, 16), zeros(2, 8, 16)], "shape"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
@pytest.mark.parametrize("operation", [sparse_attention, dense_attention], ids=["sparse", "dense"])
def test_what_the_native_kernels_do_not_take(operation, tensors, words):
    q, k = tensors
    with pytest.raises(ValueError, match=words) as error:
        operation(q, k, k, backend="cpu")
    assert "\n" not in str(error.value) and str(error.value).endswith(".")


@pytest.mark.parametrize("operation", [sparse_attention, dense_attention], ids=["sparse", "dense"])
def test_auto_falls_back_to_pytorch(operation):
    def run(*tensors):
        result = operation(*tensors, **(SMALL if operation is sparse_attention else {}))
        return result[0] if isinstance(result, tuple) else result

    exact = make_inputs(1, 150, 2, 2, 16)
    assert run(*exact).dtype == torch.float64
    assert run(*(t[..., :12].float() for t in exact)).shape == (1, 4, 150, 12)
    leaves = [t.float().requires_grad_() for t in exact]
    grads = torch.autograd.grad(run(*leaves).sum(), leaves)
    assert all(grad.isfinite().all() and (grad != 0).any() for grad in grads[1:])
    with torch.no_grad():
        torch.testing.assert_close(run(*leaves), run(*exact).float(), rtol=1e-5, atol=1e-5)


# Sanitizers. Without optimisation the builds take seconds, and no access is optimised away.

ADDRESS = "-O0 -g1 -fsanitize=address,undefined -fno-sanitize-recover=all"
SMALLER_CODE = " --param asan-instrumentation-with-call-threshold=0"  # gcc: half the time to compile
THREAD = "-O0 -g1 -fsanitize=thread -DMC_STD_THREADS"  # std::thread: TSan does not know gcc's OpenMP


def runtime_of(sanitizer):
    """Path of gcc's shared runtime, which must be loaded first, or a skip."""
    compiler = os.environ.get("CXX", "g++")
    try:
        path = subprocess.run([compiler, f"-print-file-name=lib{sanitizer}.so"], capture_output=True, text=True).stdout
    except FileNotFoundError:
        pytest.skip("no C++ compiler")
    if not Path(path.strip()).is_absolute():
        pytest.skip(f"{compiler} has no shared lib{sanitizer}")
    return path.strip()


def build_library(folder, flags):
    subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", folder / "lib", "--build-temp", folder / "tmp"],
        cwd=ROOT,
        env={**os.environ, "MINICPM4_CXXFLAGS": flags},
        check=True,
        capture_output=True,
    )
    (library,) = (folder / "lib").rglob("_native*")
    return str(library)


@pytest.mark.slow
def test_address_and_undefined_behaviour_sanitizers(tmp_path):
    runtimes = " ".join(map(runtime_of, ("asan", "ubsan")))
    library = build_library(tmp_path, ADDRESS + SMALLER_CODE)
    environment = {
        LIBRARY_VARIABLE: library,
        "LD_PRELOAD": runtimes,
        # new memory is filled with NaN
        "ASAN_OPTIONS": "detect_leaks=0:max_malloc_fill_size=1000000000:malloc_fill_byte=255",
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }
    for i, name in enumerate(NAMES):
        document = sweep(threads=1 if i else 3, **environment, **{ISA_VARIABLE: name})
        assert document["isa"] == name


@pytest.mark.slow
def test_thread_sanitizer(tmp_path):
    library = build_library(tmp_path, THREAD)
    options = {LIBRARY_VARIABLE: library, "LD_PRELOAD": runtime_of("tsan"), "TSAN_OPTIONS": "halt_on_error=1"}
    assert sweep(threads=4, **options)["threads"] == 4
