"""FullySharded: a training whose weights, gradients and optimizer states are divided among the processes (FSDP2).

    Trainer(strategy=FullySharded(), devices=2)      # conf/trainer/fsdp.yaml: python train.py trainer=fsdp

Every process takes its parts of a step as with DDP, and the step is the same one. The frozen base model is divided by
blocks, its embeddings are not; the hypernetwork is one unit: its weights are whole from its forward to its backward.
Checkpoints hold whole tensors, so a run can go on with another number of processes, or without this strategy.
"""

import warnings
from collections.abc import Mapping
from typing import Any

import lightning as L
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.trainer.states import TrainerStatus
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from hypernet.base.targets import find_blocks


class FullySharded(DDPStrategy):
    """DDP's processes, with fully_shard in the place of its copies of the model."""

    def model_to_device(self) -> None:
        # Before the model is moved: each block is divided as it arrives, so that no device holds all of them.
        shard(self.lightning_module, init_device_mesh(self.root_device.type, (self.world_size,)))
        super().model_to_device()

    def configure_ddp(self) -> None:
        """There is nothing left to wrap."""

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Whole tensors on the CPU; what does not train and is divided stays so, for checkpoints leave it out."""
        trained = {name for name, p in self.lightning_module.named_parameters() if p.requires_grad}
        state = self.lightning_module.state_dict()
        return {name: whole(tensor).cpu() if name in trained else tensor for name, tensor in state.items()}

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Whole tensors on the CPU."""
        found = super().optimizer_state(optimizer)
        states = {
            number: {name: whole(value).cpu() if isinstance(value, Tensor) else value for name, value in state.items()}
            for number, state in found["state"].items()
        }
        return {**found, "state": states}

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Takes whole tensors, as every strategy saves them."""
        divided = []
        for optimizer, saved in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            states = {
                number: {name: _divided_like(value, parameters[number]) for name, value in state.items()}
                for number, state in saved["state"].items()
            }
            divided.append({**saved, "state": states})
        super().load_optimizer_state_dict({**checkpoint, "optimizer_states": divided})

    def teardown(self) -> None:
        # The module writes its result after this, on the first process alone, which cannot collect the parts by itself.
        # After an error the others may not be there any more.
        module, collected = self.lightning_module, []
        if module is not None and module.trainer.state.status != TrainerStatus.INTERRUPTED:
            for part in module.modules():
                for name, parameter in part.named_parameters(recurse=False):
                    if isinstance(parameter, DTensor):
                        plain = nn.Parameter(whole(parameter.detach()).cpu(), requires_grad=parameter.requires_grad)
                        collected.append((part, name, plain))
        super().teardown()
        for part, name, plain in collected:
            setattr(part, name, plain)


def shard(module: L.LightningModule, mesh: DeviceMesh) -> None:
    """Divides a `LitBaseModel`'s or `LitDocToLoRA`'s model among the processes of the mesh, in place."""
    # A and B are views of one tensor; nobody writes into them.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    is_trained = hasattr(module, "base_model")  # else the hypernetwork is
    base_model = module.base_model if is_trained else module.model.base_model
    decoder, blocks = find_blocks(base_model)
    for block in getattr(decoder, blocks):
        fully_shard(block, mesh=mesh)
    # The whole base model as well only where its forward is what is called: the context encoder calls the decoder's.
    fully_shard(base_model if is_trained else module.model.hypernetwork, mesh=mesh)


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor that may be divided among processes; then all of them must call this."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _divided_like(value: Any, parameter: Tensor) -> Any:
    """A parameter's part of a state of its shape; anything else as it is."""
    if not isinstance(parameter, DTensor) or not isinstance(value, Tensor) or value.shape != parameter.shape:
        return value
    value = value.to(parameter.device, parameter.dtype)
    return distribute_tensor(value, parameter.device_mesh, parameter.placements)
