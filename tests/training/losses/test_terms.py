"""Terms of the objective against references of single prompts; their weights over a run; mistakes in an objective."""

import re

import lightning as L
import numpy as np
import pytest
import torch

from hypernet.base.packed_rows import QUESTION_KINDS
from hypernet.data.batches import DistillationBatches, StoredTopK
from hypernet.data.curriculum import Curriculum
from hypernet.data.encyclopedia import Encyclopedia, background_questions
from hypernet.data.records import Question, StoredAnswer
from hypernet.training.losses import (
    AnswerNLL,
    Attribution,
    ContextDistillation,
    KeyContrast,
    Locality,
    LossTerm,
    WeightL1,
    attribution,
    key_attribution,
    key_contrast,
    trained_terms,
)
from tests.small_trainings import STAGES, make_trainer, objective, quietly

# Distillation


def log_probabilities(model, question, answer, *, adapter=None, document=None):
    """Reference: those of the answer's tokens, from one plain prompt."""
    prompt, answer = (
        model.tokenizer(text)["input_ids"]
        for text in (model.layout.prompt(question, document), model.layout.answer(answer))
    )
    with torch.no_grad(), model.injector.using(adapter):
        logits = model.base_model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
    return logits.double().log_softmax(-1), answer


def test_loss_is_that_of_single_prompts(make_module, tiny_tokenizer):
    documents = [
        "Norbach was founded by Ilda Renwick. It makes tin boxes. It has 312 workers.",
        "Elmouth lies on the Vel.",
    ]
    asked = [
        [
            Question("Who founded Norbach?", "Ilda Renwick"),
            Question("What is the capital of France?", "Paris", "background"),
            Question("Where is Norbach?", "unknown", "unanswerable"),
            Question("Where is Elmouth?", "unknown", "cross_document"),
        ],
        [Question("Which river is Elmouth on?", "Vel"), Question("What is the symbol of gold?", "Au", "background")],
    ]
    curriculum = Curriculum(Encyclopedia("train"), STAGES)
    batch = DistillationBatches(curriculum, tiny_tokenizer, max_chunk_tokens=20).batch(documents, asked)
    assert max(batch.chunk_counts) > 1
    weights = {"kl": 0.7, "locality_kl": 0.4, "nll": 0.3, "l1": 0.2}
    terms = {"kl": ContextDistillation, "locality_kl": Locality, "nll": AnswerNLL, "l1": WeightL1}
    terms = {name: term(weight=weights[name]) for name, term in terms.items()}
    module = quietly(make_module("doc_to_lora", objective=terms))
    model = module.model
    loss = module.training_step(batch, 0)
    model.injector.clear()

    means = {name: [] for name in weights}
    for document, questions in zip(documents, asked, strict=True):
        adapter = model.internalize(document)
        values = {name: [] for name in means}
        entries = torch.cat([matrices.flatten() for matrices in (*adapter.A.values(), *adapter.B.values())])
        values["l1"].append(float(entries.abs().mean()))
        for question in questions:
            about = question.kind in ("document", "unanswerable")
            student, answer = log_probabilities(model, question.text, question.answer, adapter=adapter)
            teacher, _ = log_probabilities(model, question.text, question.answer, document=document if about else None)
            kl = (teacher.exp() * (teacher - student)).sum(-1).tolist()
            values["kl" if about else "locality_kl"] += kl
            if about:
                values["nll"] += [-float(student[i, token]) for i, token in enumerate(answer)]
        for name, found in values.items():
            means[name].append(sum(found) / len(found))
    expected = sum(weights[name] * sum(found) / len(found) for name, found in means.items())
    assert loss.item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("every", [1, 2])
def test_stored_probabilities_stand_in_for_the_teacher(make_module, make_data, every):
    """All of the vocabulary, for every or every other answer token: the loss and gradients of the live teacher."""
    batch = make_data("doc_to_lora").train[2]
    is_answer = batch.student.target_kind >= 0
    results = []
    for stored in (False, True):
        module = quietly(make_module("doc_to_lora"))
        if stored:
            with torch.no_grad():
                teacher = module.model(batch.teacher).float().log_softmax(-1)
            where, log_probs = is_answer.clone(), torch.zeros(*is_answer.shape, teacher.shape[-1])
            log_probs[is_answer] = teacher
            where[is_answer] = torch.arange(int(is_answer.sum())) % every == 0
            indices = torch.arange(teacher.shape[-1]).expand_as(log_probs).int()
            batch = batch._replace(stored=StoredTopK(where, indices, log_probs))
        loss = module.training_step(batch, 0)
        loss.backward()
        module.on_after_backward()
        results.append((loss.detach(), [p.grad for p in module.model.hypernetwork.parameters()]))
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("num_background", [0, 2])
def test_teacher_skips_stored_answers(make_module, make_doc_to_lora, tiny_tokenizer, num_background):
    """The same loss and gradients from fewer of the teacher's tokens; none at all where everything was stored."""
    model = make_doc_to_lora()
    size = len(tiny_tokenizer)
    rng = np.random.default_rng(0)

    def stored(question):
        ids = tiny_tokenizer(question.answer, add_special_tokens=False)["input_ids"]
        log_probs = np.log(rng.dirichlet(np.ones(size), len(ids)))
        return question._replace(stored=StoredAnswer(tuple(ids), np.tile(np.arange(size), (len(ids), 1)), log_probs))

    curriculum = Curriculum(Encyclopedia("train"), [{"steps": 1, "batch_size": 3, "facts_per_entity": [2, 3]}])
    background = background_questions()[:num_background]
    records = curriculum.records(0)
    # One document keeps a question that needs the teacher, if any does.
    asked = [[*map(stored, record.questions), *background] for record in records]
    if num_background:
        asked[1][0] = asked[1][0]._replace(stored=None)
    results, widths = [], []
    for skip in (False, True):
        batches = DistillationBatches(curriculum, tiny_tokenizer, max_chunk_tokens=40, skip_stored=skip)
        batch = batches.batch([record.document for record in records], asked)
        module = quietly(make_module("doc_to_lora", model=model))
        model.zero_grad()
        loss = module.training_step(batch, 0)
        loss.backward()
        module.on_after_backward()
        results.append((loss.detach(), [p.grad.clone() for p in model.hypernetwork.parameters()]))
        widths.append((batch.teacher.segments >= 0).sum(1).tolist())
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-7)
    assert all(b < a / 2 for a, b in zip(widths[0][::2], widths[1][::2], strict=True))  # without their documents
    assert widths[1] == [0, 0, 0] if not num_background else widths[1][1] > widths[1][0] > 0


def test_untrained_hypernetwork_has_zero_locality_loss(make_doc_to_lora, make_module, make_data):
    model = make_doc_to_lora(trained=False)
    module = make_module("doc_to_lora", model=model, objective={"locality_kl": Locality(weight=0.5)})
    assert quietly(module).training_step(make_data("doc_to_lora").train[0], 0).item() == pytest.approx(0, abs=1e-6)


def test_locality_of_rows_with_a_document_in_the_prompt(make_module, tiny_tokenizer):
    """Reference: each question as a prompt of its own behind its document, with another's internalized adapter."""
    module = quietly(make_module("doc_to_lora", objective={"locality_kl": Locality(weight=0.5)}))
    model = module.model
    stage = {"steps": 1, "batch_size": 3, "facts_per_entity": [2, 3], "num_background": 0, "num_in_prompt": 2}
    curriculum = Curriculum(Encyclopedia("train"), [stage])
    batch = DistillationBatches(curriculum, tiny_tokenizer, max_chunk_tokens=model.max_chunk_tokens)[0]
    loss = module.training_step(batch, 0)
    model.injector.clear()
    documents = [record.document for record in curriculum.records(0)]
    rows, kl = batch.student, []
    assert len(rows.ids) == 5
    for row in (3, 4):
        (other,) = batch.members[row]
        adapter = model.internalize(documents[other])
        prefix = rows.ids[row][rows.segments[row] == 0]
        of_row = []
        for number in range(1, int(rows.segments[row].max()) + 1):
            own = rows.segments[row] == number
            prompt = torch.cat([prefix, rows.ids[row][own]])
            where = torch.cat([torch.zeros(len(prefix), dtype=torch.bool), rows.target_kind[row][own] >= 0])
            with torch.no_grad():
                expected = model.base_model(prompt[None]).logits[0, where].double().log_softmax(-1)
                with model.injector.using(adapter):
                    found = model.base_model(prompt[None]).logits[0, where].double().log_softmax(-1)
            of_row += (expected.exp() * (expected - found)).sum(-1).tolist()
        kl.append(sum(of_row) / len(of_row))
    assert min(kl) > 1e-4  # the test's adapters do something
    assert loss.item() == pytest.approx(0.5 * sum(kl) / 2, rel=1e-3)


# Contrasts


def answers_in_prompts_of_their_own(model, batch, adapters=None):
    """Reference: what enters every adapted module at every answer token, one prompt at a time.

    Returns:
        inputs by layer, [tokens, d] each; the document that each token is about, or -1.
    """
    rows, owner = batch.student, []
    inputs = [[] for _ in model.hypernetwork.targets[0].paths]
    for i in range(len(rows.ids)):
        for segment in range(1, int(rows.segments[i].max()) + 1):
            inside = rows.segments[i] == segment
            kinds, ids = rows.target_kind[i][inside], rows.ids[i][inside]
            prefix = rows.ids[i][rows.segments[i] == 0]
            seen, hooks = [], []
            for path in model.hypernetwork.targets[0].paths:
                module = model.base_model.get_submodule(path)
                hooks.append(module.register_forward_pre_hook(lambda _, x, seen=seen: seen.append(x[0][0])))
            with torch.no_grad(), model.injector.using(adapters and adapters[i]):
                model.base_model(torch.cat([prefix, ids])[None])
            for hook in hooks:
                hook.remove()
            for token in (kinds >= 0).nonzero()[:, 0].tolist():
                owner.append(i if QUESTION_KINDS[kinds[token]] in ("document", "unanswerable") else -1)
                for of_layer, x in zip(inputs, seen, strict=True):
                    of_layer.append(x[len(prefix) + token])
    return [torch.stack(of_layer) for of_layer in inputs], torch.tensor(owner)


def chunks_with_the_answers(model, batch, records):
    """Reference: of every answer token, in that order, the only chunk of its document whose text holds the answer."""
    chunks = zip(batch.chunk_ids, batch.chunk_mask, strict=True)
    texts = [model.tokenizer.decode(ids[mask][1:-2]) for ids, mask in chunks]
    result, first = [], 0
    for row, record in enumerate(records):
        of_document = range(first, first + batch.chunk_counts[row])
        first += batch.chunk_counts[row]
        for segment in range(1, int(batch.student.segments[row].max()) + 1):
            question = record.questions[segment - 1] if segment <= len(record.questions) else None
            found = []
            if question and question.kind == "document":
                found = [c for c in of_document if re.search(rf"\b{question.answer}\b", texts[c], re.IGNORECASE)]
            inside = (batch.student.segments[row] == segment) & (batch.student.target_kind[row] >= 0)
            result += [found[0] if len(found) == 1 else -1] * int(inside.sum())
    return torch.tensor(result)


def mean_over_documents(values, owner):
    owned = owner[owner >= 0]
    return torch.stack([values[owned == i].mean() for i in owned.unique()]).mean()


@pytest.mark.parametrize("by_chunk", [False, True])
def test_key_contrast_compares_inputs_of_the_plain_model(make_module, make_data, by_chunk):
    """Reference: the inputs of every answer token in a prompt of its own, without any adapter."""
    module = quietly(make_module("doc_to_lora", objective={"key": KeyContrast(weight=0.5, by_chunk=by_chunk)}))
    model, data = module.model, make_data("doc_to_lora").train
    batch = data[1]
    loss = module.training_step(batch, 0)
    model.injector.clear()
    A, _ = model.adapt(batch.chunk_ids, batch.chunk_mask)
    inputs, owner = answers_in_prompts_of_their_own(model, batch)
    assert -1 in owner and len(owner.unique()) > 2
    chunk = chunks_with_the_answers(model, batch, data.curriculum.records(1)) if by_chunk else None
    assert chunk is None or (len(chunk.unique()) > 3 and -1 in chunk[owner >= 0])
    losses = []
    for layer, x in enumerate(inputs):
        keys = A["down_proj"][:, layer]
        contrast = sum(key_contrast(keys, x, owner, batch.chunk_counts, chunk=chunk)) / 2
        of_tokens, of_documents = key_attribution(keys, x, owner, batch.chunk_counts, chunk=chunk)
        losses.append(mean_over_documents(contrast + of_tokens, owner) + of_documents.mean())
    assert loss.item() == pytest.approx(0.5 * torch.stack(losses).mean().item(), rel=1e-3)
    assert not any(module._forward_pre_hooks for module in model.base_model.modules())


@pytest.mark.parametrize("by_chunk", [False, True])
def test_attribution_weighs_inputs_with_the_adapters_active(make_module, make_data, by_chunk):
    """Reference: every question in a prompt of its own with its document's adapter."""
    module = quietly(make_module("doc_to_lora", objective={"attribution": Attribution(weight=0.5, by_chunk=by_chunk)}))
    model, data = module.model, make_data("doc_to_lora").train
    batch = data[1]
    loss = module.training_step(batch, 0)
    model.injector.clear()
    A, B = model.adapt(batch.chunk_ids, batch.chunk_mask)
    adapters = [model.internalize(record.document) for record in data.curriculum.records(1)]
    inputs, owner = answers_in_prompts_of_their_own(model, batch, adapters)
    chunk = chunks_with_the_answers(model, batch, data.curriculum.records(1)) if by_chunk else None
    values = [
        attribution(A["down_proj"][:, layer], B["down_proj"][:, layer], x, owner, batch.chunk_counts, chunk=chunk)
        for layer, x in enumerate(inputs)
    ]
    expected = mean_over_documents(torch.stack(values).mean(0), owner)
    assert loss.item() == pytest.approx(0.5 * expected.item(), rel=1e-3)


# Weights over a run


def test_terms_alone_come_first(tmp_path, make_module, make_data, make_doc_to_lora):
    """In the first two steps B stays at its start, zero, although A learns; in the third it moves."""
    terms = objective(nll=0.3, key=KeyContrast(weight=0.5, steps_alone=2))
    module = make_module("doc_to_lora", model=make_doc_to_lora(trained=False), objective=terms)
    batch = make_data("doc_to_lora").train[0]

    class Generated(L.Callback):
        def __init__(self):
            self.weights = []

        def on_train_batch_end(self, trainer, module, outputs, batch_, batch_idx):
            with torch.no_grad():
                A, B = module.model.adapt(batch.chunk_ids, batch.chunk_mask)
            self.weights.append((A["down_proj"].clone(), B["down_proj"].clone()))

    generated = Generated()
    make_trainer(tmp_path, generated, max_steps=3, limit_val_batches=0).fit(module, make_data("doc_to_lora"))
    (A1, B1), (A2, B2), (_, B3) = generated.weights
    assert not torch.equal(A1, A2)
    assert B1.abs().max() == 0 and B2.abs().max() == 0 and B3.abs().max() > 0


def test_weights_fade_by_half_lives_after_the_terms_alone(tmp_path, make_module, make_data):
    key = KeyContrast(weight=0.5, steps_alone=2, half_life=3)
    terms = objective(key=key, attribution=Attribution(weight=0.25, half_life=3))
    seen = []

    class Seen(L.Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            seen.append({name: value.item() for name, value in trainer.callback_metrics.items()})

    data = make_data("doc_to_lora")
    make_trainer(tmp_path, Seen(), limit_val_batches=0).fit(make_module("doc_to_lora", objective=terms), data)
    assert len(seen) == 6
    for step, logged in enumerate(seen):
        loss = {name: logged.get(f"train/{name}", 0.0) for name in ("key", "attribution", "kl", "locality_kl")}
        left = 1.0 if step < 2 else 0.5 ** ((step - 2) / 3)
        expected = left * (0.5 * loss["key"] + 0.25 * loss["attribution"]) + loss["kl"] + 0.5 * loss["locality_kl"]
        assert logged["train/loss"] == pytest.approx(expected, rel=1e-5), step
        assert ("train/attribution" in logged) == (step >= 2) and loss["key"] > 0.1


def test_weight_without_a_half_life_stays():
    assert KeyContrast(weight=0.5).weight_at(10_000) == 0.5


# Terms of one's own


class Confidence(LossTerm):
    """What a user might add."""

    needs = frozenset({"student"})

    def __call__(self, step):
        return step.mean_over_documents(step.student.logsumexp(-1), step.row, count="rows")


def test_new_term_is_trained_and_logged_by_its_name(make_module, make_data):
    module, logged = make_module("doc_to_lora", objective=objective(confidence=Confidence(weight=0.1))), {}
    module.log = lambda name, value, **_: logged.update({name: float(value)})
    module.training_step(make_data("doc_to_lora").train[0], 0).backward()
    expected = logged["train/kl"] + 0.5 * logged["train/locality_kl"] + 0.1 * logged["train/confidence"]
    assert logged["train/loss"] == pytest.approx(expected) and logged["train/confidence"] > 1


# Mistakes


@pytest.mark.parametrize(
    ("settings", "hint"),
    [
        ({"weight": -1.0}, "Expected weight to be a number, at least 0, got -1.0"),
        ({"weight": "0.5"}, "Expected weight to be a number, at least 0, got '0.5'"),
        ({"weight": 0.5, "half_life": 0}, "Expected half_life to be a number of steps, or null .* got 0"),
        ({"weight": 0.0, "steps_alone": 5}, "steps_alone=5 trains a term alone whose weight is 0"),
    ],
    ids=["negative", "text", "half-life", "alone"],
)
def test_impossible_settings_of_a_term_are_refused(settings, hint):
    with pytest.raises(ValueError, match=hint):
        KeyContrast(**settings)


@pytest.mark.parametrize(
    ("terms", "hint"),
    [
        ({"kl_weight": 1.0}, "no kl_weight any more; it is called kl.weight now"),
        ({"share_weight": 1.0}, "no share_weight any more; it is called attribution.weight now"),
        ({"contrast_half_life": 9}, "it is called key.half_life, and attribution.half_life now"),
        ({"silence_weight": 0.1}, "no silence_weight any more: no experiment used it. Leave it out"),
        ({"kl": {"weight": 1.0}}, "objective.kl should be a term, with _target_ and weight"),
        ({"kl": Locality(weight=0.0)}, "No term of the objective has a weight: set that of one of kl"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_impossible_objectives_are_refused(terms, hint):
    with pytest.raises(ValueError, match=hint):
        trained_terms(terms)


def test_terms_without_weight_are_left_out():
    assert list(trained_terms(objective(kl=0.0, nll=1.0))) == ["locality_kl", "nll"]
