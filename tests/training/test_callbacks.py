"""What watches over a run: steps that are not finite, speed, activation checkpointing, compilation, signals."""

import math
import os
import signal
import time
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from torch import nn

import hypernet.training.callbacks
from hypernet.base.packed_rows import QUESTION_KINDS, Segment, pack_row, pad_rows
from hypernet.data.batches import DistillationBatches
from hypernet.data.curriculum import Curriculum
from hypernet.data.datamodule import BatchDataModule
from hypernet.data.encyclopedia import Encyclopedia
from hypernet.training.callbacks import (
    ActivationCheckpointing,
    Compile,
    NonFiniteGuard,
    StepProgressBar,
    StopOnSignal,
    Throughput,
    checkpoint_activations,
    measured_tflops,
    peak_mib,
)
from hypernet.training.lit_doc_to_lora import LitDocToLoRA
from hypernet.training.run_state import RunCheckpoint, SafetensorsCheckpointIO, find_checkpoint
from hypernet.training.timing import PhaseTimes
from tests.small_trainings import OPTIMIZER, objective


class Simple(L.LightningModule):
    """Loss = weight × the step's number in `bad`, else weight; what callbacks ask of a module is there."""

    def __init__(self, bad=()):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))
        self.bad = dict(bad)
        self.phases = PhaseTimes()

    def training_step(self, batch, batch_idx):
        self.log("train/loss", self.weight.detach().sum())
        return (self.weight * self.bad.get(batch_idx, 1.0)).sum()

    def describe(self, batch):
        return [f"Document {i} lies" for i in range(6)]

    def count_tokens(self, batch):
        return {"context": torch.tensor(30), "answer": torch.tensor(3)}

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.1, weight_decay=0.0)


class Logged(L.pytorch.loggers.logger.Logger):
    name = version = "memory"

    def __init__(self):
        super().__init__()
        self.rows = {}

    def log_metrics(self, metrics, step):
        self.rows.setdefault(step, {}).update(metrics)

    def log_hyperparams(self, *_):
        pass


def fit(folder, module, *callbacks, steps=4, batches=None, ckpt_path=None, **settings):
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu", "logger": Logged()}
    saving = RunCheckpoint(folder, every_n_train_steps=1, keep=9)
    settings = {**quiet, "log_every_n_steps": 1, "max_steps": steps, "devices": 1, **settings}
    trainer = L.Trainer(callbacks=[*callbacks, saving], plugins=[SafetensorsCheckpointIO()], **settings)
    trainer.fit(module, BatchDataModule(train=batches or list(range(steps))), ckpt_path=ckpt_path)
    return trainer


# Not finite


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nonfinite_loss_stops_before_the_weights_change(tmp_path, value):
    module = Simple({2: value})
    with pytest.raises(FloatingPointError) as error:
        fit(tmp_path, module, NonFiniteGuard())
    message = str(error.value)
    assert message.startswith(f"Step 2: the loss is {value}; the gradient of weight and 0 more is not finite.")
    assert "'Document 0 lies', 'Document 1 lies', 'Document 2 lies', 'Document 3 lies' and 2 more." in message
    assert "\n" not in message and "on_nan=skip" in message
    assert module.weight.isfinite().all()
    assert find_checkpoint("last", tmp_path).name == "step-000002.safetensors"


def test_nonfinite_gradient_stops_the_run(tmp_path):
    class Root(Simple):
        def training_step(self, batch, batch_idx):
            return ((self.weight - 1) * 0).sqrt().sum()  # 0, with the gradient 0 · inf

    with pytest.raises(FloatingPointError, match="the loss is 0.0; the gradient of weight"):
        fit(tmp_path, Root(), NonFiniteGuard())


def test_skipped_steps_change_nothing_and_are_counted(tmp_path, caplog):
    module = Simple({1: math.nan, 3: math.inf})
    guard = NonFiniteGuard("skip", max_skipped=2)
    trainer = fit(tmp_path, module, guard, steps=6)
    assert guard.skipped == 2 and trainer.global_step == 6
    assert [trainer.logger.rows[step]["train/skipped"] for step in range(6)] == [0, 1, 1, 2, 2, 2]
    assert sum("The step is left out." in message for message in caplog.messages) == 2
    alone = fit(tmp_path / "alone", Simple(), NonFiniteGuard(), steps=4)
    torch.testing.assert_close(module.weight, alone.lightning_module.weight)

    again = NonFiniteGuard("skip", max_skipped=2)
    with pytest.raises(FloatingPointError, match="Step 6: .*More than max_skipped=2 steps"):
        last = find_checkpoint("last", tmp_path)
        fit(tmp_path, Simple({6: math.nan}), again, steps=8, batches=list(range(8)), ckpt_path=last)


def test_one_nonfinite_part_skips_the_accumulated_step(tmp_path):
    rows = pad_rows([pack_row([], [Segment([1, 2, 3], 1, False, 0)])] * 2, pad_id=0)
    guard = NonFiniteGuard("skip")
    module = Simple({2: math.nan})
    trainer = fit(tmp_path, module, guard, steps=3, batches=[rows] * 3, accumulate_grad_batches=2)
    assert guard.skipped == 1 and trainer.global_step == 3
    assert [trainer.logger.rows[step]["train/skipped"] for step in range(3)] == [0, 1, 1]
    assert module.weight.isfinite().all()


def test_unknown_on_nan_value_is_refused():
    with pytest.raises(ValueError, match="on_nan must be stop or skip, got 'ignore'"):
        NonFiniteGuard("ignore")


# The bar


@pytest.mark.parametrize("parts", [1, 2])
def test_bar_of_a_resumed_run_shows_all_its_steps(tmp_path, parts, capsys):
    class Look(L.Callback):
        def on_train_batch_end(self, trainer, *_):
            (task,) = trainer.progress_bar_callback.progress.tasks
            shown.append((task.completed, task.total))
            speeds.append(task.speed)
            time.sleep(0.02)

    rows = pad_rows([pack_row([], [Segment([1, 2, 3], 1, False, 0)])] * parts, pad_id=0)
    settings = {"batches": [rows] * 8, "enable_progress_bar": True, "accumulate_grad_batches": parts}
    for start, steps, ckpt_path in ((0, 5, None), (5, 8, tmp_path / "step-000005.safetensors")):
        shown, speeds = [], []
        fit(tmp_path, Simple(), StepProgressBar(), Look(), steps=steps, ckpt_path=ckpt_path, **settings)
        assert shown == [(n + 1, steps * parts) for n in range(start * parts, steps * parts)]
        assert 0 < speeds[-1] < 50  # batches per second of this run, not counting those before it
        printed = capsys.readouterr().out
        assert "Training" in printed and f"{steps * parts}/{steps * parts}" in printed


# Signals


class Tell(L.Callback):
    """Sends this process a signal during a batch."""

    def __init__(self, number, *, step):
        self.number, self.step = number, step

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if batch_idx == self.step:
            os.kill(os.getpid(), self.number)


def stop(folder, module, told, **settings):
    """Runs until the signal ends it: (exit code, trainer)."""
    logger, stopper = Logged(), StopOnSignal()
    with pytest.raises(SystemExit) as exit:
        fit(folder, module, told, stopper, steps=8, logger=logger, **settings)
    return exit.value.code, sorted(logger.rows)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_signal_finishes_the_step_and_saves(tmp_path, number):
    before = signal.getsignal(number)
    code, logged = stop(tmp_path, Simple(), Tell(number, step=2))
    assert code == 128 + number and logged == [0, 1, 2]
    assert find_checkpoint("last", tmp_path).name == "step-000003.safetensors"
    assert signal.getsignal(number) == before


def test_signal_finishes_an_accumulated_step(tmp_path):
    rows = pad_rows([pack_row([], [Segment([1, 2, 3], 1, False, 0)])] * 3, pad_id=0)
    told = Tell(signal.SIGTERM, step=3)
    code, logged = stop(tmp_path, Simple(), told, batches=[rows] * 8, accumulate_grad_batches=3)
    assert code == 143 and logged == [0, 1]
    assert find_checkpoint("last", tmp_path).name == "step-000002.safetensors"


def test_signal_on_slurm_requeues_the_job(tmp_path, monkeypatch):
    commands = []
    monkeypatch.setattr(hypernet.training.callbacks, "SLURMEnvironment", SimpleNamespace(detect=lambda: True))
    run = lambda command, check: commands.append(command)  # noqa: E731
    monkeypatch.setattr(hypernet.training.callbacks, "subprocess", SimpleNamespace(run=run))
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    code, _ = stop(tmp_path, Simple(), Tell(signal.SIGUSR1, step=0))
    assert code == 128 + signal.SIGUSR1 and commands == [["scontrol", "requeue", "77"]]


# Speed


def test_speed_is_logged_over_the_steps_since_the_last_time(tmp_path, monkeypatch):
    clock = iter(range(0, 10**6, 2))
    monkeypatch.setattr(hypernet.training.callbacks.time, "perf_counter", lambda: float(next(clock)))
    module = Simple()
    trainer = fit(tmp_path, module, Throughput(), steps=4, log_every_n_steps=2)
    row = trainer.logger.rows[1]
    assert sorted(trainer.logger.rows) == [1, 3]
    assert row["perf/context_tokens_per_s"] / row["perf/answer_tokens_per_s"] == pytest.approx(10)
    assert row["perf/context_tokens_per_s"] * row["perf/step_s"] == pytest.approx(30)  # tokens of a step
    assert row["perf/peak_mib"] > 50 and 0 <= row["perf/share_other"] <= 1
    assert "perf/model_flop_utilisation" not in row


@pytest.fixture
def distillation(make_doc_to_lora, tiny_tokenizer):
    """(module, batches) of the hypernetwork's training."""
    stages = [{"steps": 4, "batch_size": 2, "facts_per_entity": [1, 2]}]
    batches = DistillationBatches(Curriculum(Encyclopedia("train"), stages), tiny_tokenizer, max_chunk_tokens=20)
    return LitDocToLoRA(model=make_doc_to_lora(), objective=objective(), optimizer=OPTIMIZER), batches


def test_throughput_logs_phases_and_utilisation_of_a_step(tmp_path, distillation):
    module, batches = distillation
    trainer = fit(tmp_path, module, Throughput(peak_tflops="measure"), steps=2, batches=batches)
    for row in trainer.logger.rows.values():
        shares = {name.removeprefix("perf/share_"): value for name, value in row.items() if "share" in name}
        assert set(shares) == {"encode", "teacher", "student", "backward", "other"}
        assert sum(shares.values()) == pytest.approx(1, abs=0.02) and min(shares.values()) >= 0
        assert 0 < row["perf/model_flop_utilisation"] < 1
        assert row["perf/context_tokens_per_s"] > 0 and row["perf/answer_tokens_per_s"] > 0


def test_counting_flops_changes_no_loss(tmp_path, distillation, make_doc_to_lora):
    module, batches = distillation
    counted = fit(tmp_path / "a", module, Throughput(peak_tflops=1.0), steps=3, batches=batches)
    other = LitDocToLoRA(model=make_doc_to_lora(), objective=objective(), optimizer=OPTIMIZER)
    plain = fit(tmp_path / "b", other, steps=3, batches=batches)
    assert [row["train/loss"] for row in counted.logger.rows.values()] == [
        row["train/loss"] for row in plain.logger.rows.values()
    ]


def test_invalid_peak_flops_is_refused():
    with pytest.raises(ValueError, match="peak_tflops must be a number, measure or null, got 'guess'"):
        Throughput(peak_tflops="guess")


def test_measured_peak_and_memory_are_plausible():
    assert 1e-4 < measured_tflops(torch.device("cpu"), torch.float32, "32-true", size=256) < 1000
    before = torch.get_rng_state()
    measured_tflops(torch.device("cpu"), torch.float32, "bf16-mixed", size=64)
    assert torch.equal(torch.get_rng_state(), before)
    assert 50 < peak_mib(torch.device("cpu")) < 10**6


# Layers


def train_losses(folder, distillation, *callbacks):
    module, batches = distillation
    trainer = fit(folder, module, *callbacks, steps=3, batches=batches)
    return [row["train/loss"] for row in trainer.logger.rows.values()], module


def test_activation_checkpointing_keeps_the_run_unchanged(tmp_path, distillation, make_doc_to_lora):
    module, batches = distillation
    other = LitDocToLoRA(model=make_doc_to_lora(), objective=objective(), optimizer=OPTIMIZER)
    plain, _ = train_losses(tmp_path / "a", (other, batches), ActivationCheckpointing(enabled=False))
    calls = []
    # Early in its layer: the second run stops as soon as it has what backward needs.
    layer = module.model.base_model.model.layers[0].mlp.gate_proj
    layer.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    checkpointed, _ = train_losses(tmp_path / "b", distillation, ActivationCheckpointing())
    assert checkpointed == pytest.approx(plain, rel=1e-5)
    assert sum(calls) == 6  # the student's forward of 3 steps, each a second time in backward


def test_activation_checkpointing_enables_no_dropout(make_doc_to_lora):
    base_model = make_doc_to_lora().base_model.eval()
    checkpoint_activations(base_model)
    assert base_model.training and base_model.model.layers[0].training
    assert not base_model.model.layers[0].self_attn.training and not base_model.model.layers[0].mlp.training


@pytest.mark.story(35)
def test_compiled_hypernetwork_trains_alike_with_its_names(tmp_path, distillation, make_doc_to_lora):
    batches = [distillation[1][0]] * 3  # one shape: each other one is traced anew
    aggregator = {"name": "perceiver", "latent_dim": 16, "num_latents": 3, "num_blocks": 1}
    aggregator |= {"num_heads": 2, "num_kv_heads": 1, "head_dim": 8}
    models = [make_doc_to_lora(hypernetwork={"rank": 2, "aggregator": aggregator}) for _ in range(2)]
    module, other = (LitDocToLoRA(model=m, objective=objective(), optimizer=OPTIMIZER) for m in models)
    plain, _ = train_losses(tmp_path / "a", (other, batches), Compile(backend=None))
    names = list(module.model.hypernetwork.state_dict())
    # Traced and differentiated ahead of time; the default backend also generates code, which takes minutes here.
    compiled, _ = train_losses(tmp_path / "b", (module, batches), Compile(backend="aot_eager"))
    assert compiled == pytest.approx(plain, rel=1e-4)
    assert list(module.model.hypernetwork.state_dict()) == names


def test_compile_without_hypernetwork_is_refused(tmp_path):
    expected = r"^callbacks.compile.backend=inductor is for .* a hypernetwork, but Simple has none. Leave it out.$"
    with pytest.raises(ValueError, match=expected):
        fit(tmp_path, Simple(), Compile(backend="inductor"))


def test_unknown_compile_backend_is_refused_before_loading():
    with pytest.raises(ValueError, match=r"^torch.compile has no backend 'indctor'. Use one of: .*inductor.*\.$"):
        Compile(backend="indctor")


def test_question_kinds_have_the_places_parts_count_by():
    assert QUESTION_KINDS[:2] == ("document", "unanswerable")
