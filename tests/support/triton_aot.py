"""Compile Triton kernels for a GPU that is not there: what the host code launches, with its own launch settings."""

import multiprocessing
import os
import re
import subprocess
import tempfile
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

TYPES = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int32: "*i32",
    torch.int64: "*i64",
}
# Bytes of shared memory that one program may have.
SHARED_LIMITS = {80: 163 * 1024, 90: 227 * 1024}
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
OPTIONS = ("num_warps", "num_stages", "num_ctas")


@dataclass(frozen=True)
class Launch:
    """One kernel with the argument types and constants of one launch."""

    kernel: JITFunction
    signature: tuple
    constants: tuple
    aligned: tuple
    options: tuple


@contextmanager
def record_launches():
    """Inside, kernels are not run: the set of distinct launches fills up instead. Pass tensors on device "meta"."""
    launches = {}

    def run(self, *args, grid, warmup, **kwargs):
        options = tuple((name, kwargs.pop(name)) for name in OPTIONS if name in kwargs)
        values = dict(zip(self.arg_names, args)) | kwargs
        assert list(values) and set(values) == set(self.arg_names), set(self.arg_names) ^ set(values)
        signature, constants, aligned = {}, {}, []
        for i, (name, parameter) in enumerate(zip(self.arg_names, self.params)):
            value = values[name]
            if parameter.is_constexpr or value is None or (isinstance(value, int) and value == 1):
                signature[name] = "constexpr"
                constants[name] = value
            elif isinstance(value, torch.Tensor):
                signature[name] = TYPES[value.dtype]
                aligned.append(i)
            elif isinstance(value, int):
                signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
                if value % 16 == 0:
                    aligned.append(i)
            else:
                signature[name] = "fp32"
        launch = Launch(self, tuple(signature.items()), tuple(constants.items()), tuple(aligned), options)
        launches[launch] = launch

    original = JITFunction.run
    JITFunction.run = run
    try:
        yield launches
    finally:
        JITFunction.run = original


@dataclass(frozen=True)
class Report:
    registers: int
    spilled_bytes: int
    shared_bytes: int
    sass: str


def compile_for(launch: Launch, capability: int, with_sass: bool = False) -> Report:
    """The compiler's own report on a kernel for sm_`capability`."""
    source = ASTSource(
        launch.kernel,
        signature=dict(launch.signature),
        constexprs={(launch.kernel.arg_names.index(name),): value for name, value in launch.constants},
        attrs={(i,): [["tt.divisibility", 16]] for i in launch.aligned},
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=dict(launch.options))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(compiled.asm["cubin"])
        usage = subprocess.run(
            [CUOBJDUMP, "--dump-resource-usage", path], capture_output=True, text=True, check=True
        ).stdout
        sass = ""
        if with_sass:
            sass = subprocess.run([CUOBJDUMP, "-sass", path], capture_output=True, text=True, check=True).stdout
    numbers = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    # A stack frame may hold other things than registers, barriers among them: the assembler says which.
    spilled = count_spills(compiled.asm["ptx"], capability) if numbers["STACK"] + numbers["LOCAL"] else 0
    return Report(numbers["REG"], spilled, compiled.metadata.shared, sass)


def count_spills(ptx: str, capability: int) -> int:
    """Bytes of registers that the assembler stores and loads again, called as Triton calls it."""
    target = re.search(r"^\.target (\w+)", ptx, re.MULTILINE)[1]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.ptx"
        path.write_text(ptx)
        command = [get_ptxas(capability).path, "-v", "-lineinfo", "--regAllocOptLevel=2", f"--gpu-name={target}", path]
        done = subprocess.run([*command, "-o", path.with_suffix(".cubin")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return sum(map(int, re.findall(r"(\d+) bytes spill (?:stores|loads)", done.stderr)))


def compile_all(launches: list[Launch], capability: int) -> list[Report]:
    """The reports on several launches, which as many processes compile as there are cores."""
    _TASKS[:] = [(launch, capability) for launch in launches]  # kernels cannot be pickled: children inherit them
    with multiprocessing.get_context("fork").Pool(min(len(launches), os.cpu_count() or 1)) as pool:
        return pool.map(_compile_task, range(len(_TASKS)), chunksize=1)


_TASKS: list[tuple[Launch, int]] = []


def _compile_task(number: int) -> Report:
    return compile_for(*_TASKS[number])
