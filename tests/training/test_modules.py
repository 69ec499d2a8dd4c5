"""The two trainings: losses against a reference of single prompts, what changes, resuming, checkpoints."""

import math
import re
from types import SimpleNamespace

import lightning as L
import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch.utils.data import Dataset

from hypernet.base.base_model import fingerprint, load_base_model
from hypernet.base.packed_rows import QUESTION_KINDS
from hypernet.data.batches import BaseModelBatches, DistillationBatches
from hypernet.data.curriculum import Curriculum
from hypernet.data.datamodule import BatchDataModule
from hypernet.data.encyclopedia import Encyclopedia, background_questions
from hypernet.data.records import Question, StoredAnswer
from hypernet.model.checkpoint import load_checkpoint
from hypernet.training.losses import energy_share, key_contrast, key_energies
from hypernet.training.modules import LitBaseModel, LitDocToLoRA
from hypernet.training.run_state import RunCheckpoint, SafetensorsCheckpointIO, find_checkpoint

OPTIMIZER = {
    "lr": 0.01,
    "weight_decay": 0.1,
    "betas": [0.9, 0.95],
    "warmup_steps": 2,
    "decay_ratio": 1,
    "min_lr_ratio": 0.1,
}
SMALL = {"vocab_size": 600, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
STAGES = [
    {
        **{"steps": 6, "batch_size": 2, "facts_per_entity": [2, 3], "num_cross_document": 1},
        **{"unanswerable": 0.5, "reordering": 0.5},
    }
]


class Losses(L.Callback):
    """Notes every step's loss, and stops the run before step `crash_at` like a crash would."""

    def __init__(self, crash_at: int | None = None):
        self.losses = []
        self.crash_at = crash_at

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if trainer.global_step == self.crash_at:
            raise RuntimeError("crash")

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.losses.append(outputs["loss"].item())


def make_trainer(folder, *callbacks, **settings):
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0}
    quiet |= {"accelerator": "cpu", "devices": 1, "default_root_dir": folder, "max_steps": 6}
    quiet |= {"val_check_interval": 2, "check_val_every_n_epoch": None, "gradient_clip_val": 1.0}
    callbacks = [*callbacks, RunCheckpoint(folder / "checkpoints", every_n_train_steps=1)]
    return L.Trainer(**{**quiet, **settings}, callbacks=callbacks, plugins=[SafetensorsCheckpointIO()])


@pytest.fixture
def make_module(make_doc_to_lora, tiny_base_model_folder):
    """make_module("doc_to_lora" or "base_model", **changes) → the Lightning module."""

    def make(task, **changes):
        changes = {"optimizer": OPTIMIZER, **changes}
        if task == "doc_to_lora":
            model = changes.pop("model", None) or make_doc_to_lora()
            return LitDocToLoRA(model=model, **{"nll_weight": 0.3, **changes})
        torch.manual_seed(0)
        base_model, tokenizer = load_base_model(tiny_base_model_folder)
        return LitBaseModel(base_model=base_model.requires_grad_(True), tokenizer=tokenizer, **changes)

    return make


@pytest.fixture
def make_data(tiny_tokenizer):
    def make(task):
        curricula = [Curriculum(Encyclopedia(split), STAGES) for split in ("train", "validation")]
        if task == "base_model":
            train, validation = (BaseModelBatches(curriculum, tiny_tokenizer) for curriculum in curricula)
        else:
            train, validation = (DistillationBatches(c, tiny_tokenizer, max_chunk_tokens=20) for c in curricula)
        return BatchDataModule(train=train, validation=Few(validation, 1))

    return make


class Few(Dataset):
    """The first items of a dataset."""

    def __init__(self, dataset, number):
        self.dataset, self.number = dataset, number

    def __len__(self):
        return self.number

    def __getitem__(self, index):
        return self.dataset[index]


def quietly(module):
    """Logging needs a trainer; steps called by themselves go without."""
    module.log = lambda *_, **__: None
    return module


# Losses


def log_probabilities(model, question, answer, *, adapter=None, document=None):
    """Reference: those of the answer's tokens, from one plain prompt."""
    prompt, answer = (
        model.tokenizer(text)["input_ids"]
        for text in (model.layout.prompt(question, document), model.layout.answer(answer))
    )
    with torch.no_grad(), model.injector.using(adapter):
        logits = model.base_model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
    return logits.double().log_softmax(-1), answer


def states_after_blocks(model, question, answer, *, adapter=None, document=None):
    """Reference: where the answer's tokens are predicted, [L, tokens, D]; the last one is what the final norm takes."""
    prompt, answer = (
        model.tokenizer(text)["input_ids"]
        for text in (model.layout.prompt(question, document), model.layout.answer(answer))
    )
    last = []
    hook = model.base_model.get_decoder().norm.register_forward_pre_hook(lambda _, args: last.append(args[0]))
    with torch.no_grad(), model.injector.using(adapter):
        states = model.base_model(torch.tensor([prompt + answer]), output_hidden_states=True).hidden_states
    hook.remove()
    return torch.stack([*states[1:-1], *last])[:, 0, len(prompt) - 1 : -1].double()


def test_the_loss_is_that_of_single_prompts_with_internalized_adapters(make_module, tiny_tokenizer):
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
    weights = {"kl_weight": 0.7, "nll_weight": 0.3, "locality_weight": 0.4, "hidden_weight": 0.6, "l1_weight": 0.2}
    module = quietly(make_module("doc_to_lora", **weights))
    model = module.model
    loss = module.training_step(batch, 0)
    model.injector.clear()

    means = {name.removesuffix("_weight"): [] for name in weights}
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
            values["kl" if about else "locality"] += kl
            if about:
                values["nll"] += [-float(student[i, token]) for i, token in enumerate(answer)]
                mine = states_after_blocks(model, question.text, question.answer, adapter=adapter)
                theirs = states_after_blocks(model, question.text, question.answer, document=document)
                values["hidden"] += ((mine - theirs).norm(dim=-1) / theirs.norm(dim=-1)).square().mean(0).tolist()
        for name, found in values.items():
            means[name].append(sum(found) / len(found))
    expected = sum(weights[f"{name}_weight"] * sum(found) / len(found) for name, found in means.items())
    assert loss.item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("every", [1, 2])
def test_stored_teacher_probabilities_stand_in_for_the_teacher_s(make_module, make_data, every):
    """All of the vocabulary, for every or every other answer token: the loss and gradients of the live teacher."""
    from hypernet.data.batches import StoredTopK

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
def test_the_teacher_is_not_asked_what_was_stored(make_module, make_doc_to_lora, tiny_tokenizer, num_background):
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


def test_the_base_model_s_loss_is_that_of_single_prompts(make_module, make_data):
    module, batch = quietly(make_module("base_model", document_weight=0.25)), make_data("base_model").train[1]
    loss = module.training_step(batch, 0)
    answers, weights, documents = [], [], []
    for row in range(len(batch.ids)):
        segments, ids = batch.segments[row], batch.ids[row]
        prefix = ids[segments == 0]
        with torch.no_grad():
            log_p = module.base_model(prefix[None]).logits[0].double().log_softmax(-1)
        documents += [-float(log_p[i, prefix[i + 1]]) for i in range(len(prefix) - 1)]
        for number in range(1, int(segments.max()) + 1):
            own = segments == number
            before = prefix if batch.sees_prefix[row, own].all() else prefix[:0]
            prompt = torch.cat([before, ids[own]])
            with torch.no_grad():
                log_p = module.base_model(prompt[None]).logits[0].double().log_softmax(-1)
            for i, place in enumerate(own.nonzero()[:, 0].tolist()):
                if batch.target_kind[row, place] >= 0:
                    answers.append(-float(log_p[len(before) + i, ids[place + 1]]))
                    weights.append(float(batch.target_weight[row, place]))
    assert set(weights) == {0.5, 1.0}  # reorderings count half
    answer_loss = sum(a * w for a, w in zip(answers, weights, strict=True)) / sum(weights)
    assert loss.item() == pytest.approx(answer_loss + 0.25 * sum(documents) / len(documents), rel=1e-4)


def test_an_untrained_hypernetwork_starts_without_locality_loss(make_doc_to_lora, make_module, make_data):
    module = make_module("doc_to_lora", model=make_doc_to_lora(trained=False), kl_weight=0.0, nll_weight=0.0)
    assert quietly(module).training_step(make_data("doc_to_lora").train[0], 0).item() == pytest.approx(0, abs=1e-6)


def test_a_document_in_the_prompt_is_to_be_answered_as_without_the_other_document_s_adapter(
    make_module, make_doc_to_lora, tiny_tokenizer
):
    """Reference: each question as a prompt of its own behind its document, with another's internalized adapter."""
    module = quietly(make_module("doc_to_lora", model=make_doc_to_lora(), kl_weight=0.0, nll_weight=0.0))
    model = module.model
    module.locality_weight = 0.5
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


# What a step does


def test_gradient_reaches_every_parameter_of_the_hypernetwork_after_two_steps_and_no_other(
    make_doc_to_lora, make_module, make_data
):
    """In the first step A and all before it have none, since B is still zero."""
    module = quietly(make_module("doc_to_lora", model=make_doc_to_lora(trained=False)))
    optimizer = torch.optim.AdamW(module.model.hypernetwork.parameters(), lr=0.01)
    data = make_data("doc_to_lora").train
    for step in range(3):
        optimizer.zero_grad()
        module.training_step(data[step], step).backward()
        module.on_after_backward()
        without = [n for n, p in module.model.hypernetwork.named_parameters() if p.grad is None or not p.grad.any()]
        if step == 0:
            assert without
        optimizer.step()
    assert without == []
    assert all(parameter.grad is None for parameter in module.model.base_model.parameters())


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


ONE_TERM = {"kl_weight": 0.0, "nll_weight": 0.0, "locality_weight": 0.0}


@pytest.mark.parametrize("contrast_chunks", [False, True])
def test_the_key_loss_compares_what_enters_the_modules_of_the_plain_model(make_module, make_data, contrast_chunks):
    """Reference: the inputs of every answer token in a prompt of its own, without any adapter."""
    module = quietly(make_module("doc_to_lora", **ONE_TERM, key_weight=0.5, contrast_chunks=contrast_chunks))
    model, data = module.model, make_data("doc_to_lora").train
    batch = data[1]
    loss = module.training_step(batch, 0)
    model.injector.clear()
    A, _ = model.adapt(batch.chunk_ids, batch.chunk_mask)
    inputs, owner = answers_in_prompts_of_their_own(model, batch)
    assert -1 in owner and len(owner.unique()) > 2
    chunk = chunks_with_the_answers(model, batch, data.curriculum.records(1)) if contrast_chunks else None
    assert chunk is None or (len(chunk.unique()) > 3 and -1 in chunk[owner >= 0])
    losses = []
    for layer, x in enumerate(inputs):
        keys = A["down_proj"][:, layer]
        contrast = sum(key_contrast(keys, x, owner, batch.chunk_counts, chunk=chunk)) / 2
        of_tokens, of_documents = key_energies(keys, x, owner, batch.chunk_counts, chunk=chunk)
        losses.append(mean_over_documents(contrast + of_tokens, owner) + of_documents.mean())
    assert loss.item() == pytest.approx(0.5 * torch.stack(losses).mean().item(), rel=1e-3)
    assert not any(module._forward_pre_hooks for module in model.base_model.modules())


@pytest.mark.parametrize("contrast_chunks", [False, True])
def test_the_share_loss_weighs_what_enters_with_the_adapters_in_force(make_module, make_data, contrast_chunks):
    """Reference: every question in a prompt of its own with its document's adapter."""
    module = quietly(make_module("doc_to_lora", **ONE_TERM, share_weight=0.5, contrast_chunks=contrast_chunks))
    model, data = module.model, make_data("doc_to_lora").train
    batch = data[1]
    loss = module.training_step(batch, 0)
    model.injector.clear()
    A, B = model.adapt(batch.chunk_ids, batch.chunk_mask)
    adapters = [model.internalize(record.document) for record in data.curriculum.records(1)]
    inputs, owner = answers_in_prompts_of_their_own(model, batch, adapters)
    chunk = chunks_with_the_answers(model, batch, data.curriculum.records(1)) if contrast_chunks else None
    values = [
        energy_share(A["down_proj"][:, layer], B["down_proj"][:, layer], x, owner, batch.chunk_counts, chunk=chunk)
        for layer, x in enumerate(inputs)
    ]
    expected = mean_over_documents(torch.stack(values).mean(0), owner)
    assert loss.item() == pytest.approx(0.5 * expected.item(), rel=1e-3)


def test_the_keys_come_first_without_teacher_and_student(tmp_path, make_module, make_data, make_doc_to_lora):
    """In the first two steps B stays at its start, zero, although A learns; in the third it moves."""
    module = make_module("doc_to_lora", model=make_doc_to_lora(trained=False), key_weight=0.5, key_steps=2)
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


def test_the_contrasts_fade_by_half_lives_after_the_keys(tmp_path, make_module, make_data):
    settings = {"nll_weight": 0.0, "key_weight": 0.5, "share_weight": 0.25, "key_steps": 2, "contrast_half_life": 3}
    seen = []

    class Seen(L.Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            seen.append({name: value.item() for name, value in trainer.callback_metrics.items()})

    data = make_data("doc_to_lora")
    make_trainer(tmp_path, Seen(), limit_val_batches=0).fit(make_module("doc_to_lora", **settings), data)
    assert len(seen) == 6
    for step, logged in enumerate(seen):
        loss = {name: logged.get(f"train/{name}", 0.0) for name in ("key", "share", "kl", "locality_kl")}
        left = 1.0 if step < 2 else 0.5 ** ((step - 2) / 3)
        expected = left * (0.5 * loss["key"] + 0.25 * loss["share"]) + loss["kl"] + 0.5 * loss["locality_kl"]
        assert logged["train/loss"] == pytest.approx(expected, rel=1e-5), step
        assert ("train/share" in logged) == (step >= 2) and loss["key"] > 0.1


def test_contrasts_without_a_half_life_stay(make_module):
    module = make_module("doc_to_lora", key_weight=0.5)
    assert module.contrast_half_life is None and module._contrast_left() == 1.0
    with pytest.raises(ValueError, match="Expected contrast_half_life to be a number of steps, or null .* got 0"):
        make_module("doc_to_lora", key_weight=0.5, contrast_half_life=0)


def test_key_steps_without_a_key_weight_are_refused(make_module):
    with pytest.raises(ValueError, match=r"key_steps=5 train the keys alone, but key_weight is 0"):
        make_module("doc_to_lora", key_steps=5)


def test_silence_weighs_every_answer_token_s_inputs_against_the_other_documents(make_module, make_data):
    """Reference: every question as a prompt of its own with its document's adapter, every delta as a matrix."""
    module = quietly(make_module("doc_to_lora", kl_weight=0.0, nll_weight=0.0, locality_weight=0.0, silence_weight=0.5))
    model, data = module.model, make_data("doc_to_lora").train
    batch = data[1]
    num_hooks = [len(part._forward_hooks) for part in model.base_model.modules()]
    loss = module.training_step(batch, 0)
    assert [len(part._forward_hooks) for part in model.base_model.modules()] == num_hooks
    model.injector.clear()
    A, B = model.adapt(batch.chunk_ids, batch.chunk_mask)
    of_chunk = [i for i, count in enumerate(batch.chunk_counts) for _ in range(count)]
    documents = [record.document for record in data.curriculum.records(1)]
    rows, per_row = batch.student, []
    for i in range(len(rows.ids)):
        values, adapter = [], model.internalize(documents[i])
        for segment in range(1, int(rows.segments[i].max()) + 1):
            inside = rows.segments[i] == segment
            kinds, ids = rows.target_kind[i][inside], rows.ids[i][inside]
            about = QUESTION_KINDS[int(kinds.max())] in ("document", "unanswerable")
            others = [c for c, document in enumerate(of_chunk) if not (about and document == i)]
            seen = []
            hooks = [
                model.base_model.get_submodule(path).register_forward_hook(
                    lambda _, x, y, seen=seen: seen.append((x[0][0], y[0]))
                )
                for path in model.hypernetwork.targets[0].paths
            ]
            with torch.no_grad(), model.injector.using(adapter):
                model.base_model(ids[None])
            for hook in hooks:
                hook.remove()
            for token in (kinds >= 0).nonzero()[:, 0].tolist():
                of_layer = []
                for layer, (x, y) in enumerate(seen):
                    deltas = [
                        model.hypernetwork.scaling * B["down_proj"][c, layer].T @ A["down_proj"][c, layer] @ x[token]
                        for c in others
                    ]
                    of_layer.append(torch.stack(deltas).square().sum(1).mean() / y[token].square().sum())
                values.append(torch.stack(of_layer).mean())
        per_row.append(torch.stack(values).mean())
    expected = torch.stack(per_row).mean()
    assert expected > 1e-6
    assert loss.item() == pytest.approx(0.5 * expected.item(), rel=1e-3)


def test_adapters_stay_until_after_backward_and_are_gone_then(make_module, make_data):
    module = quietly(make_module("doc_to_lora"))
    ids = torch.arange(5, 15)[None]
    plain = module.model.base_model(ids).logits
    loss = module.training_step(make_data("doc_to_lora").train[0], 0)
    assert module.model.injector._active is not None
    loss.backward()
    module.on_after_backward()
    assert torch.equal(module.model.base_model(ids).logits, plain)


@pytest.mark.parametrize(
    "weights",
    [{}, {"hidden_weight": 0.5, "l1_weight": 0.5, "key_weight": 0.5, "share_weight": 0.5, "silence_weight": 0.5}],
    ids=["", "all"],
)
def test_gradients_are_the_same_with_gradient_checkpointing(make_module, make_data, weights):
    """There the base model's layers run again during backward, and must find the adapters still in force."""
    gradients = []
    for checkpointing in (False, True):
        module = quietly(make_module("doc_to_lora", **weights))
        module.model.double()
        if checkpointing:
            module.model.base_model.gradient_checkpointing_enable({"use_reentrant": False})
            module.model.base_model.train()
        module.training_step(make_data("doc_to_lora").train[0], 0).backward()
        gradients.append([p.grad for p in module.model.hypernetwork.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(recomputed, plain, rtol=1.3e-6, atol=1e-5)  # losses are in single precision


def test_training_changes_the_hypernetwork_alone(tmp_path, make_module, make_data):
    module = make_module("doc_to_lora")
    base, before = fingerprint(module.model.base_model), fingerprint(module.model.hypernetwork)
    make_trainer(tmp_path, max_steps=2).fit(module, make_data("doc_to_lora"))
    assert fingerprint(module.model.base_model) == base == module.model.base_model_fingerprint
    assert fingerprint(module.model.hypernetwork) != before
    assert module.model.injector._active is None
    assert not module.model.base_model.training and not any(
        p.requires_grad for p in module.model.base_model.parameters()
    )


@pytest.mark.parametrize("decay_ratio", [1, 0.5])
@pytest.mark.parametrize("task", ["doc_to_lora", "base_model"])
def test_the_learning_rate_warms_up_stays_and_falls_along_a_cosine(tmp_path, make_module, make_data, task, decay_ratio):
    class Rates(L.Callback):
        def __init__(self):
            self.rates = []

        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            self.rates.append([group["lr"] for group in trainer.optimizers[0].param_groups])

    rates = Rates()
    module = make_module(task, optimizer={**OPTIMIZER, "decay_ratio": decay_ratio})
    trainer = make_trainer(tmp_path, rates, limit_val_batches=0)
    trainer.fit(module, make_data(task))
    # Two steps of warm-up, then half a cosine down to a tenth over the four others, or over the last half of the six.
    falling = [
        0.001 + 0.009 * (1 + math.cos(math.pi * i / n)) / 2 for n in [4 if decay_ratio == 1 else 3] for i in range(n)
    ]
    expected = [0.005, 0.01, *[0.01] * (4 - len(falling)), *falling]
    assert rates.rates == [pytest.approx([rate] * 2) for rate in expected]
    for group in trainer.optimizers[0].param_groups:
        decays = {p.ndim >= 2 for p in group["params"]}
        assert decays == {group["weight_decay"] == 0.1}
    trained = sum(p.numel() for group in trainer.optimizers[0].param_groups for p in group["params"])
    assert trained == sum(
        p.numel() for p in (module.model.hypernetwork if task == "doc_to_lora" else module).parameters()
    )


# Resuming


@pytest.mark.parametrize("task", ["doc_to_lora", "base_model"])
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(tmp_path, make_module, make_data, task):
    whole = Losses()
    straight = make_module(task)
    make_trainer(tmp_path / "whole", whole).fit(straight, make_data(task))
    assert len(set(whole.losses)) == 6

    first = Losses(crash_at=3)
    with pytest.raises(RuntimeError, match="crash"):
        make_trainer(tmp_path / "parts", first).fit(make_module(task), make_data(task))
    assert first.losses == whole.losses[:3]
    # Another start, so that everything must come from the checkpoint.
    resumed = make_module(task)
    with torch.no_grad():
        for parameter in (resumed.model.hypernetwork if task == "doc_to_lora" else resumed).parameters():
            parameter.mul_(1.5)
    torch.manual_seed(99)
    second = Losses()
    trainer = make_trainer(tmp_path / "parts", second)
    trainer.fit(resumed, make_data(task), ckpt_path=find_checkpoint("last", tmp_path / "parts" / "checkpoints"))
    assert second.losses == whole.losses[3:]
    assert trainer.global_step == 6
    assert fingerprint(resumed) == fingerprint(straight)


def test_a_checkpoint_holds_the_hypernetwork_and_no_base_model(tmp_path, make_module, make_data):
    module = make_module("doc_to_lora")
    make_trainer(tmp_path, max_steps=1).fit(module, make_data("doc_to_lora"))
    path = find_checkpoint("last", tmp_path / "checkpoints")
    checkpoint = SafetensorsCheckpointIO().load_checkpoint(path)
    expected = {f"model.hypernetwork.{name}": t for name, t in module.model.hypernetwork.state_dict().items()}
    assert set(checkpoint["state_dict"]) == set(expected)
    assert all(torch.equal(checkpoint["state_dict"][name], tensor) for name, tensor in expected.items())
    with safe_open(path, framework="pt") as file:
        assert not [name for name in file.keys() if "base_model" in name]  # noqa: SIM118


@pytest.fixture
def resume(tmp_path, make_module, make_data):
    """resume(change, **module): trains a step, changes the saved checkpoint, and resumes from it."""

    def run(change, **changes):
        make_trainer(tmp_path, max_steps=1).fit(make_module("doc_to_lora"), make_data("doc_to_lora"))
        io = SafetensorsCheckpointIO()
        checkpoint = io.load_checkpoint(find_checkpoint("last", tmp_path / "checkpoints"))
        change(checkpoint)
        io.save_checkpoint(checkpoint, tmp_path / "changed.safetensors")
        module = make_module("doc_to_lora", **changes)
        make_trainer(tmp_path, max_steps=2).fit(
            module, make_data("doc_to_lora"), ckpt_path=tmp_path / "changed.safetensors"
        )

    return run


def test_a_renamed_weight_is_refused_with_its_name(resume):
    def rename(checkpoint):
        state = checkpoint["state_dict"]
        state["model.hypernetwork.lora_head.bias_C"] = state.pop("model.hypernetwork.lora_head.head.weight")

    with pytest.raises(ValueError, match="of another hypernetwork: model.hypernetwork.lora_head.bias_C") as error:
        resume(rename)
    assert "\n" not in str(error.value) and "Resume with the configuration it was made with." in str(error.value)


def test_a_missing_weight_is_refused(resume):
    with pytest.raises(ValueError, match="of another hypernetwork: model.hypernetwork.lora_head.head.weight"):
        resume(lambda checkpoint: checkpoint["state_dict"].pop("model.hypernetwork.lora_head.head.weight"))


def test_another_base_model_is_refused(resume, tiny_base_model, make_doc_to_lora):
    with torch.no_grad():
        tiny_base_model.lm_head.weight[0, 0] += 1
    with pytest.raises(ValueError, match="made with another base model. Resume with the one it was made with."):
        resume(lambda checkpoint: None, model=make_doc_to_lora(base_model=tiny_base_model))


def test_a_base_model_of_another_size_is_refused_in_one_line(tmp_path, make_module, make_data, tiny_base_model):
    make_trainer(tmp_path, max_steps=1).fit(make_module("base_model"), make_data("base_model"))
    module = make_module("base_model")
    module.base_model = type(tiny_base_model)(type(tiny_base_model.config)(**SMALL))
    with pytest.raises(ValueError, match="of another base model: .* more differ.") as error:
        path = find_checkpoint("last", tmp_path / "checkpoints")
        make_trainer(tmp_path, max_steps=2).fit(module, make_data("base_model"), ckpt_path=path)
    assert "\n" not in str(error.value)


def test_a_hypernetwork_of_another_size_is_refused_in_one_line(resume, make_doc_to_lora):
    aggregator = {"name": "mean_pool", "latent_dim": 16}
    with pytest.raises(ValueError, match="of another hypernetwork"):
        resume(lambda checkpoint: None, model=make_doc_to_lora(hypernetwork={"rank": 2, "aggregator": aggregator}))
    other = make_doc_to_lora().hypernetwork.config
    sizes = {"rank": 3, "aggregator": other["aggregator"]}
    with pytest.raises(ValueError, match="of another hypernetwork") as error:
        resume(lambda checkpoint: None, model=make_doc_to_lora(hypernetwork=sizes))
    assert "\n" not in str(error.value)


# The end of a run


def test_the_trained_checkpoint_is_written_when_the_run_is_complete_and_not_before(tmp_path, make_module, make_data):
    def output(name):
        return tmp_path / name / "output"

    with pytest.raises(RuntimeError, match="crash"):
        module = make_module("doc_to_lora", output_dir=str(output("crashed")))
        make_trainer(tmp_path / "crashed", Losses(crash_at=1)).fit(module, make_data("doc_to_lora"))
    assert not output("crashed").exists()
    module = make_module("doc_to_lora", output_dir=str(output("done")))
    make_trainer(tmp_path / "done", max_steps=1).fit(module, make_data("doc_to_lora"))
    assert load_checkpoint(output("done")).fingerprint == fingerprint(module.model.hypernetwork)


def test_the_trained_checkpoint_holds_its_base_model_if_asked(tmp_path, make_module, make_data):
    module = make_module("doc_to_lora", output_dir=str(tmp_path / "output"), include_base_model=True)
    make_trainer(tmp_path, max_steps=1).fit(module, make_data("doc_to_lora"))
    assert load_checkpoint(tmp_path / "output").base_model == str(tmp_path / "output/base_model")
    assert fingerprint(load_base_model(tmp_path / "output/base_model")[0]) == fingerprint(module.model.base_model)


def test_the_trained_base_model_can_be_loaded(tmp_path, make_module, make_data):
    module = make_module("base_model", output_dir=str(tmp_path / "base_model"))
    make_trainer(tmp_path, max_steps=1).fit(module, make_data("base_model"))
    base_model, tokenizer = load_base_model(tmp_path / "base_model")
    assert fingerprint(base_model) == fingerprint(module.base_model)
    assert tokenizer.get_vocab() == module.tokenizer.get_vocab() and tokenizer.chat_template


# Validation


@pytest.mark.parametrize(
    ("scores", "expected"), [((0.5, 0.1, 0.9), 0.5), ((0.95, 0.1, 0.9), 1.0625), ((0.2, 0.3, 0.3), None)]
)
def test_the_share_of_the_gap_that_is_closed(make_module, monkeypatch, scores, expected):
    module, logged = make_module("doc_to_lora"), {}
    metrics = {
        f"val/document_{m}": torch.tensor(s)
        for m, s in zip(("adapter", "no_context", "in_prompt"), scores, strict=True)
    }
    monkeypatch.setattr(type(module), "trainer", SimpleNamespace(callback_metrics=metrics))
    module.log = lambda name, value, **_: logged.update({name: float(value)})
    module.on_validation_epoch_end()
    assert logged == ({} if expected is None else {"val/gap_closed": pytest.approx(expected)})


def test_validation_scores_every_method_and_kind(tmp_path, make_doc_to_lora, make_module, make_data):
    """An untrained adapter scores as no context does."""
    module, data = make_module("doc_to_lora", model=make_doc_to_lora(trained=False)), make_data("doc_to_lora")
    trainer = make_trainer(tmp_path)
    (scores,) = trainer.validate(module, data, verbose=False)
    for kind in ("document", "unanswerable", "background", "cross_document"):
        of_kind = {name: value for name, value in scores.items() if name.startswith(f"val/{kind}_")}
        if of_kind:
            assert set(of_kind) == {f"val/{kind}_{m}" for m in ("no_context", "in_prompt", "adapter", "wrong_adapter")}
            assert of_kind[f"val/{kind}_adapter"] == of_kind[f"val/{kind}_no_context"]
            assert all(0 <= value <= 1 for value in of_kind.values())
    assert "val/document_adapter" in scores and "val/background_adapter" in scores
    assert module.model.injector._active is None
