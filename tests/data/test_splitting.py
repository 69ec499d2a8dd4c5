"""A step computed in parts is the step: the same losses and the same gradients, whatever the number of parts."""

import pytest
import torch

from hypernet.base.base_model import load_base_model
from hypernet.base.packed_rows import Segment, pack_row, pad_rows
from hypernet.data.batches import BaseModelBatches, DistillationBatches, StoredTopK
from hypernet.data.curriculum import Curriculum
from hypernet.data.encyclopedia import Encyclopedia
from hypernet.data.needles import Needles
from hypernet.data.records import Question
from hypernet.data.splitting import StepPart, split
from hypernet.training.lit_base_model import LitBaseModel
from hypernet.training.lit_doc_to_lora import LitDocToLoRA
from hypernet.training.losses import WeightL1
from tests.small_trainings import objective

STAGE = {"steps": 2, "batch_size": 8, "facts_per_entity": [1, 5], "num_entities": [1, 3], "unanswerable": 0.5}


@pytest.fixture
def batches(tiny_tokenizer):
    """batches(**stage) → DistillationBatches of 8 documents in up to some chunks each."""

    def make(**changes):
        filler = Needles("train", tokenizer=tiny_tokenizer, num_tokens=(20, 40), num_needles=(0, 0))
        curriculum = Curriculum(Encyclopedia("train"), [{**STAGE, **changes}], sources={"filler": filler})
        return DistillationBatches(curriculum, tiny_tokenizer, max_chunk_tokens=12)

    return make


@pytest.fixture
def distillation(make_doc_to_lora):
    """In double precision but for the losses."""
    model = make_doc_to_lora()
    model.double()
    terms = objective(kl=0.7, locality_kl=0.4, nll=0.3, l1=WeightL1(weight=0.2))
    return LitDocToLoRA(model=model, objective=terms, optimizer={})


def losses_and_gradients(module, parameters, parts):
    """Sums over the parts, as accumulating them gives, of every logged loss and of the gradients."""
    logged = {}
    module.log = lambda name, value, **_: logged.__setitem__(name, logged.get(name, 0) + value.item())
    module._trainer = None
    for parameter in parameters:
        parameter.grad = None
    for part in parts:
        # The module asks the strategy for the sum over processes; here there is one.
        loss = module.training_step(part._replace(num_parts=1), 0)
        loss.backward()
        module.on_after_backward()
    return logged, [p.grad for p in parameters]


def assert_same(found, expected):
    # Losses are computed in single precision; a wrong average is off by a tenth.
    assert found[0] == pytest.approx(expected[0], rel=1e-6)
    for a, b in zip(found[1], expected[1], strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6 * float(b.abs().max().clamp(min=1)))


@pytest.mark.parametrize("num_parts", [2, 3, 8])
@pytest.mark.parametrize(
    "stage",
    [
        {"num_background": 2, "num_cross_document": 1},
        {"num_joined_documents": [1, 4]},
        {"num_joined_documents": [8, 8], "num_background": 0},
        {"num_joined_documents": [3, 9], "distractor_source": "filler", "num_distractor_documents": 2},
        {"num_joined_documents": [1, 2], "num_in_prompt": 3},
    ],
    ids=["alone", "joined", "all together", "joined with distractors", "documents in the prompt"],
)
def test_step_over_8_documents_equals_its_parts(batches, distillation, stage, num_parts):
    batch = batches(**stage)[0]
    assert max(batch.chunk_counts) > min(batch.chunk_counts)
    parameters = list(distillation.model.hypernetwork.parameters())
    whole = losses_and_gradients(distillation, parameters, [StepPart(batch)])
    assert all(gradient.any() for gradient in whole[1])
    parts = [split(batch, i, num_parts) for i in range(num_parts)]
    assert sum(part.batch.num_own_rows for part in parts) == 8
    assert sum(len(part.batch.student.ids) for part in parts) == 8 + stage.get("num_in_prompt", 0)
    assert_same(losses_and_gradients(distillation, parameters, parts), whole)


def test_documents_without_a_kind_do_not_count_in_its_mean(batches, distillation):
    documents = [f"Norbach number {i} lies on the Vel. It makes tin." for i in range(5)]
    about, other = (
        Question("Where is Norbach?", "Vel"),
        Question("What is the capital of France?", "Paris", "background"),
    )
    asked = [[about, other], [about], [about], [other, other], [about, about, other]]
    batch = batches().batch(documents, asked)
    parts = [split(batch, i, 5) for i in range(5)]
    assert [part.share["document"] for part in parts] == [0.25, 0.25, 0.25, 0, 0.25]
    assert [part.share["background"] for part in parts] == pytest.approx([1 / 3, 0, 0, 1 / 3, 1 / 3])
    parameters = list(distillation.model.hypernetwork.parameters())
    whole = losses_and_gradients(distillation, parameters, [StepPart(batch)])
    assert_same(losses_and_gradients(distillation, parameters, parts), whole)


@pytest.mark.parametrize("num_parts", [2, 3, 8])
def test_base_model_step_equals_its_parts(tiny_base_model_folder, tiny_tokenizer, num_parts):
    base_model, tokenizer = load_base_model(tiny_base_model_folder)
    base_model.double().requires_grad_(True)
    module = LitBaseModel(base_model=base_model, tokenizer=tokenizer, optimizer={}, document_weight=0.3)
    curriculum = Curriculum(Encyclopedia("train"), [{**STAGE, "reordering": 0.5}])
    batch = BaseModelBatches(curriculum, tiny_tokenizer)[0]
    parameters = list(base_model.parameters())
    whole = losses_and_gradients(module, parameters, [StepPart(batch)])
    parts = [split(batch, i, num_parts) for i in range(num_parts)]
    assert_same(losses_and_gradients(module, parameters, parts), whole)


def test_a_part_brings_its_members_chunks_and_no_others(batches):
    whole = batches(num_joined_documents=[1, 4])[0]
    first = [sum(whole.chunk_counts[:i]) for i in range(8)]
    of_document = [whole.chunk_ids[f : f + n][whole.chunk_mask[f : f + n]] for f, n in zip(first, whole.chunk_counts)]  # noqa: B905
    for number in range(4):
        part = split(whole, number, 4).batch
        own = range(2 * number, 2 * number + 2)
        assert len(part.chunk_counts) == len({m for i in own for m in whole.members[i]} | set(own))
        starts = [sum(part.chunk_counts[:i]) for i in range(len(part.chunk_counts))]
        for row, i in enumerate(own):
            for mine, theirs in zip(part.members[row], whole.members[i], strict=True):
                chunks = slice(starts[mine], starts[mine] + part.chunk_counts[mine])
                ids = part.chunk_ids[chunks][part.chunk_mask[chunks]]
                assert torch.equal(ids, of_document[theirs])
        assert part.chunk_mask.any(0).all() and (part.student.segments >= 0).any(0).all()  # no needless padding


def test_split_keeps_stored_probabilities_with_their_rows(batches):
    batch = batches()[0]
    shape = batch.student.ids.shape
    where = batch.student.target_kind >= 0
    numbers = torch.arange(where.numel()).view(shape)
    batch = batch._replace(stored=StoredTopK(where, numbers[..., None], -numbers[..., None].float()))
    for number in range(4):
        part = split(batch, number, 4).batch
        assert torch.equal(part.stored.where, part.student.target_kind >= 0)
        rows = slice(2 * number, 2 * number + 2)
        assert torch.equal(part.stored.indices[part.stored.where], numbers[rows][where[rows]][:, None])


def test_split_keeps_answer_chunks_with_their_rows(batches):
    batch = batches()[0]
    for number in range(4):
        part = split(batch, number, 4).batch
        rows, width = slice(2 * number, 2 * number + 2), part.student.ids.shape[1]
        assert torch.equal(part.answer_chunk, batch.answer_chunk[rows, :width])
        assert (batch.answer_chunk[rows] >= 0).any()
        assert part.answer_chunk.shape == part.student.ids.shape


def test_parts_are_adjacent_even_and_the_last_is_marked(batches):
    batch = batches()[0]
    parts = [split(batch, i, 3, is_last=i == 2) for i in range(3)]
    assert [len(part.batch.teacher.ids) for part in parts] == [2, 3, 3]
    assert [part.is_last for part in parts] == [False, False, True] and {part.num_parts for part in parts} == {3}
    assert StepPart.of(parts[0]) is parts[0] and StepPart.of(batch).share["document"] == 1


def test_part_moves_to_a_device_as_a_whole_batch_does(batches):
    part = split(batches()[0], 0, 2).to("meta")
    assert part.batch.chunk_ids.is_meta and part.batch.student.ids.is_meta and part.num_parts == 2


def test_split_refuses_more_parts_than_documents(batches):
    with pytest.raises(ValueError, match=r"8 documents cannot be split into 9 parts.*Raise batch_size"):
        split(batches()[0], 0, 9)


def test_split_refuses_unknown_types_and_too_many_parts():
    with pytest.raises(ValueError, match="A list cannot be split; set trainer.accumulate_grad_batches"):
        split([1, 2], 0, 2)
    rows = pad_rows([pack_row([], [Segment([1, 2], 1, False, 0)])], pad_id=0)
    with pytest.raises(ValueError, match="1 documents cannot be split into 2"):
        split(rows, 1, 2)
