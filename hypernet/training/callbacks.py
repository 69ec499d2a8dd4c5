"""What watches over a training run: signals, losses that are not finite, speed, and what layers keep for backward.

    Trainer(callbacks=[NonFiniteGuard(), Throughput(), StopOnSignal(), RunCheckpoint(...)])

Each is one entry below `callbacks` in conf/train.yaml; train.py adds `RunCheckpoint`, and the bar where there is one.
"""

import logging
import os
import signal
import subprocess
import threading
import time
from pathlib import Path
from types import FrameType
from typing import Any

import lightning as L
import torch
from lightning.fabric.plugins.environments import SLURMEnvironment
from lightning.pytorch.callbacks import RichProgressBar
from torch import Tensor, nn

from hypernet.training.run_state import RunCheckpoint, at_step_end
from hypernet.training.sharding import whole

log = logging.getLogger(__name__)


class StopOnSignal(L.Callback):
    """SIGTERM, SIGUSR1 or Ctrl-C: finish the optimizer step, write a checkpoint, exit with 128 + the signal's number.

    On SLURM, SIGUSR1 (ask for it with --signal=SIGUSR1@90) also puts the job back into the queue; run it with
    ckpt_path=auto. A second Ctrl-C stops at once. With several processes it is enough that one of them is told.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)

    def __init__(self) -> None:
        self.received: int | None = None
        self._stopping: int | None = None  # what all processes agreed on

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # Lightning's own handlers come before this, and it puts the previous ones back in the end. On SLURM its SIGUSR1
        # would save in the middle of a step.
        if threading.current_thread() is threading.main_thread():  # Python lets no other one set handlers
            for number in self.SIGNALS:
                signal.signal(number, self._receive)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        self.received = number
        log.warning("%s: stopping with a checkpoint at the end of this optimizer step.", signal.Signals(number).name)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if at_step_end(trainer, batch_idx):
            self._save_if_told(trainer)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._save_if_told(trainer)

    def _save_if_told(self, trainer: L.Trainer) -> None:
        # A signal between Lightning's handlers and ours is in received_sigterm.
        own = self.received or (signal.SIGTERM if trainer.received_sigterm else 0)
        if trainer.world_size > 1:
            agreed = torch.tensor(int(own), device=trainer.strategy.root_device)
            own = int(trainer.strategy.reduce(agreed, reduce_op="max"))
        self._stopping = own or None
        if self._stopping:
            checkpoint_of(trainer).save(trainer)

    # Only now: the step's losses have been logged by then.

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._exit_if_saved(trainer)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._exit_if_saved(trainer)

    def _exit_if_saved(self, trainer: L.Trainer) -> None:
        if self._stopping is None:
            return
        log.warning("Stopped after step %d; go on with ckpt_path=last.", trainer.global_step)
        if not trainer.is_global_zero:
            # The first process's launcher takes another code for a crash and kills what still runs.
            raise SystemExit(0)
        if self._stopping == signal.SIGUSR1 and SLURMEnvironment.detect():
            subprocess.run(["scontrol", "requeue", os.environ["SLURM_JOB_ID"]], check=True)
        raise SystemExit(128 + self._stopping)


def checkpoint_of(trainer: L.Trainer) -> RunCheckpoint:
    """The trainer's RunCheckpoint; ValueError if it has none."""
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, RunCheckpoint):
            return callback
    raise ValueError("The trainer has no RunCheckpoint to save with. Add one to its callbacks.")


class NonFiniteGuard(L.Callback):
    """A loss or gradient that is not finite never reaches the weights: the run stops, or leaves the step out.

    Args:
        on_nan: "stop" with an error, or "skip": the optimizer step is left out and counted in train/skipped.
        max_skipped: steps of a run (not in a row); one more stops it.

    Raises:
        FloatingPointError: naming the step, the parameter and the documents.
    """

    def __init__(self, on_nan: str = "stop", max_skipped: int = 10) -> None:
        if on_nan not in ("stop", "skip"):
            raise ValueError(f"on_nan must be stop or skip, got {on_nan!r}.")
        self.on_nan = on_nan
        self.max_skipped = max_skipped
        self.skipped = 0
        self._losses: list[Tensor] = []
        self._batches: list[Any] = []

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._batches.append(batch)

    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor) -> None:
        self._losses.append(loss.detach())

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        losses, self._losses = self._losses, []
        batches, self._batches = self._batches, []
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        finite = torch.stack(losses).isfinite().all()
        # A loss scaler has its own way with gradients that overflow.
        if getattr(trainer.precision_plugin, "scaler", None) is None and parameters:
            norm = torch.nn.utils.get_total_norm([p.grad for p in parameters])
            finite &= whole(norm).isfinite()
        failed = trainer.strategy.reduce((~finite).int(), reduce_op="sum")
        if not failed:
            return
        self.skipped += 1
        if self.on_nan == "skip" and self.skipped <= self.max_skipped:
            log.warning("%s The step is left out.", self._report(trainer, pl_module, losses, batches))
            for parameter in parameters:
                parameter.grad = None  # AdamW passes over these
            return
        what_to_do = (
            "Checkpoints are from before it. Lower optimizer.lr or look at these documents; on_nan=skip leaves such "
            "steps out."
            if self.on_nan == "stop"
            else f"More than max_skipped={self.max_skipped} steps of this run were left out. Lower optimizer.lr."
        )
        raise FloatingPointError(f"{self._report(trainer, pl_module, losses, batches)} {what_to_do}")

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self.on_nan == "skip" and at_step_end(trainer, batch_idx):
            pl_module.log("train/skipped", float(self.skipped))

    def state_dict(self) -> dict[str, Any]:
        return {"skipped": self.skipped}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.skipped = state_dict["skipped"]

    def _report(self, trainer: L.Trainer, module: L.LightningModule, losses: list[Tensor], batches: list[Any]) -> str:
        bad = [n for n, p in module.named_parameters() if p.grad is not None and not whole(p.grad).isfinite().all()]
        gradient = f"; the gradient of {bad[0]} and {len(bad) - 1} more is not finite" if bad else ""
        texts = [text for batch in batches for text in module.describe(batch)]
        shown = ", ".join(repr(text) for text in texts[:_SHOWN])
        more = f" and {len(texts) - _SHOWN} more" if len(texts) > _SHOWN else ""
        loss = torch.stack(losses).sum().item()
        return f"Step {trainer.global_step}: the loss is {loss}{gradient}. Documents of the step: {shown}{more}."


_SHOWN = 4  # documents in a message


class StepProgressBar(RichProgressBar):
    """Lightning's bar over all steps of a run, with the time left also where the run goes on from a checkpoint.

    Lightning's own total is the steps that are left, while its count goes on from the run's beginning: 6500/1026.
    """

    @property
    def total_train_batches(self) -> int | float:
        if self.trainer.max_steps < 0:  # as many as the data have
            return super().total_train_batches
        return self.trainer.max_steps * self.trainer.accumulate_grad_batches

    def _get_train_description(self, current_epoch: int) -> str:
        return "Training"  # by steps: there is one epoch


class Throughput(L.Callback):
    """Logs speed whenever losses are logged, over the steps since the last time, for all processes together.

    perf/step_s · perf/context_tokens_per_s (of the documents, read by the hypernetwork's encoder) ·
    perf/answer_tokens_per_s · perf/share_encode, _teacher, _student, _backward and _other (data, optimizer, saving,
    validation) · perf/peak_mib (of this process; of the GPU where there is one) · perf/model_flop_utilisation.

    Args:
        peak_tflops: what one device can do at the trainer's precision; "measure": what a large product of matrices
            reaches here; None: the utilisation is not logged. Operations are counted in one more pass over the first
            batch, and taken to grow with the tokens.
    """

    def __init__(self, peak_tflops: float | str | None = None) -> None:
        if isinstance(peak_tflops, str) and peak_tflops != "measure":
            raise ValueError(f"peak_tflops must be a number, measure or null, got {peak_tflops!r}.")
        self.peak_tflops = peak_tflops
        self._flops_per_token: float | None = None
        self._begin()

    def _begin(self) -> None:
        self._since, self._steps = time.perf_counter(), 0
        self._tokens: dict[str, Tensor | int] = {"context": 0, "answer": 0}

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.peak_tflops == "measure":
            self.peak_tflops = measured_tflops(pl_module.device, pl_module.dtype, trainer.precision)
        pl_module.phases.take()
        self._begin()

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self.peak_tflops is not None and self._flops_per_token is None:
            with trainer.precision_plugin.forward_context():
                flops = pl_module.count_flops(batch)
            self._flops_per_token = flops / max(int(sum(pl_module.count_tokens(batch).values())), 1)
            self._begin()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        for name, count in pl_module.count_tokens(batch).items():
            self._tokens[name] = self._tokens[name] + count  # on the device: no waiting here
        if not at_step_end(trainer, batch_idx):
            return
        self._steps += 1
        if trainer.global_step % trainer.log_every_n_steps:
            return
        phases = pl_module.phases.take()
        elapsed = time.perf_counter() - self._since
        own = sum(self._tokens.values())
        total = {n: trainer.strategy.reduce(c.float(), reduce_op="sum").item() for n, c in self._tokens.items()}
        values = {f"perf/{name}_tokens_per_s": count / elapsed for name, count in total.items()}
        values |= {f"perf/share_{name}": seconds / elapsed for name, seconds in phases.items()}
        values["perf/share_other"] = max(1 - sum(phases.values()) / elapsed, 0.0)
        values["perf/step_s"] = elapsed / self._steps
        values["perf/peak_mib"] = peak_mib(pl_module.device)
        if self.peak_tflops is not None:
            flops = float(own) * self._flops_per_token / elapsed
            values["perf/model_flop_utilisation"] = flops / (self.peak_tflops * 1e12)
        pl_module.log_dict(values)
        self._begin()


def peak_mib(device: torch.device) -> float:
    """Most memory so far: what torch held on the GPU, else what this process held."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 1024
    raise AssertionError("/proc/self/status has no VmHWM")


def measured_tflops(device: torch.device, dtype: torch.dtype, precision: str, *, size: int = 2048) -> float:
    """Best of a few products of two size × size matrices, at the precision that the trainer computes with."""
    dtype = {"bf16": torch.bfloat16, "16": torch.float16}.get(str(precision).split("-")[0], dtype)
    if device.type == "cpu":
        size //= 2
    with torch.random.fork_rng(devices=[]):
        a = torch.randn(size, size).to(device, dtype)
    best = float("inf")
    for _ in range(6):
        begun = time.perf_counter()
        (a @ a)[0, 0].item()  # waits for the device
        best = min(best, time.perf_counter() - begun)
    return 2 * size**3 / best / 1e12


class ActivationCheckpointing(L.Callback):
    """The base model's layers keep only their inputs for backward and run their forward again there.

    Args:
        enabled: off, it does nothing.
    """

    def __init__(self, enabled: bool = True) -> None:
        self.enabled = enabled

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # After the module's own on_fit_start, which sets the frozen base model to eval.
        if self.enabled:
            model = pl_module if hasattr(pl_module, "base_model") else pl_module.model
            checkpoint_activations(model.base_model)


def checkpoint_activations(base_model: nn.Module) -> None:
    """Turns it on for a model of transformers, without turning on what else train() does, such as dropout."""
    # Not reentrant: the reentrant kind gives the adapters no gradient, silently.
    # transformers renames it in version 6.
    enable = getattr(base_model, "activation_checkpointing_enable", None) or base_model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    # transformers looks at the layer's own flag, and hypernet.base.packed_attention at the model's.
    base_model.training = True
    for module in base_model.modules():
        if getattr(module, "gradient_checkpointing", False):
            module.training = True


class Compile(L.Callback):
    """torch.compile of the hypernetwork; weights keep their names.

    Args:
        backend: "inductor", or another of torch's; None does nothing.

    Raises:
        ValueError: if torch has no such backend; when the training begins, if it has no hypernetwork.
    """

    def __init__(self, backend: str | None = None) -> None:
        if backend is not None:
            check_backend(backend)
        self.backend = backend

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.backend is not None:
            if not hasattr(pl_module, "model"):
                raise ValueError(
                    f"callbacks.compile.backend={self.backend} is for the training of a hypernetwork, but "
                    f"{type(pl_module).__name__} has none. Leave it out."
                )
            compile_hypernetwork(pl_module.model.hypernetwork, self.backend)


def compile_hypernetwork(hypernetwork: nn.Module, backend: str) -> None:
    """In place, for documents that differ in length and number from step to step."""
    hypernetwork.compile(backend=backend, dynamic=True)


def check_backend(name: str) -> None:
    """torch itself refuses an unknown one when the model is already loaded, with a traceback.

    Raises:
        ValueError: if torch has no such backend.
    """
    from torch._dynamo import list_backends  # takes seconds

    if name not in list_backends(exclude_tags=()):
        raise ValueError(f"torch.compile has no backend {name!r}. Use one of: {', '.join(list_backends())}.")
