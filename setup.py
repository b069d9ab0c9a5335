"""Packaging: the one place of the version, the dependencies and the map from import names to folders."""

from pathlib import Path

from setuptools import find_packages, setup

# Import name -> folder. conversion/ and eval/ are packages themselves; kernels/ holds one package a kernel and is none
# itself: an __init__.py there would shadow Hugging Face's `kernels` for whoever runs Python in this folder.
# What `minicpm4_hf.kernels` exports is written in src/minicpm4_hf/kernels/__init__.py.
package_dir = {"": "src", "minicpm4_hf.conversion": "conversion", "minicpm4_hf.eval": "eval"}
for top in ("kernels", "conversion", "eval"):
    for name in find_packages(top):
        package_dir[f"minicpm4_hf.{top}.{name}"] = f"{top}/{name.replace('.', '/')}"

# SERVE is what `transformers serve` asks for.
SERVE = ["accelerate>=1.10", "fastapi", "openai>=1.98", "pydantic>=2", "rich", "starlette", "uvicorn"]
TRAIN = ["accelerate>=1.10", "peft>=0.18"]
DEV = ["pytest>=8", "ruff>=0.12"]

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
        "": ["py.typed", "*.cpp", "*.h", "*.jsonl", "*.jinja"],
        "minicpm4_hf": ["assets/*.txt", "assets/*.md", "checkpoints/*/*"],
    },
    install_requires=["torch>=2.11", "transformers>=5.17,<6", "safetensors"],
    extras_require={
        "serve": SERVE,
        "train": TRAIN,
        "gpu": ["triton"],
        "eval": ["datasets", "evaluate", "matplotlib"],
        "llama_cpp": ["llama-cpp-python>=0.3.36", "gguf>=0.19"],  # compiled at install
        "dev": DEV,
        "test": [*DEV, *SERVE, *TRAIN],
    },
    entry_points={"console_scripts": ["minicpm4 = minicpm4_cli:main"]},
    classifiers=[
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
