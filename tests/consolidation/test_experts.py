"""ExpertPerTask on a random tiny model: its weights and its router against float64, and what it keeps apart."""

import numpy as np
import pytest
import torch

from hypernet.consolidation.consolidator import Consolidator
from hypernet.consolidation.experts.expert_per_task import ExpertPerTask, _prompt_states
from hypernet.consolidation.objectives import Supervised
from hypernet.consolidation.rehearsal import NoRehearsal
from hypernet.memory.memory import Memory

FACTS = {
    "towns": ("Norbach", "river", "Norbach lies on the Palno."),
    "people": ("Fenda", "teacher", "Orla taught Fenda."),
}
ASKED = {
    "towns": ["Which river runs through Norbach?", "Is Norbach on a river?", "The river of Norbach?"],
    "people": ["Who taught Fenda?", "Fenda learned from whom?", "Name the teacher of Fenda."],
}


@pytest.fixture
def model(make_doc_to_lora):
    return make_doc_to_lora(bias_block=False)


@pytest.fixture
def trained(model, tmp_path):
    experts = ExpertPerTask(rank=2, shared_rank=3, target_modules=["down_proj"])
    settings = {"objective": Supervised(), "rehearsal": NoRehearsal(), "batch_size": 4, "steps": 3, "lr": 1e-2}
    for task, (subject, relation, text) in FACTS.items():
        memory = Memory.open(tmp_path / task)
        memory.add(text, user_id="alice", subject=subject, relation=relation)
        moves = experts.next(seed=0)
        Consolidator(moves=moves, **settings).train(model, memory.list(user_id="alice"))
        memory.close()
        experts.add(model, task, moves, ASKED[task])
    return experts


def test_weights_are_the_sum_of_shared_and_own_in_float64(model, trained):
    for task in FACTS:
        parts = {**trained._common, **trained._experts[task]}
        for name, found in trained.tensors(model, task).items():
            path = name.removesuffix(".weight")
            expected = model.base_model.get_parameter(name).double().numpy().copy()
            for part in ("shared", "own"):
                A, B = (parts[f"{part}.{path}.{letter}"].double().numpy() for letter in "AB")
                expected += np.einsum("ro,ri->oi", B, A)
            np.testing.assert_allclose(found.double().numpy(), expected, atol=1e-6)
    one, other = (trained.tensors(model, task) for task in FACTS)
    assert any(not torch.equal(one[name], other[name]) for name in one)


def test_next_task_starts_from_shared_and_a_neutral_expert(model, trained):
    moves = trained.next(seed=0)
    parameters = moves.start(model, None, seed=5)
    for name, value in trained._common.items():
        assert torch.equal(parameters[name], value)
    assert all(not value.any() for name, value in parameters.items() if name.startswith("own.") and name.endswith(".B"))


def test_router_is_the_linear_discriminant_in_float64(model, trained):
    states = {task: _prompt_states(model, asked).numpy() for task, asked in ASKED.items()}
    means = {task: x.mean(0) for task, x in states.items()}
    within = np.concatenate([x - means[task] for task, x in states.items()])
    S = within.T @ within / len(within)
    inverse = np.linalg.inv(S + 0.1 * S.diagonal().mean() * np.eye(len(S)))
    questions = ["Who is the teacher of Fenda?", "Where is the river?", "Name Norbach."]
    expected = []
    for x in _prompt_states(model, questions).numpy():
        scores = {task: mean @ inverse @ x - mean @ inverse @ mean / 2 for task, mean in means.items()}
        expected.append(max(scores, key=scores.get))
    assert trained.route(model, questions) == expected
    assert all(trained.route(model, asked) == [task] * 3 for task, asked in ASKED.items())


def test_answers_are_those_of_the_routed_expert(model, trained):
    from hypernet.consolidation.weights import installed

    questions = [ASKED["people"][0], ASKED["towns"][0], ASKED["people"][1]]
    before = {name: value.clone() for name, value in model.base_model.named_parameters()}
    found = trained.generate(model, questions, max_new_tokens=5)
    for question, answer, task in zip(questions, found, trained.route(model, questions), strict=True):
        with installed(model.base_model, trained.tensors(model, task)):
            assert model.generate([question], max_new_tokens=5) == [answer]
    assert all(torch.equal(before[name], value) for name, value in model.base_model.named_parameters())


def test_mistakes_are_one_line(model, trained):
    with pytest.raises(ValueError, match="The task 'towns' needs a name of its own, moves that were trained"):
        trained.add(model, "towns", trained.next(seed=0), ["Where?"])
    with pytest.raises(ValueError, match="There is no task to route to yet"):
        ExpertPerTask().route(model, ["Where?"])
    with pytest.raises(ValueError, match="shrink is 0. Give a number above 0"):
        ExpertPerTask(shrink=0)
