"""The tree keeps its shape: who may import whom, what an import costs, what is documented, what is shipped."""

import ast
import importlib.util
import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors import safe_open
from transformers.dynamic_module_utils import get_relative_imports

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "src" / "minicpm4_hf"
CHECKPOINT = PACKAGE / "checkpoints" / "minicpm4-books"

# Where the packages lie: folder -> the import name of what is in it.
FOLDERS = {
    ROOT / "src": "",
    ROOT / "kernels": "minicpm4_hf.kernels.",
    ROOT / "conversion": "minicpm4_hf.conversion.",
    ROOT / "eval": "minicpm4_hf.eval.",
}


def module_name(path):
    """Import name of one of our files; a package's is its own name, not `__init__`."""
    folder = next(folder for folder in FOLDERS if folder in path.parents)
    parts = path.relative_to(folder).with_suffix("").parts
    parts = parts[:-1] if parts[-1] == "__init__" else parts
    return (FOLDERS[folder] + ".".join(parts)).rstrip(".")


MODULES = {module_name(path): path for folder in FOLDERS for path in sorted(folder.rglob("*.py"))}


def imported_modules(name):
    """Full names that a module of ours imports anywhere in it, `from x import y` giving both `x` and `x.y`."""
    path = MODULES[name]
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            source = importlib.util.resolve_name("." * node.level + (node.module or ""), package)
            names.add(source)
            names.update(f"{source}.{alias.name}" for alias in node.names)
    return names


def is_within(name, packages):
    return any(name == package or name.startswith(package + ".") for package in packages)


def remote_code_files():
    """What `save_pretrained` copies: the modeling file and every sibling it reaches."""
    files, queue = set(), ["modeling_minicpm4"]
    while queue:
        stem = queue.pop()
        if stem not in files:
            files.add(stem)
            names = imported_modules(f"minicpm4_hf.{stem}")
            queue += {name.split(".")[1] for name in names if name.startswith("minicpm4_hf.")}
    return sorted(files)


REMOTE_CODE = remote_code_files()
MODELING = ["minicpm4_hf.modeling_minicpm4"]

# (who, must not import, except): the arrows of the tree, one line each.
FORBIDDEN = [
    (["minicpm4_hf"], ["minicpm4_hf.conversion"], ["minicpm4_hf.conversion", "minicpm4_hf.eval"]),
    (["minicpm4_hf", "minicpm4_cli"], ["minicpm4_hf.eval"], ["minicpm4_hf.eval"]),
    (["minicpm4_hf"], ["minicpm4_cli"], ["minicpm4_hf.__main__", "minicpm4_hf.conversion", "minicpm4_hf.eval"]),
    (["minicpm4_hf.kernels"], MODELING, []),
    ([f"minicpm4_hf.{stem}" for stem in REMOTE_CODE], ["minicpm4_hf.kernels"], []),
    (["minicpm4_hf.configuration_minicpm4", "minicpm4_hf.sparse_attention"], MODELING, []),
]


@pytest.mark.parametrize(("who", "forbidden", "exempt"), FORBIDDEN, ids=lambda names: "+".join(names) or "none")
def test_import_direction(who, forbidden, exempt):
    checked = [name for name in MODULES if is_within(name, who) and not is_within(name, exempt)]
    assert checked
    wrong = [(name, other) for name in checked for other in imported_modules(name) if is_within(other, forbidden)]
    assert not wrong


def test_remote_code_is_self_contained():
    assert {"configuration_minicpm4", "modeling_minicpm4", "sparse_attention", "sparse_cache"} <= set(REMOTE_CODE)
    for stem in REMOTE_CODE:
        path = PACKAGE / f"{stem}.py"
        siblings = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.level:
                assert node.level == 1 and node.module in REMOTE_CODE, f"{path.name}:{node.lineno}"
                siblings.add(node.module)
                continue
            roots = [node.module] if isinstance(node, ast.ImportFrom) else []
            roots += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            for root in (name.split(".")[0] for name in roots):
                allowed = {"torch", "transformers", "huggingface_hub", *sys.stdlib_module_names}
                assert root in allowed, f"{path.name}:{node.lineno} imports {root}"
        # transformers finds siblings with a regular expression, which also reads docstrings.
        assert set(get_relative_imports(path)) == siblings, path.name


def test_kernels_folder_is_no_package():
    assert not (ROOT / "kernels" / "__init__.py").exists(), "it would shadow Hugging Face's `kernels`"


@pytest.mark.parametrize("name", MODULES)
def test_module_is_installed_from_here(name):
    spec = importlib.util.find_spec(name)
    assert spec is not None, "run `pip install -e .` again: a folder is new since the last time"
    assert Path(spec.origin).resolve() == MODULES[name]


def loaded_packages(statement):
    """Top-level packages in memory after a statement in a fresh process, the standard library's left out."""
    code = f"{statement}\nimport json, sys\nprint(json.dumps(sorted({{m.split('.')[0] for m in sys.modules}})))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd="/")
    return set(json.loads(run.stdout.splitlines()[-1])) - sys.stdlib_module_names


def test_import_brings_nothing_that_transformers_does_not():
    plain = loaded_packages(
        "import safetensors.torch, transformers.integrations.sdpa_attention\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM"
    )
    ours = loaded_packages("import minicpm4_hf")
    # Editable installs leave a finder module behind, under a name of its own.
    extra = {name for name in ours - plain if not name.startswith("__editable__")}
    assert extra == {"minicpm4_hf"}


def test_torchvision_is_absent():
    assert importlib.util.find_spec("torchvision") is None, "its index build is for another torch and breaks imports"


@pytest.mark.parametrize("name", MODULES)
def test_public_functions_are_documented(name):
    tree = ast.parse(MODULES[name].read_text(encoding="utf-8"))
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef) and not node.name.startswith("_")]
    assert ast.get_docstring(tree), "the module says what it is"
    # `main` is a command: the module's docstring is its text.
    assert not [node.name for node in functions if not ast.get_docstring(node) and node.name != "main"]


def repository_files():
    """Tracked files and those that are about to be."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listing = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if listing.returncode:
        pytest.skip("not a git checkout")
    return [ROOT / name for name in listing.stdout.split("\0") if name and (ROOT / name).is_file()]


def test_no_file_is_too_long():
    lengths = {
        path.relative_to(ROOT).as_posix(): len(path.read_text(encoding="utf-8").splitlines())
        for path in repository_files()
        if path.suffix == ".py" and ROOT / "tests" not in path.parents
    }
    assert not {name: length for name, length in lengths.items() if length > 600}


# Paths of one machine and words about how the work was organised say nothing to a reader of the tree.
OUT_OF_PLACE = re.compile(
    r"/work/|/opt/mc|\bhelper-\d|\b(?:this|earlier|previous|next|last) session\b|\bissue #\d", re.IGNORECASE
)


def test_no_file_tells_of_its_making():
    found = []
    for path in repository_files():
        if path == Path(__file__).resolve() or (path.parent.name == "assets" and path.suffix == ".txt"):
            continue
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError:
            continue
        found += [f"{path.relative_to(ROOT)}:{n}" for n, line in enumerate(lines, 1) if OUT_OF_PLACE.search(line)]
    assert not found


@pytest.mark.skipif(not CHECKPOINT.is_dir(), reason="no checkpoint is shipped")
def test_shipped_checkpoint_is_small():
    files = [path for path in CHECKPOINT.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 12_000_000
    num_parameters = 0
    for path in CHECKPOINT.glob("*.safetensors"):
        with safe_open(path, framework="pt") as tensors:
            num_parameters += sum(math.prod(tensors.get_slice(name).get_shape()) for name in tensors.keys())
    assert 0 < num_parameters <= 6_000_000
