"""Which slots of a memory layer move, against counts by a loop; and that nothing else does."""

import math
from collections import Counter

import numpy as np
import pytest
import torch

from hypernet.base.product_keys import add_memory_layer, memory_layers
from hypernet.consolidation.consolidator import Consolidator
from hypernet.consolidation.moves import SLOT_CHOICES, Examples, MemorySlots
from hypernet.consolidation.rehearsal import NoRehearsal, Replay
from hypernet.consolidation.weights import MovedWeights
from tests.consolidation.test_moves import LESSONS, REHEARSED, examples_of, ids_of, memories  # noqa: F401

NAME = "model.layers.1.mlp.memory.values"
NUM_SLOTS = 49


@pytest.fixture
def model(make_doc_to_lora):
    model = make_doc_to_lora(bias_block=False)
    memory = add_memory_layer(model.base_model, {"layer": 1, "num_keys": 7, "num_heads": 2, "top_k": 2, "key_dim": 4})
    with torch.no_grad():
        memory.values.normal_()
    return model


def reads(model, question, answer):
    """How often the tokens of one prompt with its answer read each slot."""
    prompt, told = ids_of(model, question, answer)
    (memory,) = memory_layers(model.base_model).values()
    entered = []
    hook = memory.register_forward_pre_hook(lambda _, args: entered.append(args[0][0]))
    with torch.no_grad():
        model.base_model(torch.tensor([prompt + told]))
    hook.remove()
    found = Counter()
    for x in entered[0]:
        for head in memory.lookup(x[None])[0][0]:
            found.update(head.tolist())
    assert found.total() == 4 * len(prompt + told)
    return np.array([found[slot] for slot in range(NUM_SLOTS)], dtype=np.float64)


def test_scores_are_those_of_counts_in_float64(model):
    own = sum(reads(model, *pair) for pair in LESSONS)
    background = [reads(model, *pair) for pair in REHEARSED]
    rarity = [math.log((len(background) + 1) / (1 + sum(c[i] > 0 for c in background))) for i in range(NUM_SLOTS)]
    (found,) = MemorySlots(by="tfidf")._scores(model, 0, examples_of(model)).values()
    np.testing.assert_allclose(found.numpy(), own / own.sum() * rarity, atol=1e-7)
    p, q = own / own.sum(), (sum(background) + 1) / (sum(background) + 1).sum()
    expected = [a * math.log(a / b) if a else 0.0 for a, b in zip(p, q, strict=True)]
    (found,) = MemorySlots(by="kl")._scores(model, 0, examples_of(model)).values()
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-7)
    (found,) = MemorySlots(by="random")._scores(model, 0, examples_of(model)).values()
    assert {slot for slot in range(NUM_SLOTS) if found[slot] > 0} == set(np.flatnonzero(own))


@pytest.mark.parametrize("by", SLOT_CHOICES)
def test_only_chosen_slots_differ_at_all(model, memories, tmp_path, by):  # noqa: F811
    moves = MemorySlots(num_slots=5, by=by)
    settings = {"rehearsal": Replay(questions=["Why?", "Where?"]), "batch_size": 4, "steps": 3}
    trained = Consolidator(moves=moves, **settings).train(model, memories)
    assert set(trained.weights.tensors) == {NAME}
    difference = trained.weights.tensors[NAME] - model.base_model.get_parameter(NAME)
    changed = (difference != 0).any(1)
    assert 1 <= changed.sum() <= 5 and difference[~changed].abs().max() == 0.0
    trained.weights.save(tmp_path, model)
    again = MovedWeights.load(tmp_path, model)
    assert set(again.tensors) == {NAME} and torch.equal(again.tensors[NAME], trained.weights.tensors[NAME])


def test_slots_without_what_they_need_are_refused(model, make_doc_to_lora, memories):  # noqa: F811
    with pytest.raises(ValueError, match="Slots are chosen by tfidf, kl, random, not 'best'"):
        MemorySlots(by="best")
    with pytest.raises(ValueError, match="num_slots is 0"):
        MemorySlots(num_slots=0)
    with pytest.raises(ValueError, match="The base model has no memory layer .* experiment=tiny_memory_layer"):
        MemorySlots().start(make_doc_to_lora(), None, seed=0, examples=Examples())
    with pytest.raises(ValueError, match="by tfidf need rehearsed questions"):
        Consolidator(moves=MemorySlots(), rehearsal=NoRehearsal(), steps=1).train(model, memories)
