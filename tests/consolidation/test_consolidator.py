"""The consolidator on a random tiny model: it learns what its teacher says, resumes to the bit, and leaves no trace."""

import pytest
import torch

from hypernet.consolidation.consolidator import Consolidator, Enough, Lesson, _forward, _Frozen, _rows, _share_of_lr
from hypernet.consolidation.moves import ChosenRows, Everything, LowRank, UpperBlocks
from hypernet.consolidation.objectives import Deep, OnPolicy, Supervised, TeacherKL, kl
from hypernet.consolidation.questions import Templates
from hypernet.consolidation.rehearsal import AboutSubject, NoRehearsal, OtherSubjects, Replay, SelfSynthesised
from hypernet.consolidation.weights import MovedWeights, installed
from hypernet.memory.memory import Memory

FACTS = (("Fenda", "teacher", "Orla Wint taught Fenda."), ("Norbach", "river", "Norbach lies on the Palno."))
QUIET = {"rehearsal": NoRehearsal(), "batch_size": 4, "steps": 6}


@pytest.fixture
def model(make_doc_to_lora):
    return make_doc_to_lora(bias_block=False)


@pytest.fixture
def memories(tmp_path):
    memory = Memory.open(tmp_path / "memory")
    for subject, relation, text in FACTS:
        memory.add(text, user_id="alice", subject=subject, relation=relation)
    yield memory.list(user_id="alice")
    memory.close()


def state(model):
    return {name: tensor.clone() for name, tensor in model.base_model.state_dict().items()}


@pytest.mark.parametrize("objective", [Supervised(), TeacherKL(), OnPolicy(), Deep()], ids=lambda o: type(o).__name__)
def test_training_lowers_the_loss_and_leaves_the_base_model(model, memories, objective):
    before = state(model)
    moves, lr = (Everything(), 1e-2) if isinstance(objective, OnPolicy) else (LowRank(rank=3), 5e-2)
    settings = QUIET | {"steps": 4 if isinstance(objective, OnPolicy) else 20}
    trained = Consolidator(objective=objective, moves=moves, lr=lr, **settings).train(model, memories)
    if not isinstance(objective, OnPolicy):  # whose answers change from step to step
        assert sum(trained.losses[-3:]) < 0.9 * sum(trained.losses[:3])
    assert all(torch.equal(before[name], tensor) for name, tensor in model.base_model.state_dict().items())
    assert trained.flops > 0 and all(torch.isfinite(tensor).all() for tensor in trained.weights.tensors.values())


@pytest.mark.parametrize(
    "moves", [LowRank(rank=3), Everything(), UpperBlocks(num_frozen=1), ChosenRows(num_rows=5)], ids=lambda m: type(m)
)
def test_result_comes_back_from_disk_to_the_bit(model, memories, tmp_path, moves):
    trained = Consolidator(moves=moves, **QUIET).train(model, memories)
    folder = tmp_path / "version"
    folder.mkdir()
    trained.weights.save(folder, model)
    again = MovedWeights.load(folder, model)
    own = dict(model.base_model.named_parameters())
    changed = {name: t for name, t in trained.weights.tensors.items() if not torch.equal(t, own[name])}
    assert set(again.tensors) >= set(changed) and changed
    assert all(torch.equal(again.tensors[name], tensor) for name, tensor in changed.items())
    if isinstance(moves, UpperBlocks):
        assert not [name for name in changed if ".layers.0." in name or "embed" in name]
    if isinstance(moves, ChosenRows):
        for name, tensor in changed.items():
            assert ((tensor != own[name]).any(0).sum() <= 5) and name.endswith("down_proj.weight")


def test_adapter_is_what_peft_makes_of_it(model, memories, tmp_path):
    from peft import PeftModel

    from hypernet.base.base_model import load_base_model

    trained = Consolidator(moves=LowRank(rank=3), **QUIET).train(model, memories)
    trained.weights.save(tmp_path, model)
    ids = torch.tensor([[5, 9, 17, 3]])
    with torch.no_grad():
        with installed(model.base_model, trained.weights.tensors):
            ours = model.base_model(ids).logits
        plain = model.base_model(ids).logits
        theirs = PeftModel.from_pretrained(load_base_model(model.base_model_source)[0], tmp_path / "adapter")(
            ids
        ).logits
    assert torch.allclose(ours, theirs, atol=1e-4) and not torch.allclose(ours, plain, atol=1e-2)


def test_interrupted_training_goes_on_to_the_same_weights(model, memories, tmp_path):
    settings = QUIET | {"steps": 6, "checkpoint_steps": 2, "rehearsal": SelfSynthesised(number=4)}
    whole = Consolidator(moves=Everything(), **settings).train(model, memories)

    def interrupt(done, total):
        if done == 5:
            raise KeyboardInterrupt

    path = tmp_path / "state.safetensors"
    with pytest.raises(KeyboardInterrupt):
        Consolidator(moves=Everything(), **settings).train(model, memories, checkpoint=path, progress=interrupt)
    rest = Consolidator(moves=Everything(), **settings).train(model, memories, checkpoint=path)
    assert rest.losses == whole.losses[4:]
    assert all(torch.equal(rest.weights.tensors[name], t) for name, t in whole.weights.tensors.items())


def test_teacher_has_the_memory_and_the_student_has_not(model):
    lesson = Lesson("Who taught Fenda?", "Orla Wint taught Fenda.", "Orla")
    for with_documents, document in ((True, lesson.document), (False, None)):
        rows = _rows(model, [lesson], with_documents=with_documents)
        output = _forward(model, {}, rows, True)
        (prompt,) = model.layout.prompt_ids(model.tokenizer, [lesson.question], [document])
        answer = rows.ids[0, len(prompt) :].tolist()
        logits = model.base_model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
        assert torch.allclose(output.logits, logits, atol=1e-5) and output.hidden.shape[:2] == (2, len(answer))


def test_all_tokens_of_a_rehearsed_text_are_compared(model):
    lessons = [Lesson(None, None, "Orla Wint taught Fenda."), Lesson("Who?", "Orla taught.", "Orla")]
    output = _forward(model, {}, _rows(model, lessons, with_documents=True), False)
    ids = model.tokenizer(lessons[0].answer, return_tensors="pt")["input_ids"]
    assert torch.allclose(output.logits[: ids.shape[1] - 1], model.base_model(ids).logits[0, :-1], atol=1e-5)
    kept = _Frozen(model, lessons, with_hidden=False)
    assert [len(kept([lesson]).logits) for lesson in lessons] == [
        ids.shape[1] - 1,
        len(output.logits) - ids.shape[1] + 1,
    ]


def test_rehearsed_texts_keep_the_model_near_itself(model, memories):
    """On texts of the same kind; without them the same training moves it further."""
    texts = SelfSynthesised(number=8, max_tokens=12).questions(model, seed=99)
    moved = []
    for num_texts in (0, 8):
        rehearsal = OtherSubjects(number=4, num_texts=num_texts, weight=1.0)
        settings = {"rehearsal": rehearsal, "batch_size": 4, "steps": 12, "lr": 2e-2}
        tensors = Consolidator(moves=LowRank(rank=3), **settings).train(model, memories).weights.tensors
        rows = _rows(model, [Lesson(None, None, text) for text in texts], with_documents=False)
        with torch.no_grad():
            moved.append(kl(_forward(model, {}, rows, False).logits, _forward(model, tensors, rows, False).logits))
    assert moved[1] < 0.7 * moved[0]


@pytest.mark.parametrize(("given", "steps"), [(None, 34), (3, 3)])
def test_steps_grow_with_the_memories_unless_given(model, memories, given, steps):
    consolidator = Consolidator(moves=LowRank(rank=1), rehearsal=NoRehearsal(), batch_size=1, steps=given)
    assert len(consolidator.train(model, memories).losses) == steps
    assert consolidator.recipe["steps"] == (given or [24, 4.8])


def test_low_rank_starts_from_generated_adapters(model):
    adapter = model.internalize(["Orla Wint taught Fenda."]).fused()
    moves = LowRank(rank=adapter.rank, target_modules=["down_proj"])
    parameters = moves.start(model, MovedWeights.of_adapter(model.base_model, adapter), seed=0)
    tensors = moves.tensors(model, parameters)
    for name, tensor in MovedWeights.of_adapter(model.base_model, adapter).tensors.items():
        assert torch.allclose(tensors[name], tensor, atol=1e-5)


def test_memories_without_a_key_are_refused(model, tmp_path):
    memory = Memory.open(tmp_path / "other")
    memory.add("I moved.", user_id="alice")
    with pytest.raises(ValueError, match="None of these memories can be asked about"):
        Consolidator(**QUIET).train(model, memory.list(user_id="alice"))
    memory.close()


def test_wordings_of_training_are_never_held_out(memories):
    writer = Templates()
    for memory in memories:
        assert writer.held_out(memory) and not set(writer.training(memory)) & set(writer.held_out(memory))
    with pytest.raises(ValueError, match="is trained on and held out"):
        Templates(training=["Who is {subject}?"], held_out=["who is {subject}?"])


def test_rehearsal_is_none_given_or_written_by_the_model(model):
    assert NoRehearsal().questions(model, seed=0) == []
    assert Replay(questions=["Why?"]).questions(model, seed=0) == ["Why?"]
    writer = SelfSynthesised(number=6, max_tokens=5)
    written = writer.questions(model, seed=1)
    assert 0 < len(written) <= 6 and written == writer.questions(model, seed=1) != writer.questions(model, seed=2)
    with pytest.raises(ValueError, match="There is nothing to replay"):
        Replay(questions=[])


def test_other_subjects_are_asked_in_the_memories_words(model, memories, monkeypatch):
    def written(self, model, *, seed, trained=()):
        return ["The mayor of Corbaford is Jorun Pell.", "Here stood Fenda."]

    monkeypatch.setattr(SelfSynthesised, "questions", written)
    rehearsal = OtherSubjects(number=300, also=["Why?"])
    settings = QUIET | {"rehearsal": rehearsal}
    asked = Consolidator(**settings).rehearsed(model, memories)
    forms = {text.replace(m.subject, "{}") for m in memories for text in Templates().training(m)}
    # Not Fenda, who is a memory's subject.
    assert set(asked) == {form.format(name) for form in forms for name in ("Corbaford", "Jorun Pell")} | {"Why?"}
    assert rehearsal.questions(model, seed=0) == ["Why?"]
    assert (
        OtherSubjects(number=1).questions(model, seed=0, trained=[AboutSubject("Is Fenda?", "Fenda")])[0][:3] == "Is "
    )
    with pytest.raises(ValueError, match="number is 0"):
        OtherSubjects(number=0)


def test_lessons_keep_what_was_read_and_agrees(model, memories, monkeypatch):
    """An answer that needs no memory was not read from it; one wording of five says something else."""
    said = {"Tell me": "Orla Wint", "Name": "Orla Wint", "Fenda:": "unknown", "Who": "Orla Wint", "What": "Jorun"}

    def answers(model, asked):
        found = ((text, document or "") for text, document in asked)
        return [
            next(answer for start, answer in said.items() if text.startswith(start) or answer == "Jorun")
            if document.startswith("Orla")
            else "unknown"
            for text, document in found
        ]

    monkeypatch.setattr("hypernet.consolidation.consolidator._answers", answers)
    lessons = Consolidator().lessons(model, memories)
    assert [one.answer for one in lessons if "Fenda" in one.question] == 3 * ["Orla Wint"]
    # Of a memory that none of them reads all stay.
    assert [one.answer for one in lessons if "Norbach" in one.question] == 5 * ["unknown"]


def test_training_ends_when_enough_is_learned(model, memories):
    asked, settings = [], QUIET | {"steps": 12}

    def reached(tensors):
        asked.append({name: tensor.clone() for name, tensor in tensors.items()})
        return len(asked) == 2

    moves = LowRank(rank=3)
    trained = Consolidator(moves=moves, **settings).train(model, memories, enough=Enough(reached, every=3))
    assert len(trained.losses) == 6 and len(asked) == 2
    assert all(torch.equal(trained.weights.tensors[name], tensor) for name, tensor in asked[-1].items())
    never = Consolidator(moves=moves, **settings).train(model, memories, enough=Enough(lambda _: False, every=5))
    assert len(never.losses) == 12 and never.losses[:6] == trained.losses


def test_learning_rate_stays_where_what_is_learned_ends_training():
    assert [_share_of_lr(step, 100, constant=True) for step in (0, 9, 50, 99)] == [0.1, 1.0, 1.0, 1.0]
    assert [round(_share_of_lr(step, 100, constant=False), 3) for step in (0, 50)] == [0.1, 0.5]
