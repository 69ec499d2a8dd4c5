"""benchmarks/refining/arms.py: each way beside an independent reference, on the tiny base model."""

import random
from copy import deepcopy

import pytest
import torch
from transformers import DynamicCache

from benchmarks.measuring.decoding import greedy
from benchmarks.refining.arms import Cartridge, FromZero, LeastSquares, taught, trained
from hypernet.consolidation.editing.moments import KeyMoments
from tests.recited_model import DOCUMENT, recited_model

QUESTIONS = ["Where was Velmar Tosk born?", "What is the capital of Norbach?", "Who is her employer?"]


@pytest.fixture(scope="module")
def model():
    return recited_model()


@pytest.fixture(scope="module")
def lessons(model):
    return taught(model, DOCUMENT, QUESTIONS, wording=" Say it.")


def in_prompt(model, wording=""):
    return model.layout.prompt_ids(model.tokenizer, [q + wording for q in QUESTIONS], [DOCUMENT] * 3)


def test_lessons_are_what_a_prompt_with_the_document_says(model, lessons):
    (lesson,) = lessons
    said = greedy(model.base_model, model.tokenizer, in_prompt(model, " Say it."), max_new_tokens=32)
    assert [len(answer) for answer in lesson.answers] == said.num_tokens
    log_probs = []
    for prompt, answer in zip(in_prompt(model, " Say it."), lesson.answers, strict=True):
        logits = model.base_model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
        log_probs.append(logits.log_softmax(-1))
    torch.testing.assert_close(lesson.log_probs, torch.cat(log_probs).detach(), atol=1e-4, rtol=1e-4)


def test_an_untrained_cartridge_is_the_kept_prefix(model, lessons):
    cartridge = Cartridge(model, DOCUMENT)
    said = greedy(model.base_model, model.tokenizer, in_prompt(model), max_new_tokens=12)
    assert cartridge.answers(QUESTIONS, max_new_tokens=12) == said.texts
    # Only the wording is missing, so it is as good as what it should become.
    (plain,) = taught(model, DOCUMENT, QUESTIONS)
    assert cartridge.loss(plain).item() == pytest.approx(0.0, abs=1e-5)
    assert cartridge.loss(lessons[0]).item() > 1e-3
    config = model.base_model.config
    size = 2 * config.num_key_value_heads * config.head_dim * config.num_hidden_layers
    assert cartridge.num_bytes == 2 * cartridge.num_tokens * size


def test_a_cartridge_answers_as_peft_s_with_the_same_rows(model):
    from peft import CartridgeConfig, get_peft_model
    from peft.tuners.cartridge.utils import initialize_kv_prefix_from_past_key_values

    cartridge = Cartridge(model, DOCUMENT, tokens=9)
    with torch.no_grad():
        for part in cartridge.parameters:
            part += 0.3 * torch.randn(part.shape, generator=torch.Generator().manual_seed(0))
    base = deepcopy(model.base_model)
    other = get_peft_model(base, CartridgeConfig(task_type="CAUSAL_LM", num_virtual_tokens=9, num_frozen_tokens=1))
    layers = [(layer.keys.detach(), layer.values.detach()) for layer in cartridge.prefix().cache.layers]
    initialize_kv_prefix_from_past_key_values(other, past_key_values=layers)
    (tail,) = cartridge.tails(QUESTIONS[:1])
    ids = torch.tensor([tail])
    with torch.no_grad():
        wanted = other(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        cache = cartridge.prefix().cache
        assert isinstance(cache, DynamicCache)
        own = model.base_model(ids, past_key_values=cache).logits
        plain = model.base_model(ids).logits
    torch.testing.assert_close(own, wanted, atol=1e-4, rtol=1e-4)
    assert (own - plain).abs().max() > 0.1
    trainable = sum(p.numel() for p in other.parameters() if p.requires_grad)
    assert trainable == sum(part.numel() for part in cartridge.parameters)


@pytest.mark.parametrize(
    "make", [lambda m: FromZero(m, rank=4, lr=0.01, seed=0), lambda m: Cartridge(m, DOCUMENT, tokens=9)]
)
def test_steps_lower_the_loss_and_the_base_model_stays(model, lessons, make):
    before = {name: value.clone() for name, value in model.base_model.state_dict().items()}
    arm = make(model)
    start = arm.loss(lessons[0]).item()
    ((budget, spent, none),) = trained(arm, lessons, budgets=[0.5], spent=0.7, seed=0)
    assert (budget, spent, none) == (0.5, 0.7, 0)  # the lessons took longer than that
    assert arm.loss(lessons[0]).item() == start
    marks = list(trained(arm, lessons, budgets=[0.1, 0.6], spent=0.0, seed=0))
    assert [mark[0] for mark in marks] == [0.1, 0.6] and 0 < marks[0][2] < marks[1][2]
    assert arm.loss(lessons[0]).item() < 0.8 * start
    assert len(arm.answers(QUESTIONS, max_new_tokens=3)) == 3
    if isinstance(arm, FromZero):
        arm.remove()
    after = model.base_model.state_dict()
    assert all(value.equal(after[name]) for name, value in before.items())


def test_a_lora_from_zero_begins_as_the_base_model(model, lessons):
    arm = FromZero(model, rank=4, lr=0.01, seed=0)
    prompts = model.layout.prompt_ids(model.tokenizer, QUESTIONS)
    said = greedy(model.base_model, model.tokenizer, prompts, max_new_tokens=8).texts
    assert arm.answers(QUESTIONS, max_new_tokens=8) == said
    arm.injector.set(arm.A, {name: rows + 0.1 for name, rows in arm.B.items()}, [[0]], scaling=1.0)
    own = model(lessons[0].rows(0))
    arm.injector.clear()
    # The same by weights, W + BᵀA, in a copy.
    (name,) = arm.A
    copied = deepcopy(model)
    for place in model.hypernetwork.targets[0].modules():
        weight = copied.base_model.get_parameter(f"{place.path}.weight")
        with torch.no_grad():
            weight += (arm.B[name][0, place.layer] + 0.1).T @ arm.A[name][0, place.layer]
    arm.remove()
    copied.injector.clear()
    torch.testing.assert_close(own, copied(lessons[0].rows(0)), atol=1e-3, rtol=1e-3)


def test_least_squares_is_the_ridge_regression_of_its_formula(model, lessons):
    targets = model.hypernetwork.targets[0]
    path = targets.paths[-1]
    moments = KeyMoments([" ".join(random.Random(n).choices(DOCUMENT.split(), k=40)) for n in range(40)])
    arguments = {"moments": moments, "ridge": 0.1, "wording": " Say it."}
    solved = LeastSquares(model, DOCUMENT, QUESTIONS, lessons, paths=[path], **arguments)
    (changed,) = solved.tensors.values()
    before = model.base_model.get_parameter(f"{path}.weight").detach()
    # The states by plain readings, one question after another, and ΔW by the other form of the formula.
    keys, left = [], []
    block = model.base_model.get_submodule(path.rsplit(".", 2)[0])
    for number, answer in enumerate(lessons[0].answers):
        states = []
        for prompt in (in_prompt(model, " Say it.")[number], lessons[0].prompts[number]):
            found = {}
            hooks = [
                model.base_model.get_submodule(path).register_forward_pre_hook(
                    lambda _, a, f=found: f.update(key=a[0])
                ),
                block.register_forward_hook(lambda _, __, o, f=found: f.update(out=o if torch.is_tensor(o) else o[0])),
            ]
            with torch.no_grad():
                model.base_model(torch.tensor([prompt + answer]))
            for hook in hooks:
                hook.remove()
            states.append({what: x[0, len(prompt) - 1 : -1].double() for what, x in found.items()})
        keys.append(states[1]["key"])
        left.append(states[0]["out"] - states[1]["out"])
    K, R = torch.cat(keys), torch.cat(left)
    C = moments.of(model, [path])[path]
    C = C + 1e-2 * C.diagonal().mean() * torch.eye(len(C), dtype=C.dtype)
    gram = K @ torch.linalg.inv(C) @ K.T
    wanted = R.T @ torch.linalg.inv(gram + 0.1 * gram.diagonal().mean() * torch.eye(len(K))) @ K @ torch.linalg.inv(C)
    torch.testing.assert_close((changed - before).double(), wanted, atol=2e-3, rtol=2e-2)
    # What the prompt with the document changes is missing by less afterwards.
    assert (K @ (changed - before).double().T - R).norm() < 0.7 * R.norm()
    assert len(solved.answers(QUESTIONS, max_new_tokens=3)) == 3
    assert model.base_model.get_parameter(f"{path}.weight").equal(before)
    factors = len(K) * sum(before.shape)
    assert solved.num_bytes == 2 * min(before.numel(), factors)
