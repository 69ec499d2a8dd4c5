"""LastBlock: what it computes from one reading is what the whole model gives with the adapter put in."""

import pytest
import torch

from hypernet.consolidation.persona.last_block import Factors, LastBlock, Shared, joined

ASKED = [("Do you like crowds?", "No"), ("Why?", "They are loud."), ("Where do you live?", "In Corbaford")]


@pytest.fixture
def block(make_doc_to_lora):
    return LastBlock(make_doc_to_lora())


def factors(block, *, rank=3, seed=1):
    generator = torch.Generator().manual_seed(seed)
    shapes = (block.place.d_in, block.place.d_out)
    return Factors(*(torch.randn(rank, width, generator=generator) for width in shapes))


@torch.no_grad()
def log_p_alone(block, prompt, answer, *, chat=True):
    """Of one answer by the whole model, token by token."""
    model = block.model
    if chat:
        (ids,) = model.layout.prompt_ids(model.tokenizer, [prompt])
        told = model.tokenizer(model.layout.before_answer + answer, add_special_tokens=False)["input_ids"]
    else:
        ids, told = (model.tokenizer(text, add_special_tokens=False)["input_ids"] for text in (prompt, f" {answer}"))
    log_p = model.base_model(torch.tensor([ids + told])).logits[0].log_softmax(-1)
    return float(sum(log_p[len(ids) - 1 + place, token] for place, token in enumerate(told)))


@pytest.mark.parametrize("chat", [True, False])
def test_log_p_is_that_of_the_whole_model_with_the_adapter(block, chat):
    lora = factors(block)
    read = block.read(ASKED, chat=chat)
    plain = [log_p_alone(block, *pair, chat=chat) for pair in ASKED]
    assert block.log_p(read).tolist() == pytest.approx(plain, abs=1e-3)
    injector = block.injector()
    with injector.using(block.adapter(lora, name="ada")):
        adapted = [log_p_alone(block, *pair, chat=chat) for pair in ASKED]
    injector.remove()
    assert block.log_p(read, lora).tolist() == pytest.approx(adapted, abs=1e-3)
    assert max(abs(a - b) for a, b in zip(plain, adapted, strict=True)) > 0.1


def test_document_stands_before_the_prompt(block):
    read = block.read(ASKED[:2], ["I live alone.", None])
    whole = block.read([("I live alone.\n\nDo you like crowds?", "No"), ASKED[1]])
    assert block.log_p(read).tolist() == pytest.approx(block.log_p(whole).tolist(), abs=1e-4)


def test_log_odds_are_differences_of_log_likelihoods(block):
    place, yes, no = block.told_apart("Yes", "No")
    read, other = (block.read([("Why?", word)]) for word in ("Yes", "No"))
    lora = factors(block)
    first = read.rows([0])
    where = torch.tensor([place])
    first = first._replace(
        inputs=first.inputs[where], residual=first.residual[where], targets=torch.tensor([yes]), row=torch.tensor([0])
    )
    odds = block.log_odds(first, torch.tensor([no]), lora)
    log_p = block.logits(first, lora).log_softmax(-1)[0]
    assert float(odds) == pytest.approx(float(log_p[yes] - log_p[no]), abs=1e-4)
    assert read.targets[place] == yes and other.targets[place] == no
    with pytest.raises(ValueError, match="have no place where they differ"):
        block.told_apart("Yes", "Yes")


def test_several_loras_work_on_their_own_rows(block):
    read = joined([block.read(ASKED[:1]), block.read(ASKED[:1])])
    one, other = factors(block), factors(block, seed=2)
    both = Factors(*(torch.stack(pair) for pair in zip(one, other, strict=True)))
    expected = [block.log_p(block.read(ASKED[:1]), lora) for lora in (one, other)]
    assert torch.allclose(block.log_p(read, both), torch.cat(expected), atol=1e-4)


def test_swapped_personas_leave_no_residue(block):
    model, probe = block.model, torch.tensor([[3, 5, 8]])
    weights = {name: p.clone() for name, p in model.base_model.named_parameters()}
    with torch.no_grad():
        before = model.base_model(probe).logits
        injector, found = block.injector(), []
        one, other = (block.adapter(factors(block, seed=seed), name="x") for seed in (1, 2))
        for adapter in (one, other, None, one):
            with injector.using(adapter):
                found.append(model.base_model(probe).logits)
        injector.remove()
        after = model.base_model(probe).logits
    assert torch.equal(found[2], before) and torch.equal(after, before) and torch.equal(found[0], found[3])
    assert not torch.equal(found[0], before) and not torch.equal(found[0], found[1])
    assert all(torch.equal(weights[name], p) for name, p in model.base_model.named_parameters())


def test_shared_direction_is_removed_by_hand():
    inputs = torch.tensor([[3.0, 4.0, 1.0], [3.0, 4.0, -1.0]], dtype=torch.float64)
    shared = Shared.of(inputs)  # the mean is (3, 4, 0), of length 5; what is left is (0, 0, 1) and (0, 0, -1)
    assert shared.directions.abs().tolist() == [pytest.approx([0.6, 0.8, 0.0])]
    assert shared.scale == pytest.approx(3**0.5)
    assert torch.allclose(shared.removed(inputs), inputs.new_tensor([[0, 0, 3**0.5], [0, 0, -(3**0.5)]]))
    more = Shared.of(inputs, inputs.new_tensor([[0.0, 0.0, 2.0]]), number=1)
    assert torch.allclose(more.directions.abs(), inputs.new_tensor([[0.6, 0.8, 0.0], [0.0, 0.0, 1.0]]))
    A = torch.randn(2, 3, dtype=torch.float64)
    assert torch.allclose(shared.removed(inputs) @ A.T, inputs @ shared.removed(A).T)  # a LoRA of it is one of x


def test_answer_directions_tell_answers_apart(block):
    (one,), (other,) = (
        block.answer_directions(*map(torch.tensor, pair), rank=4) for pair in (([5, 9], [9, 5]), ([5], [9]))
    )
    rows = (block._head * block.model.base_model.get_decoder().norm.weight).double()
    covariance = torch.cov(rows.T)
    covariance += 1e-3 * covariance.trace() / len(covariance) * torch.eye(len(covariance))
    expected = torch.linalg.inv(covariance) @ (rows[5] - rows[9])
    expected = (expected / expected.norm()).float()
    for found in (one, other):
        assert abs(float(found @ expected)) == pytest.approx(1.0, abs=1e-5)
    three = block.answer_directions(torch.tensor([5, 7, 8]), torch.tensor([9, 9, 4]), rank=2)
    assert torch.allclose(three @ three.T, torch.eye(2), atol=1e-5)


def test_moved_is_the_relative_length_by_hand(block):
    read, lora = block.read(ASKED), factors(block)
    delta = read.inputs @ lora.A.T @ lora.B
    expected = [float(d @ d / (r @ r)) for d, r in zip(delta, read.residual, strict=True)]
    assert float(block.moved(read, lora)) == pytest.approx(sum(expected) / len(expected), rel=1e-4)


def test_given_tokens_of_an_answer_do_not_count(block):
    read = block.read([("Why?", "Corbaford is far away")])
    said = block.logits(read).argmax(-1)
    own = read._replace(targets=said)
    wrong_first = own._replace(targets=torch.cat([said[:1] + 1, said[1:]]))
    assert block.rightly(own) == [True] and block.rightly(wrong_first) == [False]
    assert block.rightly(wrong_first, since=[1]) == [True]
    before, whole = block.answer_tokens(["Corbaford is", "Corbaford is far away"])
    assert 0 < before < whole == len(read.targets)


def test_some_tokens_are_rows_of_their_own(block):
    read = block.read(ASKED)
    some = block.some(read, [4, 0])
    assert some.num_rows == 2 and torch.equal(some.inputs, read.inputs[[4, 0]])
    assert torch.equal(some.targets, read.targets[[4, 0]])
