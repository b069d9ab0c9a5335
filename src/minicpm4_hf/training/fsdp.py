"""Training with weights, gradients and moments sharded over the processes: FSDP2, `fully_shard` of PyTorch.

transformers' Trainer and accelerate do the sharding (one group a decoder layer), the clipping and the checkpoints.
Here is what a MiniCPM4 run needs besides: processes on CPUs, the precision, a saved model that is the one of an
unsharded run, and moments that a stage takes over from the stage before.

Under `precision="bf16"` the layers compute in bfloat16 altogether, from weights that are gathered in bfloat16, as the
model does at inference; without sharding only matrix products do (autocast). Weights, moments and the sums of
gradients are float32 in both. Autocast would keep its bfloat16 copy of every gathered weight until the backward pass,
which is what sharding is to avoid.
"""

import os
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from torch.distributed.tensor import distribute_tensor
from transformers import Trainer, TrainerCallback

from minicpm4_hf.training.schedule import load_moments_

MOMENTS = "optimizer.bin"  # in a checkpoint: accelerate's name, by names of parameters, whole tensors


def fsdp_settings(fsdp: bool, world_size: int) -> dict:
    """The arguments of transformers' `TrainingArguments` that shard a run, or none.

    Raises:
        ValueError: one process, which has nothing to share; or accelerate's launcher turned FSDP on by itself, with
            settings that do not keep muP's groups and the saved model.
    """
    if not fsdp:
        if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
            raise ValueError(
                "The environment turns FSDP on (ACCELERATE_USE_FSDP, of `accelerate launch --use_fsdp`) and the "
                "recipe does not: set the recipe's `fsdp` to true, and launch with `torchrun` or without `--use_fsdp`."
            )
        return {}
    if world_size == 1:
        raise ValueError(
            "`fsdp` shards a model over processes and this is the only one: start several with `torchrun "
            "--nproc_per_node N -m minicpm4_cli train ...`, or set `fsdp` to false."
        )
    # Whole tensors in checkpoints: a sharded one has its table of contents as a pickle.
    return {"fsdp": True, "fsdp_config": {"version": 2, "state_dict_type": "FULL_STATE_DICT"}}


class FSDPTrainer(Trainer):
    """A Trainer whose `args.fsdp` also works on CPUs, and which saves a sharded model under its own class."""

    def create_accelerator_and_postprocess(self):
        settings = self.args.fsdp_plugin_args
        if settings is not None and self.args.bf16:
            # accelerate's own would also round the loss and the sums of gradients; cosine and sine stay float32.
            settings["mixed_precision_policy"] = MixedPrecisionPolicy(
                param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False
            )
        super().create_accelerator_and_postprocess()
        if settings is not None and not self.is_fsdp_enabled:
            # accelerate takes FSDP to be for accelerators only and would train unsharded; PyTorch shards on CPUs too.
            state = self.accelerator.state
            state.fsdp_plugin = FullyShardedDataParallelPlugin(**settings)
            state.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
            self.is_fsdp_enabled = True

    def _save(self, output_dir=None, state_dict=None):
        sharded = type(self.model)
        if not issubclass(sharded, FSDPModule):
            return super()._save(output_dir, state_dict)
        # `fully_shard` makes a class of its own on the fly: saved under it, the folder's code would be PyTorch's. And
        # gathered tensors no longer share memory, so that tied ones would be written twice.
        self.model.__class__ = sharded.__bases__[1]
        tied = self.model.all_tied_weights_keys
        try:
            super()._save(output_dir, {name: value for name, value in state_dict.items() if name not in tied})
        finally:
            self.model.__class__ = sharded


class ShardedMoments(TrainerCallback):
    """Gives each process its part of an earlier stage's moments when training begins, after the model is sharded.

    Args:
        path: `MOMENTS` of a checkpoint, on a disk that every process reads.

    Raises:
        ValueError: (when training begins) the checkpoint is of a model with other parameters.
    """

    def __init__(self, path: Path):
        self.path = path

    def on_train_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
        whole = torch.load(self.path, map_location="cpu", mmap=True, weights_only=True)["state"]
        names = {parameter: name for name, parameter in model.named_parameters()}
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        missing = {names[parameter] for parameter in parameters} ^ set(whole)
        if missing:
            raise ValueError(
                f"The moments in {str(self.path)!r} are of another model: {min(missing)!r} is not in both; set "
                "`keep_moments` of this stage to false."
            )
        moments = {}
        for number, parameter in enumerate(parameters):
            moments[number] = {
                key: distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None).clone()
                if value.ndim  # not the number of steps
                else value
                for key, value in whole[names[parameter]].items()
            }
        load_moments_(optimizer, {"state": moments, "param_groups": optimizer.state_dict()["param_groups"]})


__all__ = ["MOMENTS", "FSDPTrainer", "ShardedMoments", "fsdp_settings"]
