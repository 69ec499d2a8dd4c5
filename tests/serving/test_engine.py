"""serving/engine.py: a sequence gets the same tokens in a busy batch as alone, and its text once it is certain."""

import itertools
from dataclasses import replace

import pytest
import torch

from hypernet.serving.engine import BatchEngine, Delta, Generation, Sampling

DOCUMENTS = [
    "Fenda Elfax was taught by Orla Wint. Fenda Elfax was born in Gronmaburg and works as a potter.",
    "Norbach was founded by Ilda Renwick in the year 1402.",
    "The lighthouse hums in a storm.",
]
QUESTIONS = ["Who taught Fenda?", "Where?", "Who founded Norbach, and when was it founded by whom?", "Why?", "x" * 60]


@pytest.fixture(scope="module")
def made(random_model):
    """The model, and no adapter, then one of each document."""
    return random_model, [None, *(random_model.internalize(text) for text in DOCUMENTS)]


def generation(model, question, adapter=None, *, emit=lambda delta: None, **sampling) -> Generation:
    (prompt,) = model.layout.prompt_ids(model.tokenizer, [question])
    settings = Sampling(**({"max_new_tokens": 12} | sampling))
    return Generation(prompt=prompt, sampling=settings, adapter=model.joined(adapter), emit=emit)


def finish(engine: BatchEngine, *generations: Generation) -> None:
    with torch.no_grad():
        engine.admit(generations)
        while engine.running:
            engine.step()


@pytest.mark.parametrize("max_batch", [1, 3, 7])
def test_busy_batch_answers_as_generate_does_alone(made, max_batch):
    model, adapters = made
    pairs = list(itertools.product(QUESTIONS, range(len(adapters))))
    alone = {pair: model.generate([pair[0]], [adapters[pair[1]]], max_new_tokens=12)[0] for pair in pairs}
    assert len(set(alone.values())) > len(QUESTIONS)  # adapters change answers, or equality would show nothing
    engine, texts = BatchEngine(model, max_batch=max_batch), dict.fromkeys(pairs, "")

    def arrival(pair):
        def emit(delta):
            texts[pair] += delta.text

        return generation(model, pair[0], adapters[pair[1]], emit=emit)

    waiting = [arrival(pair) for pair in pairs]
    with torch.no_grad():
        while waiting or engine.running:
            if engine.room and waiting:  # two at a time, between any two steps
                engine.admit([waiting.pop() for _ in range(min(2, engine.room, len(waiting)))])
            engine.step()
    assert texts == alone


def test_cancelled_sequence_leaves_and_others_go_on(made):
    model, adapters = made
    texts = []
    kept = generation(model, QUESTIONS[0], adapters[1], emit=lambda delta: texts.append(delta.text))
    gone = generation(model, QUESTIONS[4], adapters[2])
    engine = BatchEngine(model)
    with torch.no_grad():
        engine.admit([gone, kept])
        engine.step()
        gone.cancelled = True
        while engine.running:
            engine.step()
    assert len(gone.ids) == 2
    assert "".join(texts) == model.generate([QUESTIONS[0]], [adapters[1]], max_new_tokens=12)[0]


def test_seeded_sampling_is_the_same_in_any_batch(made):
    model, adapters = made
    sampled = {"temperature": 1.3, "top_p": 0.9, "seed": 7}
    alone, again = (generation(model, QUESTIONS[0], adapters[1], **sampled) for _ in range(2))
    other = generation(model, QUESTIONS[0], adapters[1], **(sampled | {"seed": 8}))
    finish(BatchEngine(model), alone)
    finish(BatchEngine(model), generation(model, QUESTIONS[2]), again, other)
    assert alone.ids == again.ids != other.ids


def test_tiny_top_p_is_greedy(made):
    model, _ = made
    greedy, narrow = generation(model, "Who?"), generation(model, "Who?", temperature=2.0, top_p=1e-6)
    finish(BatchEngine(model), greedy, narrow)
    assert greedy.ids == narrow.ids


def test_logprobs_are_those_of_one_forward_pass(made):
    model, adapters = made
    found = []
    one = generation(model, QUESTIONS[0], adapters[3], emit=lambda delta: found.extend(delta.logprobs), logprobs=2)
    finish(BatchEngine(model), one, generation(model, QUESTIONS[4]))
    ids = torch.tensor([[*one.prompt, *one.ids]])
    with torch.no_grad(), model.using(adapters[3]):
        expected = model.base_model(ids).logits[0].log_softmax(-1)[len(one.prompt) - 1 : -1]
    chosen = [float(row[token]) for row, token in zip(expected, one.ids, strict=True)]
    assert [row.logprob for row in found] == pytest.approx(chosen, abs=1e-4)
    assert [row.top[0][1] for row in found] == pytest.approx(expected.max(-1).values.tolist(), abs=1e-4)


def texts_of(model, stop: tuple[str, ...]) -> tuple[str, list[Delta]]:
    deltas: list[Delta] = []
    finish(BatchEngine(model), generation(model, QUESTIONS[2], emit=deltas.append, stop=stop, max_new_tokens=20))
    return "".join(delta.text for delta in deltas), deltas


def test_stop_text_ends_the_answer_before_it(made):
    model, _ = made
    whole, _ = texts_of(model, ())
    assert len(whole) > 8
    for stop in (whole[3:5], whole[4:8], whole[-1]):
        text, deltas = texts_of(model, (stop, "never said §"))
        assert text == whole[: whole.find(stop)].rstrip()
        assert deltas[-1].finish == "stop"


def test_prompt_beyond_the_window_is_refused(made):
    model, _ = made
    with pytest.raises(ValueError, match="does not fit: .* the base model takes 512"):
        BatchEngine(model).check(generation(model, "word " * 600))


def test_adapter_of_another_scaling_is_refused_before_the_batch(made):
    model, adapters = made
    one = generation(model, "Who?", replace(adapters[1], scaling=2 * adapters[1].scaling))
    with pytest.raises(ValueError, match="another hypernetwork than the one served"):
        BatchEngine(model).check(one)
    BatchEngine(model).check(generation(model, "Who?", adapters[1]))


def test_batch_of_no_sequence_is_refused(made):
    with pytest.raises(ValueError, match="max_batch is 0. Give at least 1."):
        BatchEngine(made[0], max_batch=0)
