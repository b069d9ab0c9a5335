"""The tensor-parallel plan run for real: two CPU processes give the logits of one, sparse attention included."""

import subprocess
import sys

import pytest
import torch
from small_models import build_model

SCRIPT = """
import sys, torch
import minicpm4_hf
from transformers import AutoModelForCausalLM
folder = sys.argv[1]
model = AutoModelForCausalLM.from_pretrained(folder, tp_plan="auto").eval()
ids = torch.load(folder + "/ids.pt", weights_only=True)
with torch.no_grad():
    logits = model(ids).logits
weight = model.model.layers[0].self_attn.q_proj.weight
local = weight.to_local() if hasattr(weight, "to_local") else weight
if torch.distributed.get_rank() == 0:
    torch.save((logits, local.shape[0]), folder + "/result.pt")
torch.distributed.barrier()
torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
def test_two_processes_give_the_logits_of_one(tokens, tmp_path):
    model = build_model()
    model.save_pretrained(tmp_path)
    ids = tokens(1, 120)
    torch.save(ids, tmp_path / "ids.pt")
    (tmp_path / "run.py").write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    result = subprocess.run(
        [*command, str(tmp_path / "run.py"), str(tmp_path)], capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr
    logits, local_rows = torch.load(tmp_path / "result.pt", weights_only=True)
    assert local_rows == model.config.num_attention_heads * model.config.head_dim // 2
    with torch.no_grad():
        torch.testing.assert_close(logits, model(ids).logits, rtol=0, atol=1e-4)
