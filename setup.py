"""Packaging: the one place of the version, the dependencies and the map from import names to folders."""

import os
import platform
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

# Import name -> folder. conversion/ and eval/ are packages themselves; kernels/ holds one package a kernel and is none
# itself: an __init__.py there would shadow Hugging Face's `kernels` for whoever runs Python in this folder.
# What `minicpm4_hf.kernels` exports is written in src/minicpm4_hf/kernels/__init__.py.
package_dir = {"": "src", "minicpm4_hf.conversion": "conversion", "minicpm4_hf.eval": "eval"}
for top in ("kernels", "conversion", "eval"):
    for name in find_packages(top):
        package_dir[f"minicpm4_hf.{top}.{name}"] = f"{top}/{name.replace('.', '/')}"

# SERVE is what `transformers serve` asks for.
SERVE = ["accelerate>=1.10", "fastapi", "openai>=1.98", "pydantic>=2", "rich", "starlette", "uvicorn"]
TRAIN = ["accelerate>=1.10", "datasets>=4", "matplotlib", "peft>=0.18"]
SFT = ["trl>=1.16,<2"]
GGUF = ["gguf>=0.19"]
GPU = ["triton"]
EVAL = ["accelerate>=1.10", "datasets", "evaluate", "lm-eval>=0.4.13,<0.5", "math-verify", "matplotlib", "pyppmd"]
DEV = ["pytest>=8", "pytest-xdist>=3.6", "ruff>=0.12"]

# The native CPU kernels: one object file an instruction set, each with its own flags, chosen between at run time.
# -march=native would make a library that crashes on the next machine.
AVX2 = ["-mavx2", "-mfma", "-mf16c", "-mbmi", "-mbmi2", "-mlzcnt", "-mpopcnt"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mprefer-vector-width=512"]
AVX512_BF16 = [*AVX512, "-mavx512bf16", "-mavx512vnni"]
AMX = [*AVX512_BF16, "-mamx-tile", "-mamx-bf16"]
INSTRUCTION_SETS = {"amx": AMX, "avx512_bf16": AVX512_BF16, "avx512": AVX512, "avx2": AVX2}
NATIVE_FLAGS = ["-O3", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math"]


class BuildNative(build_ext):
    """Compiles `kernels/cpu/csrc` with g++ or clang; without a compiler the package installs and runs on PyTorch.

    MINICPM4_CXXFLAGS adds flags to every command (a sanitizer's, say).
    """

    def build_extension(self, ext):
        compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
        if compiler is None:
            print(
                "warning: no C++ compiler: the native CPU kernels are left out, PyTorch runs instead", file=sys.stderr
            )
            return
        source, build = Path("kernels/cpu/csrc"), Path(self.build_temp) / "cpu"
        build.mkdir(parents=True, exist_ok=True)
        extra = os.environ.get("MINICPM4_CXXFLAGS", "").split()

        def compile_object(name, source_name, flags):
            command = [compiler, *flags, "-c", str(source / source_name), "-o", str(build / f"{name}.o")]
            try:
                failed = subprocess.run(command).returncode
            except OSError as error:
                failed = error
            if failed:
                print(f"warning: {name} did not compile ({failed}): {' '.join(command)}", file=sys.stderr)
                return None
            return name

        # Threads of the OpenMP pool that torch has (on Linux libgomp's, called by name, so that any compiler will do),
        # or, from a compiler without OpenMP, threads started at each call.
        pool = "-DMC_GOMP" if sys.platform == "linux" else "-fopenmp"
        for threads in ([pool], ["-DMC_STD_THREADS", "-pthread"]):
            flags = [*NATIVE_FLAGS, *threads, *extra]
            sets = {"portable": []}
            if platform.machine().lower() in ("x86_64", "amd64"):
                sets.update(INSTRUCTION_SETS)
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                jobs = [
                    pool.submit(compile_object, name, f"isa_{name}.cpp", flags + isa) for name, isa in sets.items()
                ]
                built = [job.result() for job in jobs if job.result()]
            if "portable" in built:
                break
        else:
            print("warning: the native CPU kernels did not compile, PyTorch runs instead", file=sys.stderr)
            return
        defines = [f"-DMC_HAS_{name.upper()}" for name in built]
        compile_object("library", "library.cpp", flags + defines)
        # OpenMP is compiled for but not linked: its functions come from the library that torch has loaded.
        link = ["-undefined", "dynamic_lookup"] if sys.platform == "darwin" else ["-Wl,-s"] * (not extra)
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(f".{target.name}.{os.getpid()}")
        objects = [str(build / f"{name}.o") for name in (*built, "library")]
        self.spawn([compiler, "-shared", *extra, "-o", str(partial), *objects, *link])
        partial.replace(target)  # a running process may have the old one mapped


setup(
    name="minicpm4-hf",
    version="0.1.0",
    description="MiniCPM4 for transformers 5: trainable sparse attention, long context, conversion and evaluation",
    long_description=Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=[*find_packages("src"), *filter(None, package_dir)],
    package_dir=package_dir,
    package_data={
        "": ["py.typed", "*.jsonl", "*.jinja"],
        "minicpm4_hf": ["assets/*.txt", "assets/*.md", "checkpoints/*/*", "training/recipes/*.json"],
        "minicpm4_hf.eval": ["*.json"],
    },
    ext_modules=[Extension("minicpm4_hf.kernels.cpu._native", sources=[], optional=True)],
    cmdclass={"build_ext": BuildNative},
    install_requires=["torch>=2.11", "transformers>=5.23,<6", "safetensors"],
    extras_require={
        "serve": SERVE,
        "train": TRAIN,
        "sft": [*TRAIN, *SFT],
        "gpu": GPU,
        "gguf": GGUF,
        "eval": EVAL,
        "llama_cpp": [*GGUF, "llama-cpp-python>=0.3.36"],  # compiled at install
        "dev": DEV,
        "test": [*DEV, *SERVE, *TRAIN, *SFT, *GGUF, *GPU, *EVAL],
    },
    entry_points={"console_scripts": ["minicpm4 = minicpm4_cli:main"]},
    classifiers=[
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
