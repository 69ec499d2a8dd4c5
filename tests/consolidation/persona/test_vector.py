"""PersonaVector: means by hand, added at every token, gone afterwards."""

import pytest
import torch

from hypernet.consolidation.persona.character import Character
from hypernet.consolidation.persona.vector import PersonaVector

OWN = [("Say something.", "I like crowds."), ("And more?", "Parties are fun.")]
OTHERS = [("Say something.", "I stay at home.")]


@pytest.fixture
def model(make_doc_to_lora):
    return make_doc_to_lora()


@torch.no_grad()
def hidden(model, asked, *, layer, document=None):
    """Of all tokens that predict an answer, one prompt at a time."""
    found = []
    for prompt, answer in asked:
        (ids,) = model.layout.prompt_ids(model.tokenizer, [prompt], [document])
        told = model.tokenizer(model.layout.before_answer + answer, add_special_tokens=False)["input_ids"]
        states = model.base_model(torch.tensor([ids + told]), output_hidden_states=True).hidden_states[layer + 1]
        found += list(states[0, len(ids) - 1 : -1])
    return torch.stack(found)


def test_vector_is_the_difference_of_means(model):
    vector = PersonaVector.of_answers(model, OWN, OTHERS, layer=0)
    expected = hidden(model, OWN, layer=0).mean(0) - hidden(model, OTHERS, layer=0).mean(0)
    assert torch.allclose(vector.v, expected, atol=1e-5)
    with pytest.raises(ValueError, match="give answers in character and others"):
        PersonaVector.of_answers(model, OWN, [], layer=0)
    with pytest.raises(ValueError, match=r"layer is 7\. Give a block's number, 0 to 1"):
        PersonaVector.of_answers(model, OWN, OTHERS, layer=7)


def test_sheets_are_told_apart_on_the_same_prompts(model):
    ada, bob = Character("ada", says=("I like crowds",)), Character("bob", never=("I like crowds",))
    vector = PersonaVector.of_sheets(model, ada, bob, ["Shall we go out?"], layer=0)
    means = [
        hidden(model, [("Shall we go out?", "Yes")], layer=0, document=one.sheet() + ".").mean(0) for one in (ada, bob)
    ]
    assert torch.allclose(vector.v, means[0] - means[1], atol=1e-5) and vector.v.norm() > 0


def test_steering_adds_alpha_v_and_takes_it_away(model):
    vector, probe = PersonaVector.of_answers(model, OWN, OTHERS, layer=0), torch.tensor([[3, 5, 8]])

    @torch.no_grad()
    def logits():
        return model.base_model(probe).logits

    before = logits()
    with vector.steering(-2.5):
        steered = logits()
    assert torch.equal(logits(), before) and not torch.allclose(steered, before, atol=1e-2)
    # What is added behind a block is a bias of its last layer.
    down = model.base_model.get_decoder().layers[0].mlp.down_proj
    down.bias = torch.nn.Parameter(-2.5 * vector.v)
    assert torch.allclose(steered, logits(), atol=1e-5)


def test_random_vector_has_the_norm_and_another_direction(model):
    vector = PersonaVector.of_answers(model, OWN, OTHERS, layer=1)
    drawn = vector.random(seed=0)
    assert drawn.v.norm().item() == pytest.approx(vector.v.norm().item(), rel=1e-5)
    assert torch.nn.functional.cosine_similarity(drawn.v, vector.v, dim=0).abs() < 0.9
    assert torch.equal(drawn.v, vector.random(seed=0).v) and not torch.equal(drawn.v, vector.random(seed=1).v)
