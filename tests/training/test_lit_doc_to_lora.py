"""The hypernetwork's training: what a step computes and changes, checkpoints, the written result, validation."""

from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open

from hypernet.base.base_model import fingerprint, load_base_model
from hypernet.model.checkpoint import load_checkpoint
from hypernet.training.losses import AnswerNLL, Attribution, ContextDistillation, KeyContrast, WeightL1
from hypernet.training.run_state import SafetensorsCheckpointIO, find_checkpoint
from tests.small_trainings import Losses, make_trainer, objective, quietly

# What a step computes


@pytest.mark.parametrize(
    ("terms", "ran"),
    [
        ({"l1": WeightL1(weight=1.0)}, []),
        ({"nll": AnswerNLL(weight=1.0), "kl": ContextDistillation(weight=0.0)}, ["student"]),
        ({"kl": ContextDistillation(weight=1.0)}, ["teacher", "student"]),
        ({"key": KeyContrast(weight=1.0)}, ["plain"]),
        ({"attribution": Attribution(weight=1.0)}, ["student"]),
        ({"kl": ContextDistillation(weight=1.0), "key": KeyContrast(weight=1.0, steps_alone=1)}, ["plain"]),
        ({"kl": ContextDistillation(weight=1.0), "key": KeyContrast(weight=1.0)}, ["teacher", "plain", "student"]),
    ],
    ids=lambda value: " ".join(value) or "nothing",
)
def test_only_what_the_terms_need_is_computed(make_module, make_data, terms, ran):
    module = quietly(make_module("doc_to_lora", objective=terms))
    batch, calls = make_data("doc_to_lora").train[0], []
    forward = module.model.forward

    def counted(rows):
        has_adapters = module.model.injector._active is not None
        assert has_adapters == torch.is_grad_enabled()
        calls.append("teacher" if rows is batch.teacher else "student" if has_adapters else "plain")
        return forward(rows)

    module.model.forward = counted
    assert module.training_step(batch, 0).requires_grad
    assert calls == ran
    assert not any(part._forward_pre_hooks for part in module.model.base_model.modules())


def test_first_gradient_reaches_what_gives_B_and_later_ones_all(make_doc_to_lora, make_module, make_data):
    """B is zero at first: A changes nothing yet, and the matrix that gives B from the latents passes nothing on."""
    module = quietly(make_module("doc_to_lora", model=make_doc_to_lora(trained=False)))
    named = dict(module.model.hypernetwork.named_parameters())
    optimizer = torch.optim.AdamW(named.values(), lr=0.01)
    data = make_data("doc_to_lora").train
    (target,) = module.model.hypernetwork.targets
    for step in range(3):
        optimizer.zero_grad()
        module.training_step(data[step], step).backward()
        module.on_after_backward()
        reached = {name for name, parameter in named.items() if parameter.grad is not None and parameter.grad.any()}
        if step == 0:
            assert reached == {"lora_head.head.weight", "lora_head.bias_B.down_proj"}
            of_A, of_B = named["lora_head.head.weight"].grad.split([target.d_in, target.d_out], dim=-1)
            assert not of_A.any() and of_B.any(dim=1).all()
        else:
            assert reached == named.keys()
        optimizer.step()
    assert all(parameter.grad is None for parameter in module.model.base_model.parameters())


def test_adapters_stay_until_after_backward(make_module, make_data):
    module = quietly(make_module("doc_to_lora"))
    ids = torch.arange(5, 15)[None]
    plain = module.model.base_model(ids).logits
    loss = module.training_step(make_data("doc_to_lora").train[0], 0)
    assert module.model.injector._active is not None
    loss.backward()
    module.on_after_backward()
    assert torch.equal(module.model.base_model(ids).logits, plain)


EVERY_TERM = objective(
    nll=0.3, l1=WeightL1(weight=0.5), key=KeyContrast(weight=0.5), attribution=Attribution(weight=0.5)
)


@pytest.mark.parametrize("terms", [objective(nll=0.3), EVERY_TERM], ids=["distillation", "all"])
def test_gradient_checkpointing_keeps_training_gradients(make_module, make_data, terms):
    """There the base model's layers run again during backward, and must find the adapters still active."""
    gradients = []
    for checkpointing in (False, True):
        module = quietly(make_module("doc_to_lora", objective=terms))
        module.model.double()
        if checkpointing:
            module.model.base_model.gradient_checkpointing_enable({"use_reentrant": False})
            module.model.base_model.train()
        module.training_step(make_data("doc_to_lora").train[0], 0).backward()
        gradients.append([p.grad for p in module.model.hypernetwork.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(recomputed, plain, rtol=1.3e-6, atol=1e-5)  # losses are in single precision


def test_training_changes_only_the_hypernetwork(tmp_path, make_module, make_data):
    module = make_module("doc_to_lora")
    base, before = fingerprint(module.model.base_model), fingerprint(module.model.hypernetwork)
    make_trainer(tmp_path, max_steps=2).fit(module, make_data("doc_to_lora"))
    assert fingerprint(module.model.base_model) == base == module.model.base_model_fingerprint
    assert fingerprint(module.model.hypernetwork) != before
    assert module.model.injector._active is None
    assert not module.model.base_model.training and not any(
        p.requires_grad for p in module.model.base_model.parameters()
    )


# Checkpoints of a run


def test_run_checkpoint_holds_the_hypernetwork_alone(tmp_path, make_module, make_data):
    module = make_module("doc_to_lora")
    make_trainer(tmp_path, max_steps=1).fit(module, make_data("doc_to_lora"))
    path = find_checkpoint("last", tmp_path / "checkpoints")
    checkpoint = SafetensorsCheckpointIO().load_checkpoint(path)
    expected = {f"model.hypernetwork.{name}": t for name, t in module.model.hypernetwork.state_dict().items()}
    assert set(checkpoint["state_dict"]) == set(expected)
    assert all(torch.equal(checkpoint["state_dict"][name], tensor) for name, tensor in expected.items())
    with safe_open(path, framework="pt") as file:
        assert not [name for name in file.keys() if "base_model" in name]  # noqa: SIM118


@pytest.fixture
def resume(tmp_path, make_module, make_data):
    """resume(change, **module): trains a step, changes the saved checkpoint, and resumes from it."""

    def run(change, **changes):
        make_trainer(tmp_path, max_steps=1).fit(make_module("doc_to_lora"), make_data("doc_to_lora"))
        io = SafetensorsCheckpointIO()
        checkpoint = io.load_checkpoint(find_checkpoint("last", tmp_path / "checkpoints"))
        change(checkpoint)
        io.save_checkpoint(checkpoint, tmp_path / "changed.safetensors")
        module = make_module("doc_to_lora", **changes)
        make_trainer(tmp_path, max_steps=2).fit(
            module, make_data("doc_to_lora"), ckpt_path=tmp_path / "changed.safetensors"
        )

    return run


def test_renamed_weight_is_refused_with_its_name(resume):
    def rename(checkpoint):
        state = checkpoint["state_dict"]
        state["model.hypernetwork.lora_head.bias_C"] = state.pop("model.hypernetwork.lora_head.head.weight")

    with pytest.raises(ValueError, match="of another hypernetwork: model.hypernetwork.lora_head.bias_C") as error:
        resume(rename)
    assert "\n" not in str(error.value) and "Resume with the configuration it was made with." in str(error.value)


def test_missing_weight_is_refused(resume):
    with pytest.raises(ValueError, match="of another hypernetwork: model.hypernetwork.lora_head.head.weight"):
        resume(lambda checkpoint: checkpoint["state_dict"].pop("model.hypernetwork.lora_head.head.weight"))


def test_resume_refuses_another_base_model(resume, tiny_base_model, make_doc_to_lora):
    with torch.no_grad():
        tiny_base_model.lm_head.weight[0, 0] += 1
    with pytest.raises(ValueError, match="made with another base model. Resume with the one it was made with."):
        resume(lambda checkpoint: None, model=make_doc_to_lora(base_model=tiny_base_model))


def test_hypernetwork_of_another_size_is_refused_in_one_line(resume, make_doc_to_lora):
    aggregator = {"name": "mean_pool", "latent_dim": 16}
    with pytest.raises(ValueError, match="of another hypernetwork"):
        resume(lambda checkpoint: None, model=make_doc_to_lora(hypernetwork={"rank": 2, "aggregator": aggregator}))
    other = make_doc_to_lora().hypernetwork.config
    sizes = {"rank": 3, "aggregator": other["aggregator"]}
    with pytest.raises(ValueError, match="of another hypernetwork") as error:
        resume(lambda checkpoint: None, model=make_doc_to_lora(hypernetwork=sizes))
    assert "\n" not in str(error.value)


# The end of a run


def test_result_is_written_when_the_run_is_complete(tmp_path, make_module, make_data):
    def output(name):
        return tmp_path / name / "output"

    with pytest.raises(RuntimeError, match="crash"):
        module = make_module("doc_to_lora", output_dir=str(output("crashed")))
        make_trainer(tmp_path / "crashed", Losses(crash_at=1)).fit(module, make_data("doc_to_lora"))
    assert not output("crashed").exists()
    module = make_module("doc_to_lora", output_dir=str(output("done")))
    make_trainer(tmp_path / "done", max_steps=1).fit(module, make_data("doc_to_lora"))
    assert load_checkpoint(output("done")).fingerprint == fingerprint(module.model.hypernetwork)


def test_result_holds_its_base_model_if_asked(tmp_path, make_module, make_data):
    module = make_module("doc_to_lora", output_dir=str(tmp_path / "output"), include_base_model=True)
    make_trainer(tmp_path, max_steps=1).fit(module, make_data("doc_to_lora"))
    assert load_checkpoint(tmp_path / "output").base_model == str(tmp_path / "output/base_model")
    assert fingerprint(load_base_model(tmp_path / "output/base_model")[0]) == fingerprint(module.model.base_model)


# Validation


@pytest.mark.parametrize(
    ("scores", "expected"), [((0.5, 0.1, 0.9), 0.5), ((0.95, 0.1, 0.9), 1.0625), ((0.2, 0.3, 0.3), None)]
)
def test_gap_closed_is_the_share_between_the_controls(make_module, monkeypatch, scores, expected):
    module, logged = make_module("doc_to_lora"), {}
    metrics = {
        f"val/document_{m}": torch.tensor(s)
        for m, s in zip(("adapter", "no_context", "in_prompt"), scores, strict=True)
    }
    monkeypatch.setattr(type(module), "trainer", SimpleNamespace(callback_metrics=metrics))
    module.log = lambda name, value, **_: logged.update({name: float(value)})
    module.on_validation_epoch_end()
    assert logged == ({} if expected is None else {"val/gap_closed": pytest.approx(expected)})


def test_validation_scores_every_method_and_kind(tmp_path, make_doc_to_lora, make_module, make_data):
    """An untrained adapter scores as no context does."""
    module, data = make_module("doc_to_lora", model=make_doc_to_lora(trained=False)), make_data("doc_to_lora")
    trainer = make_trainer(tmp_path)
    (scores,) = trainer.validate(module, data, verbose=False)
    for kind in ("document", "unanswerable", "background", "cross_document"):
        of_kind = {name: value for name, value in scores.items() if name.startswith(f"val/{kind}_")}
        if of_kind:
            assert set(of_kind) == {f"val/{kind}_{m}" for m in ("no_context", "in_prompt", "adapter", "wrong_document")}
            assert of_kind[f"val/{kind}_adapter"] == of_kind[f"val/{kind}_no_context"]
            assert all(0 <= value <= 1 for value in of_kind.values())
    assert "val/document_adapter" in scores and "val/background_adapter" in scores
    assert module.model.injector._active is None
