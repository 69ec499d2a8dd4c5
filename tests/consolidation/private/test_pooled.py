"""Pooled training: each user's gradient by itself, clipped, summed, with noise; against autograd and by hand."""

import math

import pytest
import torch

from hypernet.base.packed_rows import Segment, pack_row, pad_rows
from hypernet.consolidation.consolidator import Lesson
from hypernet.consolidation.private.accounting import RenyiAccountant, tree_sensitivity
from hypernet.consolidation.private.gradients import UserGradients
from hypernet.consolidation.private.pooled import PooledConsolidator, clipped, read_pairs
from hypernet.consolidation.weights import installed

USERS = {
    "alice": [("Who taught Fenda?", "Orla Wint"), ("Norbach: river?", "Palno")],
    "bob": [("Name the river of Norbach.", "the Vess")],
    "carol": [("Where does Tolmar lie?", "on the Ilm"), ("Who taught Fenda?", "Orla Wint")],
}
LESSONS = {user: [Lesson(question, None, answer) for question, answer in pairs] for user, pairs in USERS.items()}
PAIRS = [pair for pairs in USERS.values() for pair in pairs]
OWNERS = [0, 0, 1, 2, 2]
EVERYTHING = {"sampling_rate": 1.0, "lessons_per_user": 9, "rank": 3, "lr": 0.5, "momentum": 0.0, "secure": False}


@pytest.fixture
def model(make_doc_to_lora):
    return make_doc_to_lora(bias_block=False)


@pytest.fixture
def gradients(model):
    return UserGradients(model, rank=3, seed=1)


@pytest.fixture
def theta(gradients):
    return 0.5 * torch.randn(gradients.size, generator=torch.Generator().manual_seed(5))


def by_autograd(model, gradients, theta, user):
    """The mean of the losses of one user's rows, differentiated through the whole base model."""
    theta = theta.clone().requires_grad_()
    path = gradients._place.path
    weight = model.base_model.get_parameter(f"{path}.weight").detach() + gradients._B(theta).T @ gradients._A
    losses = []
    for question, answer in USERS[user]:
        (prompt,) = model.layout.prompt_ids(model.tokenizer, [question])
        told = model.layout.before_answer + answer + model.layout.after_answer
        ids = torch.tensor([prompt + model.tokenizer(told, add_special_tokens=False)["input_ids"]])
        logits = torch.func.functional_call(model.base_model, {f"{path}.weight": weight}, (ids,)).logits[0]
        behind = logits[len(prompt) - 1 : -1]
        losses.append(torch.nn.functional.cross_entropy(behind, ids[0, len(prompt) :]))
    loss = sum(losses) / len(losses)
    return torch.autograd.grad(loss, theta)[0], loss.item()


def test_gradients_of_users_are_autograd_s_one_by_one(model, gradients, theta):
    found, losses = gradients(theta, read_pairs(model, gradients, PAIRS), owners=OWNERS, num_users=4)
    for place, user in enumerate(USERS):
        expected, loss = by_autograd(model, gradients, theta, user)
        assert torch.allclose(found[place], expected, rtol=1e-3, atol=1e-6)
        assert losses[place].item() == pytest.approx(loss, rel=1e-4)
    assert not found[3].any() and losses[3] == 0


def test_likelihoods_are_those_of_the_weights_that_come_out(model, gradients, theta):
    questions, answers = zip(*PAIRS, strict=True)
    read = read_pairs(model, gradients, PAIRS)
    with installed(model.base_model, gradients.result(theta).tensors):
        expected = model.log_likelihoods(questions, answers)
    assert gradients.log_likelihoods(theta, read) == pytest.approx(expected, rel=1e-3)
    assert gradients.log_likelihoods(gradients.start(), read) == pytest.approx(
        model.log_likelihoods(questions, answers), rel=1e-3
    )


def test_rightly_is_greedy_decoding(model, gradients):
    (text,) = model.generate(["Who taught Fenda?"], max_new_tokens=4)
    read = read_pairs(model, gradients, [("Who taught Fenda?", text), ("Who taught Fenda?", "Orla Wint")])
    written = gradients.read(rows_of_tokens(model, "Who taught Fenda?", max_new_tokens=4))
    assert gradients.rightly(gradients.start(), written) == [True]
    assert gradients.rightly(gradients.start(), read)[1] is False


def rows_of_tokens(model, question, *, max_new_tokens):
    """A row whose answer is what the base model writes, token by token."""
    (prompt,) = model.layout.prompt_ids(model.tokenizer, [question])
    ids = list(prompt)
    for _ in range(max_new_tokens):
        with torch.no_grad():
            ids.append(int(model.base_model(torch.tensor([ids])).logits[0, -1].argmax()))
    return pad_rows([pack_row((), [Segment(ids, len(prompt), False, 0)])], pad_id=0)


def test_rows_are_chosen_in_the_order_asked_for(model, gradients, theta):
    read = read_pairs(model, gradients, PAIRS)
    values = gradients.log_likelihoods(theta, read)
    assert gradients.log_likelihoods(theta, read.rows([3, 0, 3])) == pytest.approx([values[3], values[0], values[3]])


def test_long_gradients_are_shortened_and_short_ones_stay():
    rows = torch.tensor([[3.0, 4.0], [0.3, 0.4], [0.0, 0.0]])
    assert torch.allclose(clipped(rows, 1.0), torch.tensor([[0.6, 0.8], [0.3, 0.4], [0.0, 0.0]]))


def test_step_without_noise_is_the_mean_of_clipped_gradients(model, gradients):
    clip = 0.5
    pooled = PooledConsolidator(epsilon=math.inf, rounds=1, clip=clip, seed=1, **EVERYTHING)
    trained = pooled.train(model, LESSONS)
    found, losses = gradients(gradients.start(), read_pairs(model, gradients, PAIRS), owners=OWNERS, num_users=3)
    assert torch.allclose(trained.theta, -0.5 * clipped(found, clip).mean(0), atol=1e-6)
    assert trained.clipped == pytest.approx((found.norm(dim=1) > clip).float().mean().item())
    assert trained.losses == [pytest.approx(losses.mean().item(), rel=1e-4)]
    assert (trained.epsilon, trained.spending, trained.noise) == (math.inf, None, 0.0)


def test_momentum_keeps_earlier_steps(model):
    settings = {**EVERYTHING, "momentum": 0.9, "lr": 1e-4}  # so small a step that gradients stay what they are
    one = PooledConsolidator(epsilon=math.inf, rounds=1, **settings).train(model, LESSONS).theta
    two = PooledConsolidator(epsilon=math.inf, rounds=2, **settings).train(model, LESSONS).theta
    assert torch.allclose(two, (1 + 1.9) * one, rtol=0.02, atol=1e-8)


@pytest.mark.parametrize("mechanism", ["dp_sgd", "dp_ftrl"])
def test_one_user_changes_a_round_by_a_clip_at_most(model, mechanism):
    settings = {**EVERYTHING, "clip": 0.01, "lr": 1.0}
    with_all = PooledConsolidator(epsilon=math.inf, mechanism=mechanism, rounds=1, **settings).train(model, LESSONS)
    others = {user: LESSONS[user] for user in ("alice", "bob")}
    without = PooledConsolidator(epsilon=math.inf, mechanism=mechanism, rounds=1, **settings).train(model, others)
    # Sums, not means: the denominators are 3 and 2 users.
    assert (3 * with_all.theta - 2 * without.theta).norm().item() == pytest.approx(0.01, rel=1e-3)


def test_noise_is_what_the_accountant_asked_for(model):
    settings = {**EVERYTHING, "clip": 1e-6, "rank": 32, "lr": 1.0}
    trained = PooledConsolidator(epsilon=2.0, delta=0.01, rounds=4, **settings).train(model, LESSONS)
    # Four rounds of noise on sums over three users; gradients are no longer than a clip.
    expected = trained.noise * 1e-6 * 4**0.5 / 3
    assert trained.theta.std().item() == pytest.approx(expected, rel=0.15)
    assert trained.epsilon == RenyiAccountant().epsilon(trained.spending, delta=0.01) <= 2.0


def test_tree_is_accounted_for_by_the_turns_of_its_users(model):
    pooled = PooledConsolidator(epsilon=2.0, delta=0.01, mechanism="dp_ftrl", rounds=7, sampling_rate=0.34, rank=3)
    schedule = pooled.schedule(3)
    assert sorted(user for present in schedule[:3] for user in present) == [0, 1, 2]
    turns = [[step for step, present in enumerate(schedule, 1) if user in present] for user in range(3)]
    assert turns[schedule[0][0]] == [1, 4, 7]
    trained = pooled.train(model, LESSONS)
    assert trained.noise == pytest.approx(trained.spending.noise * tree_sensitivity(turns, rounds=7))
    assert trained.epsilon <= 2.0


def test_sampled_rounds_have_each_user_with_its_rate():
    schedule = PooledConsolidator(rounds=400, sampling_rate=0.25).schedule(50)
    assert sum(map(len, schedule)) / (400 * 50) == pytest.approx(0.25, abs=0.02)
    assert len({len(present) for present in schedule}) > 5


def test_masked_sums_train_the_same_weights(model):
    settings = {**EVERYTHING, "epsilon": 4.0, "delta": 0.01, "rounds": 3}
    plain, masked = (PooledConsolidator(**settings | {"secure": secure}).train(model, LESSONS) for secure in (0, 1))
    assert torch.allclose(plain.theta, masked.theta, atol=1e-6) and plain.noise == masked.noise


def test_same_seed_trains_the_same_bits(model):
    settings = {**EVERYTHING, "epsilon": 4.0, "delta": 0.01, "rounds": 3}
    first, again = (PooledConsolidator(**settings).train(model, dict(reversed(LESSONS.items()))) for _ in range(2))
    other = PooledConsolidator(**settings, seed=1).train(model, LESSONS)
    assert torch.equal(first.theta, again.theta) and not torch.equal(first.theta, other.theta)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mechanism": "dp_adam"}, "Choose dp_sgd or dp_ftrl"),
        ({"epsilon": 0.0}, "epsilon is 0.0"),
        ({"clip": 0.0}, "must be above 0 and finite"),
        ({"sampling_rate": 1.5}, "sampling rate in"),
    ],
)
def test_impossible_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        PooledConsolidator(**settings)


def test_users_without_lessons_and_large_deltas_are_refused(model):
    with pytest.raises(ValueError, match="needs users with a lesson each"):
        PooledConsolidator().train(model, {"alice": []})
    with pytest.raises(ValueError, match="delta is 0.5 for 3 users. Give one below 3.3e-01"):
        PooledConsolidator(delta=0.5).train(model, LESSONS)
    with pytest.raises(ValueError, match="rank is 0"):
        UserGradients(model, rank=0)
