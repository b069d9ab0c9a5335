"""A saved folder loads with `trust_remote_code=True` where the package is not installed, and stays sparse."""

import json
import subprocess
import sys

import pytest
import torch
from small_models import build_model
from transformers import AutoModelForCausalLM

FILES = ["configuration_minicpm4.py", "modeling_minicpm4.py", "sparse_attention.py", "sparse_cache.py"]

# The package is made unimportable first, however it was installed.
SCRIPT = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name == "minicpm4_hf" or name.startswith("minicpm4_hf."):
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Blocked())
import torch
from transformers import AutoModelForCausalLM
folder, again = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
assert "minicpm4_hf" not in sys.modules
assert type(model).__module__.startswith("transformers_modules."), type(model).__module__
ids = torch.load(folder + "/ids.pt", weights_only=True)
with torch.no_grad():
    out = model(ids, use_cache=True)
    torch.save(out.logits, folder + "/logits.pt")
print(type(out.past_key_values.layers[0]).__name__)
model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, num_beams=2)
model.save_pretrained(again)
reloaded = AutoModelForCausalLM.from_pretrained(again, trust_remote_code=True)
with torch.no_grad():
    assert torch.equal(reloaded(ids).logits, out.logits)
"""


@pytest.fixture
def saved(tokens, tmp_path):
    model = build_model()
    folder = tmp_path / "model"
    model.save_pretrained(folder)
    ids = tokens(1, 120)
    torch.save(ids, folder / "ids.pt")
    return model, folder, ids


def test_the_folder_holds_the_remote_code_files(saved):
    _, folder, _ = saved
    assert sorted(path.name for path in folder.glob("*.py")) == FILES
    config = json.loads((folder / "config.json").read_text())
    assert config["auto_map"]["AutoModelForCausalLM"] == "modeling_minicpm4.MiniCPM4ForCausalLM"
    assert config["auto_map"]["AutoConfig"] == "configuration_minicpm4.MiniCPM4Config"


def test_with_the_package_its_own_classes_win(saved):
    model, folder, ids = saved
    for trust in (None, True):
        loaded = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=trust)
        assert type(loaded) is type(model)
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_without_the_package(saved, tmp_path):
    model, folder, ids = saved
    with torch.no_grad():
        expected = model(ids).logits
        model.config.sparse_config = None
        dense = model(ids).logits
    environment = {"PATH": "/usr/bin:/bin", "HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
    arguments = [sys.executable, "-I", "-c", SCRIPT, str(folder), str(tmp_path / "again")]
    result = subprocess.run(arguments, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "SparseLayer" in result.stdout
    assert sorted(path.name for path in (tmp_path / "again").glob("*.py")) == FILES
    got = torch.load(folder / "logits.pt", weights_only=True)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)
    assert (got - dense).abs().max() > 1e-2
