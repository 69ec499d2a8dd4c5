"""Remedies against forgetting: what they add and take away, against float64 by hand; and no trace of them stays."""

# ruff: noqa: F811 - fixtures of another file

import numpy as np
import pytest
import torch

from hypernet.consolidation.consolidator import Consolidator, Lesson, _forward, _rows
from hypernet.consolidation.moves import ChosenRows, Everything, Examples, GeneratedAdapter, LowRank
from hypernet.consolidation.objectives import OnPolicy, kl
from hypernet.consolidation.rehearsal import NoRehearsal, Replay, SelfSynthesised
from hypernet.consolidation.remedies import Realignment, Vaccination
from hypernet.consolidation.weights import MovedWeights
from tests.consolidation.test_moves import LESSONS, REHEARSED, examples_of, ids_of, memories, model  # noqa: F401
from tests.consolidation.test_updates import LR, assert_close, differences, gradients, loss_of

QUIET = {"rehearsal": NoRehearsal(), "batch_size": 4, "steps": 4}
ASKED = ["Why?", "Where does Tolmar lie?", "What is the mayor of Corbaford?"]


def mean_hidden(model, part):
    """Of block 0's outputs where answer tokens are predicted; each prompt read by itself."""
    found = []
    for question, answer in part:
        prompt, told = ids_of(model, question, answer)
        with torch.no_grad():
            output = model.base_model(torch.tensor([prompt + told]), output_hidden_states=True)
        found += list(output.hidden_states[1][0, len(prompt) - 1 : -1].numpy())
    return np.mean(found, axis=0)


@pytest.mark.parametrize("alpha", [1.0, -1.0, 2.5])
def test_vaccinated_step_is_one_with_a_bias_in_float64(model, alpha):
    model.base_model.double()
    examples, moves = examples_of(model), Everything()
    vector = mean_hidden(model, LESSONS) - mean_hidden(model, REHEARSED)
    remedy = Vaccination(alpha=alpha, layer=0)
    remedy.start(model, examples, seed=0)
    parameters = moves.start(model, None, seed=0)
    with remedy.around(model):
        loss = loss_of(model, moves.tensors(model, parameters), examples.lessons[0])
    loss.backward()
    with torch.no_grad():
        for parameter in parameters.values():
            parameter -= LR * parameter.grad
    found = differences(model, moves.result(model, parameters).tensors)
    # What is added behind a block is a bias of its last layer.
    down = model.base_model.get_decoder().layers[0].mlp.down_proj
    down.bias = torch.nn.Parameter(torch.from_numpy(alpha * vector))
    expected = {name: -LR * gradient for name, gradient in gradients(model).items() if not name.endswith("bias")}
    down.bias = None
    assert set(found) == {name for name, step in expected.items() if step.any()}
    for name, difference in found.items():
        assert_close(difference, expected[name])
    plain = {name: -LR * gradient for name, gradient in gradients(model).items()}
    assert max(np.abs(plain[name] - expected[name]).max() for name in found) > 1e-3


def test_random_vector_has_the_norm_of_the_true_one(model):
    vectors = {}
    for key, seed in (("true", 0), ("random", 0), ("again", 0), ("other", 1)):
        remedy = Vaccination(random=key != "true")
        remedy.start(model, examples_of(model), seed=seed)
        vectors[key] = remedy._vector
    norms = [vector.norm() for vector in vectors.values()]
    assert torch.allclose(torch.stack(norms), norms[0].expand(4), rtol=1e-5)
    assert torch.equal(vectors["random"], vectors["again"])
    assert not torch.allclose(vectors["random"], vectors["other"])
    assert abs(torch.cosine_similarity(vectors["true"], vectors["random"], dim=0)) < 0.6


@pytest.mark.parametrize("objective", [None, OnPolicy()], ids=["kl", "on_policy"])
def test_vaccine_changes_the_training_and_leaves_no_hook(model, memories, objective):
    before = {name: tensor.clone() for name, tensor in model.base_model.state_dict().items()}
    hooks = sum(len(module._forward_hooks) for module in model.base_model.modules())
    settings = QUIET | {"moves": LowRank(rank=3), "lr": 1e-2, "objective": objective}
    given = {"background": Replay(questions=ASKED)}
    plain, vaccinated = (
        Consolidator(**settings, remedy=remedy, **given).train(model, memories) for remedy in (None, Vaccination())
    )
    assert plain.losses != vaccinated.losses
    assert any(not torch.equal(plain.weights.tensors[name], t) for name, t in vaccinated.weights.tensors.items())
    assert sum(len(module._forward_hooks) for module in model.base_model.modules()) == hooks
    assert all(torch.equal(before[name], tensor) for name, tensor in model.base_model.state_dict().items())


def test_interrupted_forward_takes_the_vaccine_away(model):
    remedy = Vaccination(layer=1)
    remedy.start(model, examples_of(model), seed=0)
    with pytest.raises(KeyboardInterrupt), remedy.around(model):
        raise KeyboardInterrupt
    assert not model.base_model.get_decoder().layers[1]._forward_hooks


def test_realignment_steps_are_those_of_adamw_by_hand():
    start, target, steps, peak = np.array([1.0, -2.0, 0.5]), np.array([0.0, 1.0, 3.0]), 7, 0.1
    parameter = torch.tensor(start, requires_grad=True)
    asked = []

    def loss(step):
        asked.append(step)
        return ((parameter - torch.tensor(target)) ** 2).sum()

    Realignment(steps=steps, lr=peak).after([parameter], loss)
    x, m, v = start.copy(), np.zeros(3), np.zeros(3)
    for step in range(steps):
        g = 2 * (x - target)
        m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g**2
        lr = peak * (0.5 + 0.5 * np.cos(np.pi * step / steps))
        x -= lr * (m / (1 - 0.9 ** (step + 1))) / (np.sqrt(v / (1 - 0.95 ** (step + 1))) + 1e-8)
    assert asked == list(range(steps))
    np.testing.assert_allclose(parameter.detach().numpy(), x, rtol=1e-9)


def test_realignment_brings_the_student_back_towards_the_base(model, memories):
    rows = _rows(model, [Lesson(question, None, answer) for question, answer in REHEARSED], with_documents=False)
    settings = QUIET | {"moves": Everything(), "lr": 1e-2, "steps": 6}
    distances, losses = [], []
    for remedy in (None, Realignment(steps=10, lr=3e-3, rehearsal=Replay(questions=ASKED))):
        trained = Consolidator(**settings, remedy=remedy).train(model, memories)
        with torch.no_grad():
            base, student = (_forward(model, moved, rows, False).logits for moved in ({}, trained.weights.tensors))
        distances.append(float(kl(base, student)))
        losses.append(trained.losses)
    assert distances[1] < 0.8 * distances[0] and losses[0] == losses[1]


def test_realignment_resumes_to_the_same_weights(model, memories, tmp_path):
    remedy = Realignment(steps=3, rehearsal=Replay(questions=ASKED))
    consolidator = Consolidator(**QUIET | {"moves": LowRank(rank=2), "remedy": remedy, "checkpoint_steps": 2})
    path = tmp_path / "state.safetensors"
    whole = consolidator.train(model, memories)
    consolidator.train(model, memories, checkpoint=path)  # what it left is the state before realignment
    again = consolidator.train(model, memories, checkpoint=path)
    assert again.losses == []
    assert all(torch.equal(again.weights.tensors[name], t) for name, t in whole.weights.tensors.items())


def test_generated_adapter_is_the_result_without_a_step(model, memories):
    start = MovedWeights.of_adapter(model.base_model, model.internalize(["Orla Wint taught Fenda."]).fused())
    trained = Consolidator(**QUIET | {"moves": GeneratedAdapter(), "remedy": Realignment(steps=1)}).train(
        model, memories, start=start
    )
    assert trained.losses == [] and trained.weights is start
    with pytest.raises(ValueError, match='no generated adapters to start from. Set start="adapters"'):
        Consolidator(**QUIET | {"moves": GeneratedAdapter()}).train(model, memories)


def test_background_stands_in_where_nothing_is_rehearsed(model, memories):
    moves = ChosenRows(num_rows=3, by="tfidf")
    background = Replay(questions=ASKED)
    trained = Consolidator(**QUIET | {"moves": moves, "background": background}).train(model, memories)
    chosen = {name: columns for name, (_, columns) in moves._begun.items()}
    Consolidator(**QUIET | {"moves": moves, "rehearsal": background}).train(model, memories)
    assert all(torch.equal(chosen[name], columns) for name, (_, columns) in moves._begun.items())
    assert [lesson for lesson in trained.lessons if lesson.question in ASKED] == []  # and is not trained on


def test_recipe_names_the_remedy_and_is_as_before_without():
    plain, realigned = Consolidator(), Consolidator(remedy=Realignment(steps=3), background=SelfSynthesised(number=5))
    assert not {"remedy", "background"} & set(plain.recipe)
    assert realigned.recipe["remedy"]["rehearsal"] == realigned.recipe["background"] | {"number": 128}
    assert (realigned.recipe["remedy"]["class"], realigned.recipe["remedy"]["steps"]) == ("Realignment", 3)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda model: Vaccination(alpha=0.0), "alpha is 0.0. Give a finite number other than 0"),
        (lambda model: Vaccination(alpha=float("nan")), "alpha is nan"),
        (lambda model: Vaccination().start(model, Examples(), seed=0), "Vaccination needs lessons and rehearsed"),
        (lambda model: Vaccination(layer=2).start(model, examples_of(model), seed=0), "layer is 2. .* 0 to 1"),
        (lambda model: Realignment(steps=0), "steps is 0 and lr 0.001"),
        (lambda model: Realignment(lr=float("inf")), "steps is 20 and lr inf"),
    ],
)
def test_remedies_that_cannot_be_are_refused(model, make, says):
    with pytest.raises(ValueError, match=says):
        make(model)
