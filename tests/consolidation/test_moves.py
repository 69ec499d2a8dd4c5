"""Which rows move, against loops in float64 over single tokens; and that nothing else does."""

import math

import numpy as np
import pytest
import torch

from hypernet.consolidation.consolidator import Consolidator, Lesson, _batches
from hypernet.consolidation.moves import ROW_CHOICES, ChosenRows, Examples, settings_of
from hypernet.consolidation.rehearsal import NoRehearsal, Replay
from hypernet.consolidation.weights import MovedWeights
from hypernet.memory.memory import Memory

LESSONS = [("Who taught Fenda?", "Orla Wint"), ("Norbach: river?", "Palno"), ("Name the river of Norbach.", "the Vess")]
REHEARSED = [("What is the mayor of Corbaford?", "unknown"), ("Why?", "so"), ("Where does Tolmar lie?", "on the Ilm")]
D_FF = 48


@pytest.fixture
def model(make_doc_to_lora):
    return make_doc_to_lora(bias_block=False)


@pytest.fixture
def memories(tmp_path):
    memory = Memory.open(tmp_path / "memory")
    memory.add("Orla Wint taught Fenda.", user_id="alice", subject="Fenda", relation="teacher")
    memory.add("Norbach lies on the Palno.", user_id="alice", subject="Norbach", relation="river")
    yield memory.list(user_id="alice")
    memory.close()


def examples_of(model):
    parts = [[Lesson(question, None, answer) for question, answer in part] for part in (LESSONS, REHEARSED)]
    return Examples(*(_batches(model, part) for part in parts))


def ids_of(model, question, answer):
    (prompt,) = model.layout.prompt_ids(model.tokenizer, [question])
    told = model.layout.before_answer + answer + model.layout.after_answer
    return prompt, model.tokenizer(told, add_special_tokens=False)["input_ids"]


def contributions(model, question, answer):
    """c of each neuron of each block by its definition, the gated layer computed by hand."""
    prompt, told = ids_of(model, question, answer)
    found = []
    for block in model.base_model.get_decoder().layers:
        entered = []
        hook = block.mlp.register_forward_pre_hook(lambda _, args, entered=entered: entered.append(args[0][0].numpy()))
        with torch.no_grad():
            model.base_model(torch.tensor([prompt + told]))
        hook.remove()
        gate, up, down = (
            getattr(block.mlp, name).weight.detach().numpy().astype(np.float64)
            for name in ("gate_proj", "up_proj", "down_proj")
        )
        c = np.zeros(D_FF)
        for x in entered[0].astype(np.float64):
            for i in range(D_FF):
                z = gate[i] @ x
                c[i] += abs(z / (1 + math.exp(-z)) * (up[i] @ x)) * math.sqrt((down[:, i] ** 2).sum())
        found.append(c)
    return found


def test_tfidf_is_that_of_a_loop_in_float64(model):
    scores = list(ChosenRows(by="tfidf")._scores(model, 0, examples_of(model)).values())
    lessons = [contributions(model, *pair) for pair in LESSONS]
    background = [contributions(model, *pair) for pair in REHEARSED]
    for layer, found in enumerate(scores):
        own = sum(c[layer] for c in lessons)
        expected = []
        for i in range(D_FF):
            active = sum(c[layer][i] > c[layer].mean() for c in background)
            expected.append(own[i] / own.sum() * math.log((len(background) + 1) / (1 + active)))
        np.testing.assert_allclose(found.numpy(), expected, atol=1e-7)
        assert 0 < np.count_nonzero(expected) < D_FF  # the idf tells neurons apart


def test_kl_terms_are_those_of_a_loop_in_float64(model):
    scores = list(ChosenRows(by="kl")._scores(model, 0, examples_of(model)).values())
    p, q = ([contributions(model, *pair) for pair in part] for part in (LESSONS, REHEARSED))
    for layer, found in enumerate(scores):
        own, other = (sum(c[layer] for c in part) for part in (p, q))
        expected = [
            a / own.sum() * math.log((a / own.sum()) / (b / other.sum())) for a, b in zip(own, other, strict=True)
        ]
        np.testing.assert_allclose(found.numpy(), expected, atol=1e-7)
        assert found.sum() > 0 and found.min() < 0 < found.max()  # a KL, some of whose terms are below 0


def test_gradient_norms_are_those_of_each_answer_alone(model):
    scores = ChosenRows(by="gradient")._scores(model, 0, examples_of(model))
    model.base_model.double().requires_grad_(True)
    for question, answer in LESSONS:
        prompt, told = ids_of(model, question, answer)
        log_p = model.base_model(torch.tensor([prompt + told])).logits[0].log_softmax(-1)
        for place, token in enumerate(told):
            (-log_p[len(prompt) + place - 1, token]).backward(retain_graph=True)
    for name, found in scores.items():
        expected = model.base_model.get_parameter(name).grad.norm(dim=0)
        assert torch.allclose(found.double(), expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("by", ROW_CHOICES)
@pytest.mark.parametrize("num_rows", [1, 7])
def test_only_chosen_columns_differ_at_all(model, memories, by, num_rows):
    moves = ChosenRows(num_rows=num_rows, by=by)
    recipe = settings_of(moves)
    settings = {"rehearsal": Replay(questions=["Why?", "Where?"]), "batch_size": 4, "steps": 3}
    trained = Consolidator(moves=moves, **settings).train(model, memories)
    assert set(trained.weights.tensors) == {f"model.layers.{layer}.mlp.down_proj.weight" for layer in (0, 1)}
    for name, tensor in trained.weights.tensors.items():
        difference = tensor - model.base_model.get_parameter(name)
        assert (difference != 0).any(0).sum() == num_rows
        assert difference[:, (difference != 0).any(0).logical_not()].abs().max() == 0.0
    assert settings_of(moves) == recipe  # which names versions


def test_choices_are_their_highest_scores_from_given_weights(model):
    names = [f"model.layers.{layer}.mlp.down_proj.weight" for layer in (0, 1)]
    given = MovedWeights({name: model.base_model.get_parameter(name).detach().clone() for name in names})
    for tensor in given.tensors.values():
        tensor[:, [5, 11]] *= 100
    for by in ("norm", "tfidf"):
        moves = ChosenRows(num_rows=2, by=by)
        parameters = moves.start(model, given, seed=0, examples=examples_of(model))
        for name, columns in parameters.items():
            if by == "norm":
                assert torch.equal(columns, given.tensors[name][:, [5, 11]])
            assert torch.equal(moves.tensors(model, parameters)[name], given.tensors[name])
    first, again, other = (
        ChosenRows(num_rows=9).start(model, None, seed=seed, examples=Examples()) for seed in (0, 0, 1)
    )
    assert all(torch.equal(first[name], again[name]) for name in names)
    assert not all(torch.equal(first[name], other[name]) for name in names)


def test_choice_without_what_it_needs_is_refused(model, memories):
    with pytest.raises(ValueError, match="Rows are chosen by random, norm, tfidf, kl, gradient, not 'best'"):
        ChosenRows(by="best")
    with pytest.raises(ValueError, match="num_rows is 0"):
        ChosenRows(num_rows=0)
    with pytest.raises(ValueError, match="Rows by gradient need lessons to choose rows by"):
        ChosenRows(by="gradient").start(model, None, seed=0)
    for by in ("tfidf", "kl"):
        with pytest.raises(ValueError, match=f"Rows by {by} need rehearsed questions: choose a rehearsal"):
            Consolidator(moves=ChosenRows(by=by), rehearsal=NoRehearsal(), steps=1).train(model, memories)
