"""What runs in several processes: a comparison, and callbacks, which train.py takes as +callbacks.x={_target_: ...}.

python -m tests.two_processes <base model's folder>     the comparison, in two processes
"""

import socket
import sys
from pathlib import Path

import lightning as L
import torch
from torch.distributed.tensor import DTensor

from hypernet.training.run_state import at_step_end


class SameWeights(L.Callback):
    """Fails at the first step after which the processes' weights differ; says in a file what it has seen."""

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        own = torch.cat([p.detach().flatten() for p in module.model.hypernetwork.parameters()])
        every = [torch.empty_like(own) for _ in range(trainer.world_size)]
        torch.distributed.all_gather(every, own)
        if not all(torch.equal(one, own) for one in every):
            raise RuntimeError(f"The processes' weights differ after step {trainer.global_step}.")
        if trainer.is_global_zero:
            Path("same_weights.txt").write_text(f"{trainer.global_step} steps, {trainer.world_size} processes")


class DividedWeights(L.Callback):
    """Fails unless this process holds its part alone of what trains, of the optimizer's states and of the blocks."""

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if not at_step_end(trainer, batch_idx):
            return
        share = 1 / trainer.world_size
        trained = [p for p in module.parameters() if p.requires_grad]
        states = [t for state in trainer.optimizers[0].state.values() for t in state.values() if t.ndim]
        blocks = [p for name, p in module.named_parameters() if ".layers." in name and "base_model." in name]
        for name, tensors in (("weights", trained), ("states", states), ("blocks", blocks)):
            held = sum(t.to_local().numel() if isinstance(t, DTensor) else t.numel() for t in tensors)
            of = sum(t.numel() for t in tensors)
            if not 0 < held <= (share + 0.05) * of:
                raise RuntimeError(f"This process holds {held} of {of} {name}.")
        if trainer.is_global_zero:
            Path("divided_weights.txt").write_text(f"{trainer.global_step} steps, {trainer.world_size} processes")


class InterruptedIn(L.Callback):
    """Ctrl-C while this is made, or when Lightning begins to fit."""

    def __init__(self, stage):
        if stage == "build":
            raise KeyboardInterrupt

    def on_fit_start(self, trainer, module):
        raise KeyboardInterrupt


def compare_gradients(rank, base_model_folder, ports):
    """`compare_gradients_of` for each task, by its port."""
    for task, port in ports.items():
        compare_gradients_of(task, rank, base_model_folder, port)


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def compare_gradients_of(task, rank, base_model_folder, port):
    """Fails unless this process's part of a step gives, with divided weights, the gradients of the whole step."""
    from torch.distributed.device_mesh import init_device_mesh

    from hypernet.base.base_model import load_base_model
    from hypernet.data.batches import BaseModelBatches, DistillationBatches
    from hypernet.data.curriculum import Curriculum
    from hypernet.data.encyclopedia import Encyclopedia
    from hypernet.data.splitting import split
    from hypernet.doc_to_lora import DocToLoRA
    from hypernet.training.callbacks import checkpoint_activations
    from hypernet.training.lit_base_model import LitBaseModel
    from hypernet.training.lit_doc_to_lora import LitDocToLoRA
    from hypernet.training.sharding import shard, whole
    from tests.small_trainings import objective

    torch.set_num_threads(1)
    stage = {"steps": 1, "batch_size": 4, "num_joined_documents": [1, 2], "num_cross_document": 1, "reordering": 0.5}
    curriculum = Curriculum(Encyclopedia("train"), [stage])

    def make():
        torch.manual_seed(0)
        base_model, tokenizer = load_base_model(base_model_folder)
        if task == "base_model":
            module = LitBaseModel(base_model=base_model.requires_grad_(True), tokenizer=tokenizer, optimizer={})
            return module, BaseModelBatches(curriculum, tokenizer)[0]
        aggregator = {"name": "perceiver", "latent_dim": 16, "num_latents": 3, "num_blocks": 1}
        model = DocToLoRA.build(
            base_model=base_model,
            tokenizer=tokenizer,
            target_modules=["down_proj"],
            hypernetwork={"rank": 2, "aggregator": {**aggregator, "num_heads": 2, "num_kv_heads": 1, "head_dim": 8}},
            context_encoder={"kind": "per_layer_activations"},
            max_chunk_tokens=30,
        )
        with torch.no_grad():
            for parameter in model.hypernetwork.parameters():
                parameter += 0.3 * torch.randn_like(parameter)
        checkpoint_activations(base_model)
        module = LitDocToLoRA(model=model, objective=objective(nll=0.5), optimizer={})
        return module, DistillationBatches(curriculum, tokenizer, max_chunk_tokens=30)[0]

    def gradients(module, part):
        module._finish = lambda part, losses: losses["loss"] * part.num_parts  # there is no trainer to log to
        module.training_step(part, 0).backward()
        if task == "doc_to_lora":
            module.model.injector.clear()
        return {name: whole(p.grad) for name, p in module.named_parameters() if p.requires_grad}

    (one, batch), (divided, _) = make(), make()
    expected = gradients(one, split(batch, 0, 1))
    address = {"init_method": f"tcp://127.0.0.1:{port}", "rank": rank, "world_size": 2}
    torch.distributed.init_process_group("gloo", **address)
    try:
        shard(divided, init_device_mesh("cpu", (2,)))
        found = gradients(divided, split(batch, rank, 2))
        size = max(gradient.abs().max() for gradient in expected.values())
        for name, gradient in expected.items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6 * float(size), msg=name)
    finally:
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    ports = {task: free_port() for task in ("doc_to_lora", "base_model")}
    torch.multiprocessing.start_processes(compare_gradients, (sys.argv[1], ports), nprocs=2, start_method="fork")
