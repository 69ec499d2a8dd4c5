"""Refining: a document's adapter after gradient steps on questions about it, recited and distilled."""

import random

import pytest
import torch

from hypernet import refining
from hypernet.refining import _Distilled, _parted, _passages, _Recited, ask_about, refine
from tests.recited_model import DOCUMENT, OTHERS, recited_model

ASKED = {0: "Where was Velmar Tosk born?", 1: "What is the capital of Norbach?", 2: "Who is her employer?"}


@pytest.fixture(scope="module")
def model():
    return recited_model()


@pytest.fixture
def questions(monkeypatch):
    """The tiny base model writes no English questions; these stand in for its own."""

    def asked(_, passages, *, each, seed):
        return list(ASKED.items())[: len(passages)]

    monkeypatch.setattr(refining, "_asked", asked)
    monkeypatch.setattr(refining, "_write", lambda _, prompts, *args, **kwargs: ["What does Ilda do?"] * len(prompts))


def test_questions_find_their_chunks_after_some_steps(model, questions, monkeypatch):
    adapter = model.internalize(DOCUMENT)
    others = {0: "Who is it?", 1: "Which one is large?", 2: "Where was Jon Varga born?"}
    wrong = model.routing_scores(list(others.values()), adapter).argmax(1).tolist()
    assert wrong != [0, 1, 2]
    monkeypatch.setattr(refining, "_asked", lambda *_, **__: list(others.items()))
    refined = refine(model, adapter, DOCUMENT, steps=30, lr=0.1)
    assert model.routing_scores(list(others.values()), refined).argmax(1).tolist() == [0, 1, 2]
    assert model.generate([others[1]], refined, max_new_tokens=24) == ["The capital of Norbach is Ilda."]


def test_the_loss_of_a_recited_step_is_that_of_loops(model, questions):
    adapter = model.internalize(DOCUMENT)
    passages = _passages(adapter, [DOCUMENT])
    assert passages[1] == "The capital of Norbach is Ilda."
    refined = _Recited(model, adapter, passages, list(ASKED.items()), seed=0)
    refined.begin([0, 1, 2], [0, 1])
    A, B = refined.rows()
    for rows, start in zip((A, B), (adapter.A, adapter.B), strict=True):
        torch.testing.assert_close(rows["down_proj"], start["down_proj"], rtol=1e-4, atol=1e-5)  # nothing has moved yet

    class Orderly:
        def sample(self, population, count):
            return list(population)[:count]

    loss = refined.loss(Orderly())
    scores = 3.0 * model.routing_scores(list(ASKED.values()), adapter)
    each = [-scores[chunk].log_softmax(0)[chunk].item() for chunk in ASKED]
    assert loss.item() == pytest.approx(sum(each) / 3, rel=1e-4)
    assert refined.held_out_loss() == pytest.approx(sum(each[:2]) / 2, rel=1e-4)


def test_keys_move_in_their_directions_and_unused_rows_stay_zero(model, questions):
    adapter = model.internalize(DOCUMENT)
    refined = refine(model, adapter, DOCUMENT, steps=2)
    (before,), (after,) = adapter.A.values(), refined.A.values()
    part = model.hypernetwork.recitation
    moved = (after - before)[:, : part.num_key_layers]
    assert moved.abs().max() > 0 and not (after - before)[:, part.num_key_layers :].any()
    assert not after[before == 0].any()
    for layer in range(part.num_key_layers):
        rows, P = moved[:, layer].flatten(0, 1), part.metric[layer]
        within = rows @ P @ torch.linalg.pinv(P)
        torch.testing.assert_close(within @ P, rows @ P, rtol=1e-3, atol=1e-4)


def test_distilled_steps_lower_the_loss_they_are_made_of(make_doc_to_lora, questions):
    network = make_doc_to_lora()
    adapter = network.internalize(DOCUMENT)
    before = {name: rows.clone() for name, rows in adapter.A.items()}
    losses = []
    for steps in (0, 30):
        refined = refine(network, adapter, DOCUMENT, steps=steps, lr=0.05) if steps else adapter
        passages = _passages(refined, [DOCUMENT])
        start = _Distilled(network, refined, passages, list(ASKED.items())[: len(passages)], seed=0)
        with torch.no_grad():
            losses.append(start.loss(random.Random(0)).item())
        network.injector.clear()
    assert losses[1] < 0.95 * losses[0]  # .32 and .28: at random weights the prompt's answers and others' pull apart
    assert all(rows.equal(before[name]) for name, rows in adapter.A.items())
    assert refined.provenance["operations"][-1]["operation"] == "refine"
    assert refined.provenance["operations"][-1]["steps"] == 30


def test_the_same_seed_gives_the_same_adapter(make_doc_to_lora, questions, monkeypatch):
    monkeypatch.setattr(refining, "_asked", lambda *_, each, seed: [(0, ASKED[seed])])
    network = make_doc_to_lora()
    adapter = network.internalize(DOCUMENT)
    first, again, other = (refine(network, adapter, DOCUMENT, steps=2, seed=seed) for seed in (0, 0, 1))
    assert all(rows.equal(again.B[name]) for name, rows in first.B.items())
    assert any(not rows.equal(other.B[name]) for name, rows in first.B.items())


def held_out_loss(model, adapter, asked):
    refined = _Recited(model, adapter, _passages(adapter, [DOCUMENT]), asked, seed=0)
    refined.begin(*_parted(len(asked), seed=0))
    return refined.held_out_loss()


def test_what_is_held_out_is_never_answered_worse(model, monkeypatch):
    # What is trained on says the opposite of what is held out: every step makes it worse.
    adapter = model.internalize(DOCUMENT)
    asked = [(n % 3, f"{question} {n}") for n, question in enumerate(list(ASKED.values()) * 4)]
    learned, held_out = _parted(len(asked), seed=0)
    assert len(held_out) == 3
    wrong = [one if n in held_out else ((one[0] + 1) % 3, one[1]) for n, one in enumerate(asked)]
    before = held_out_loss(model, adapter, wrong)
    refined = refine(model, adapter, DOCUMENT, steps=20, lr=0.3, questions=wrong)
    torch.testing.assert_close(refined.A["down_proj"], adapter.A["down_proj"], rtol=1e-4, atol=1e-5)
    operation = refined.provenance["operations"][-1]
    assert operation["loss"] == operation["loss_before"] == pytest.approx(before, rel=1e-4)
    # Questions that agree lower it.
    agreeing = refine(model, adapter, DOCUMENT, steps=20, lr=0.3, questions=asked)
    operation = agreeing.provenance["operations"][-1]
    assert operation["held_out"] == 3 and operation["loss"] < operation["loss_before"]
    assert held_out_loss(model, agreeing, asked) == pytest.approx(operation["loss"], rel=1e-3)
    # Without the last look it would be worse.
    monkeypatch.setattr(_Recited, "held_out_loss", lambda _: None)
    worse = refine(model, adapter, DOCUMENT, steps=20, lr=0.3, questions=wrong)
    monkeypatch.undo()
    assert held_out_loss(model, worse, wrong) > before + 0.1


def test_steps_end_at_the_lowest_loss_on_what_is_held_out():
    class Falling:
        """Its loss on what is held out falls to its fourth look and rises then."""

        def __init__(self):
            self.moves = [torch.zeros(1, requires_grad=True)]
            self.looks = 0

        def loss(self, rng):
            return -self.moves[0].sum()

        def held_out_loss(self):
            self.looks += 1
            return abs(self.looks - 4.0)

    refined = Falling()
    told = []
    done = refining._stepped(refined, random.Random(0), steps=100, max_seconds=None, lr=0.1, told=told.append)
    # The fourth look is after fifteen steps of .1; four more looks without a lower loss end it.
    assert done == 35 and told == list(range(1, 36))
    assert refined.moves[0].item() == pytest.approx(1.5, abs=1e-3)


def test_the_mean_of_three_rounds_comes_back(model, monkeypatch):
    adapter = model.internalize(DOCUMENT)
    asked = [(n % 3, f"{question} {n}") for n, question in enumerate(list(ASKED.values()) * 4)]
    rounds = []

    def stepped(refined, rng, **_):
        rounds.append((list(refined.learned), list(refined.held_out)))
        assert not any(move.any() for move in refined.moves)
        with torch.no_grad():
            refined.keys += float(len(rounds))
        return 1

    means = []
    monkeypatch.setattr(refining, "_stepped", stepped)
    kept = _Recited._moved
    monkeypatch.setattr(_Recited, "_moved", lambda self: means.append(self.keys.flatten()[0].item()) or kept(self))
    refine(model, adapter, DOCUMENT, questions=asked)
    assert 2.0 in means  # of 1, 2 and 3
    rest, outer = _parted(12, seed=0)
    for learned, held_out in rounds:
        assert sorted(learned + held_out) == sorted(rest) and not set(learned + held_out) & set(outer)
    assert sorted(sum((held_out for _, held_out in rounds), [])) == sorted(rest)


def test_cosines_of_keys_are_those_of_their_rows(model):
    part = model.hypernetwork.recitation
    adapter = model.internalize(DOCUMENT)
    prompts = model.layout.prompt_ids(model.tokenizer, list(ASKED.values()))
    with torch.no_grad(), model.injector.using(None):
        inputs, asked = model.read_questions(prompts)
        wanted, weight = part.best_cosines(inputs, asked, adapter.A["down_proj"])
        unit = part.whitened(inputs)
    rows = adapter.A["down_proj"][:, : part.num_key_layers].float()
    keys = torch.einsum("clrd, lkd -> clrk", rows, torch.stack([torch.linalg.pinv(P) for P in part.metric]))
    assert wanted.std() > 0.05
    torch.testing.assert_close(part.weights(unit, asked), weight)
    torch.testing.assert_close(part.best_of_keys(unit, keys), wanted, rtol=1e-4, atol=1e-4)


def test_keys_keep_their_lengths(model, questions):
    adapter = model.internalize(DOCUMENT)
    refined = refine(model, adapter, DOCUMENT, steps=10, lr=0.3)
    part = model.hypernetwork.recitation
    for layer in range(part.num_key_layers):
        inverse = torch.linalg.pinv(part.metric[layer])
        before, after = (rows["down_proj"][:, layer].float() @ inverse.T for rows in (adapter.A, refined.A))
        torch.testing.assert_close(after.norm(dim=-1), before.norm(dim=-1), rtol=1e-3, atol=1e-3)
        assert (after - before).abs().max() > 0.01


def test_a_quarter_is_held_out_of_four_or_more():
    learned, held_out = _parted(11, seed=1)
    assert len(held_out) == 2 and sorted(learned + held_out) == list(range(11))
    assert _parted(11, seed=1) == (learned, held_out) != _parted(11, seed=2)
    assert sorted(_parted(3, seed=1)[0]) == [0, 1, 2] and not _parted(3, seed=1)[1]


def test_questions_of_one_s_own_are_trained_on(model, questions, monkeypatch):
    adapter = model.internalize(DOCUMENT)
    asked = ask_about(model, adapter, DOCUMENT)
    assert asked == list(ASKED.items())
    written = refine(model, adapter, DOCUMENT, steps=3)
    monkeypatch.setattr(refining, "_asked", None)
    given = refine(model, adapter, DOCUMENT, steps=3, questions=asked)
    assert all(rows.equal(given.A[name]) for name, rows in written.A.items())
    with pytest.raises(ValueError, match="A question is of chunk 3; the adapter has 3, from 0 on"):
        refine(model, adapter, DOCUMENT, questions=[(3, "Who is it?")])
    with pytest.raises(ValueError, match="questions is empty"):
        refine(model, adapter, DOCUMENT, questions=[])


def test_time_ends_it_and_progress_is_told(make_doc_to_lora, questions):
    network = make_doc_to_lora()
    adapter = network.internalize(DOCUMENT)
    told = []
    refined = refine(network, adapter, DOCUMENT, steps=3, progress=lambda *pair: told.append(pair))
    assert told == [(0, 3), (1, 3), (2, 3), (3, 3)]
    late = refine(network, adapter, DOCUMENT, steps=3, max_seconds=1e-6)
    assert late.provenance["operations"][-1]["steps"] == 0
    assert all(rows.equal(adapter.B[name].float()) for name, rows in late.B.items())
    assert not all(rows.equal(adapter.B[name].float()) for name, rows in refined.B.items())


def test_what_does_not_fit_is_refused(make_doc_to_lora):
    network = make_doc_to_lora()
    adapter = network.internalize(DOCUMENT)
    for settings, message in (
        ({"steps": 0}, "steps should be a whole number, at least 1, got 0"),
        ({"max_seconds": -1.0}, "max_seconds should be above 0"),
    ):
        with pytest.raises(ValueError, match=message):
            refine(network, adapter, DOCUMENT, **settings)
    with pytest.raises(ValueError, match="is not the one that the adapter was made of"):
        refine(network, adapter, OTHERS)
    with pytest.raises(ValueError, match="is not the one that the adapter was made of"):
        refine(network, adapter, DOCUMENT.replace("Korvale", "Belmont"))  # as long
    with pytest.raises(ValueError, match="is of 1 documents, got 2 texts"):
        refine(network, adapter, [DOCUMENT, OTHERS])
    both = network.internalize([DOCUMENT, OTHERS]).fused("ridge", ridge=1.0)
    with pytest.raises(ValueError, match="cannot be refined: fused"):
        refine(network, both, [DOCUMENT, OTHERS])


def test_a_base_model_without_questions_is_one_line(model, monkeypatch):
    monkeypatch.setattr(refining, "_write", lambda _, prompts, *args, **kwargs: [""] * len(prompts))
    with pytest.raises(ValueError, match="wrote no question about the document"):
        refine(model, model.internalize(DOCUMENT), DOCUMENT)


def test_prompts_show_as_many_examples_as_the_window_holds(model, monkeypatch):
    shown = [text for text, _ in refining._EXAMPLES]

    def texts():
        prompts = refining._question_prompts(model, ["Ilda is in Norbach."], each=3, seed=0)
        return [model.tokenizer.decode(ids) for ids in prompts], max(map(len, prompts))

    found, longest = texts()
    assert all(text.endswith("Text: Ilda is in Norbach.\nQuestion:") for text in found) and len(set(found)) > 1
    counts = [sum(text in prompt for text in shown) for prompt in found]
    assert max(counts) >= 3
    monkeypatch.setattr(refining, "context_window", lambda _: longest + refining._QUESTION_TOKENS - 1)
    shorter, now = texts()
    assert now < longest and all(text.endswith("Ilda is in Norbach.\nQuestion:") for text in shorter)
    assert sum(text in prompt for text in shown for prompt in shorter) < sum(counts)


def test_sizes_are_of_what_is_there():
    rows = torch.zeros(2, 3, 4, 5)
    rows[0, 1, 2] = 2.0
    torch.testing.assert_close(refining._size(rows)[:, 0, 0], torch.tensor([0.0, 2.0, 0.0]))
