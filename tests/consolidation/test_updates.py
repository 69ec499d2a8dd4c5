"""One step of plain gradient descent by each choice of what moves, against the same step computed in float64 from the
gradient of whole weights; what is frozen differs by exactly 0, and moved parts are counted from the difference."""

import numpy as np
import pytest
import torch

from hypernet.base.product_keys import add_memory_layer
from hypernet.consolidation.consolidator import _forward
from hypernet.consolidation.moves import (
    ATTENTION_AND_MLP,
    ChosenRows,
    Everything,
    LowRank,
    MemorySlots,
    OrthogonalSubspace,
    UpperBlocks,
)
from tests.consolidation.test_moves import LESSONS, examples_of, ids_of

LR = 0.5
BLOCKS = ("model.layers.0.", "model.layers.1.")


@pytest.fixture
def model(make_doc_to_lora):
    """In float64 with a memory layer in its first block."""
    model = make_doc_to_lora(bias_block=False)
    memory = add_memory_layer(model.base_model, {"layer": 0, "num_keys": 7, "num_heads": 2, "top_k": 2, "key_dim": 4})
    with torch.no_grad():
        memory.values.normal_()
    model.base_model.double()
    return model


def loss_of(model, tensors, rows):
    logits = _forward(model, tensors, rows, False).logits
    return torch.nn.functional.cross_entropy(logits, rows.targets()[rows.target_kind >= 0])


def stepped(model, moves):
    """Weights at the start and after one step of `moves` down the loss on the lessons; and the parts that move."""
    examples = examples_of(model)
    parameters = moves.start(model, None, seed=3, examples=examples)
    start = {name: p.detach().clone() for name, p in parameters.items()}
    loss_of(model, moves.tensors(model, parameters), examples.lessons[0]).backward()
    with torch.no_grad():
        for parameter in parameters.values():
            parameter -= LR * parameter.grad
    return moves.result(model, parameters).tensors, start


def gradients(model):
    """Of -log p, the mean over answer tokens, with respect to every weight; each lesson read by itself."""
    base_model = model.base_model
    base_model.requires_grad_(True).zero_grad()
    told = [ids_of(model, *lesson) for lesson in LESSONS]
    number = sum(len(answer) for _, answer in told)
    for prompt, answer in told:
        log_p = base_model(torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
        for place, token in enumerate(answer):
            (-log_p[len(prompt) + place - 1, token] / number).backward(retain_graph=True)
    found = {name: p.grad.numpy().copy() for name, p in base_model.named_parameters() if p.grad is not None}
    base_model.requires_grad_(False)
    return found


def differences(model, moved):
    """Name → difference, of the weights that differ at all."""
    own = {name: p.detach() for name, p in model.base_model.named_parameters()}
    found = {name: (tensor.detach() - own[name]).numpy() for name, tensor in moved.items()}
    return {name: difference for name, difference in found.items() if np.any(difference)}


def assert_close(found, expected):
    # The forward pass gives its logits back in float32.
    np.testing.assert_allclose(found, expected, atol=2e-6 * max(1.0, np.abs(expected).max()))


WHOLE = [
    (Everything(), ("",)),
    *((UpperBlocks(num_frozen=n), BLOCKS[n:]) for n in range(2)),
    *(
        (UpperBlocks(num_frozen=n, embeddings=True), (*BLOCKS[n:], "model.embed", "model.norm", "lm_head"))
        for n in range(3)
    ),
]


@pytest.mark.parametrize(("moves", "beginnings"), WHOLE)
def test_whole_weights_follow_their_gradient(model, moves, beginnings):
    moved, _ = stepped(model, moves)
    of_all = gradients(model)
    expected = {name: -LR * g for name, g in of_all.items() if name.startswith(tuple(beginnings)) and g.any()}
    found = differences(model, moved)
    assert set(found) == set(expected) and len(expected) > 1
    for name, difference in found.items():
        assert_close(difference, expected[name])
    if len(beginnings) > 1 and not any(name.startswith("model.embed") for name in beginnings):
        assert "model.embed_tokens.weight" in of_all  # would have moved


@pytest.mark.parametrize("rank", [2, 8, 32])
def test_low_rank_moves_by_gradients_of_its_factors(model, rank):
    moved, start = stepped(model, LowRank(rank=rank))
    of_all, found = gradients(model), differences(model, moved)
    wanted = {name for name in of_all if name.endswith(tuple(f"{name}.weight" for name in ATTENTION_AND_MLP))}
    assert set(found) == wanted
    for name, difference in found.items():
        A = start[name.replace("weight", "A")].double().numpy()
        # B is 0 at the start, so that A stands still: ΔW = Bᵀ A with B = -lr A Gᵀ.
        assert_close(difference, -LR * of_all[name] @ A.T @ A)
        assert np.linalg.matrix_rank(difference, tol=1e-5 * np.linalg.norm(difference)) <= rank


@pytest.mark.parametrize("by", ["random", "norm", "tfidf", "kl", "gradient"])
def test_chosen_rows_follow_their_gradient_and_the_rest_stays(model, by):
    moved, _ = stepped(model, ChosenRows(num_rows=5, by=by))
    of_all, found = gradients(model), differences(model, moved)
    assert set(found) == {f"{block}mlp.down_proj.weight" for block in BLOCKS}
    for name, difference in found.items():
        changed = np.any(difference != 0, axis=0)
        assert changed.sum() == 5 and not difference[:, ~changed].any()
        assert_close(difference[:, changed], -LR * of_all[name][:, changed])


@pytest.mark.parametrize("by", ["tfidf", "kl", "random"])
def test_slots_follow_their_gradient_and_the_rest_stays(model, by):
    moved, _ = stepped(model, MemorySlots(num_slots=5, by=by))
    of_all = gradients(model)
    ((name, difference),) = differences(model, moved).items()
    changed = np.any(difference != 0, axis=1)
    assert name == "model.layers.0.mlp.memory.values"
    assert changed.sum() == 5 and not difference[~changed].any()
    assert_close(difference[changed], -LR * of_all[name][changed])


@pytest.mark.parametrize("kept", [0.01, 0.3, 0.75])
def test_orthogonal_subspace_moves_as_its_formula(model, kept):
    moved, _ = stepped(model, OrthogonalSubspace(kept=kept))
    of_all, found = gradients(model), differences(model, moved)
    assert set(found) == {name for name in of_all if name.endswith(tuple(f"{n}.weight" for n in ATTENTION_AND_MLP))}
    for name, difference in found.items():
        W, G = model.base_model.get_parameter(name).detach().numpy(), of_all[name]
        U, S, V = np.linalg.svd(W, full_matrices=False)
        k = max(1, round(kept * min(W.shape)))
        U1, V1, U2, S2, V2 = U[:, :k], V[:k], U[:, k:], S[k:], V[k:]
        dU, dS, dV = G @ V2.T * S2, np.diag(U2.T @ G @ V2.T), (U2 * S2).T @ G
        dU, dV = dU - U1 @ (U1.T @ dU), dV - (dV @ V1.T) @ V1
        expected = ((U2 - LR * dU) * (S2 - LR * dS)) @ (V2 - LR * dV) - (U2 * S2) @ V2
        # PEFT decomposes in float32.
        np.testing.assert_allclose(difference, expected, atol=2e-5 * max(1.0, np.abs(expected).max()))
        assert np.abs(U1.T @ difference @ V1.T).max() < 1e-5 * max(1.0, np.abs(difference).max())


def test_orthogonal_subspace_starts_at_what_is_given(model):
    from hypernet.consolidation.weights import MovedWeights

    names = [name for name, _ in model.base_model.named_parameters() if name.endswith("up_proj.weight")]
    given = {name: torch.randn_like(model.base_model.get_parameter(name)) for name in names}
    moves = OrthogonalSubspace()
    parameters = moves.start(model, MovedWeights(given), seed=0)
    tensors = moves.tensors(model, parameters)
    for name, tensor in tensors.items():
        assert torch.equal(tensor, given.get(name, model.base_model.get_parameter(name)))


@pytest.mark.parametrize(
    ("moves", "says"),
    [
        (
            lambda model: UpperBlocks(num_frozen=3).names(model),
            "num_frozen is 3, the base model has 2 blocks. Give 0 to 2",
        ),
        (lambda model: UpperBlocks(num_frozen=-1).names(model), "num_frozen is -1"),
        (lambda model: UpperBlocks(num_frozen=2).names(model), "Nothing moves with all 2 blocks frozen"),
        (lambda model: OrthogonalSubspace(kept=1.0), "kept is 1.0. Give a share between 0 and 1"),
    ],
)
def test_settings_that_cannot_be_are_refused(model, moves, says):
    with pytest.raises(ValueError, match=says):
        moves(model)
