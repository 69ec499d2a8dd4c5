"""Batches: what they hold, the same for the same step, and exactly what experiments are trained on."""

import hashlib
import math
import pickle
import random
import re
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
import torch

from hypernet.base.packed_rows import QUESTION_KINDS
from hypernet.data.batches import BaseModelBatches, DistillationBatches, random_pieces
from hypernet.data.curriculum import Curriculum
from hypernet.data.encyclopedia import Encyclopedia, background_questions, relations
from hypernet.data.needles import Needles
from hypernet.data.records import UNKNOWN, Question, StoredAnswer
from hypernet.text.chunking import chunk_document
from tests.data.curricula import make_curriculum, make_mixed


def segments_of(rows, row, tokenizer):
    """(kind, prompt, answer) of each question of a row, decoded."""
    result = []
    for number in range(1, int(rows.segments[row].max()) + 1):
        own = (rows.segments[row] == number).nonzero()[:, 0]
        answer = own[rows.target_kind[row, own] >= 0] + 1
        prompt = [i for i in own.tolist() if i not in answer.tolist()]
        kind = QUESTION_KINDS[int(rows.target_kind[row, own].max())]
        result.append((kind, *(tokenizer.decode(rows.ids[row, list(at)]) for at in (prompt, answer))))
    return result


# Batches for the hypernetwork


@pytest.fixture(scope="module")
def distillation(tiny_tokenizer):
    return DistillationBatches(make_curriculum(), tiny_tokenizer, max_chunk_tokens=40)


def test_batches_has_one_batch_per_step(distillation):
    assert len(distillation) == len(list(distillation)) == 6


@pytest.mark.parametrize("step", [0, 4])
def test_batch_holds_the_chunks_of_its_articles(distillation, tiny_tokenizer, step):
    batch, records = distillation[step], distillation.curriculum.records(step)
    assert len(batch.chunk_counts) == len(records) and batch.chunk_ids.shape == batch.chunk_mask.shape
    rows = iter(zip(batch.chunk_ids, batch.chunk_mask, strict=True))
    for record, number in zip(records, batch.chunk_counts, strict=True):
        chunks = chunk_document(record.document, tiny_tokenizer, max_chunk_tokens=40)
        assert len(chunks.ids) == number
        for ids, mask in zip(chunks.ids, chunks.mask, strict=True):
            padded_ids, padded_mask = next(rows)
            assert padded_ids[padded_mask].tolist() == ids[mask].tolist()
    assert next(rows, None) is None
    assert max(batch.chunk_counts) > (0 if step == 0 else 1)


@pytest.mark.parametrize("step", [2, 5])
def test_only_the_teachers_document_questions_see_the_document(distillation, tiny_tokenizer, step):
    batch, records = distillation[step], distillation.curriculum.records(step)
    _, stage, _ = distillation.curriculum.stage(step)
    protected = {question.text: question.answer for question in background_questions(held_out=False)}
    for row, record in enumerate(records):
        student, teacher = (segments_of(rows, row, tiny_tokenizer) for rows in (batch.student, batch.teacher))
        assert [(kind, answer) for kind, _, answer in student] == [(kind, answer) for kind, _, answer in teacher]
        prefix = batch.teacher.ids[row, batch.teacher.segments[row] == 0]
        assert tiny_tokenizer.decode(prefix) == "<|user|>" + record.document
        assert not (batch.student.segments[row] == 0).any()
        own = {question.text: question.answer for question in record.questions}
        forms = {q.group: next(r for r in relations() if r.name == q.group).questions for q in record.questions}
        own_texts = set(own)
        for (kind, prompt, answer), (_, behind, _) in zip(student, teacher, strict=True):
            text = prompt.removeprefix("<|user|>").removesuffix("<|end|><|assistant|>")
            answer = answer.removeprefix(" ").removesuffix("<|end|>")
            if kind in ("document", "unanswerable"):
                assert own.pop(text) == answer and behind == f"\n\n{text}<|end|><|assistant|>"
            else:
                assert behind == prompt
                if kind == "background":
                    assert protected[text] == answer
                    continue
                # A relation of the article, asked about somebody whom it does not name.
                assert answer == UNKNOWN and text not in own_texts
                patterns = [re.escape(form).replace(r"\{n\}", "(.+)") for group in forms.values() for form in group]
                (name,) = {match[1] for pattern in patterns if (match := re.fullmatch(pattern, text))}
                assert name.lower() not in record.document.lower()
        assert not own
        kinds = Counter(kind for kind, _, _ in student)
        assert (kinds["background"], kinds["cross_document"]) == (stage.num_background, stage.num_cross_document)


def test_held_out_background_asks_only_held_out_questions(tiny_tokenizer):
    batches = DistillationBatches(make_curriculum(), tiny_tokenizer, max_chunk_tokens=40, held_out_background=True)
    allowed = {question.text for question in background_questions(held_out=True)}
    for step in (0, 5):
        for row in range(len(batches[step].student.ids)):
            for kind, prompt, _ in segments_of(batches[step].student, row, tiny_tokenizer):
                text = prompt.removeprefix("<|user|>").removesuffix("<|end|><|assistant|>")
                assert kind != "background" or text in allowed


def test_cross_document_questions_come_from_the_records_source(tiny_tokenizer):
    curriculum = make_mixed({"steps": 1, "batch_size": 3, "source": "a", "num_cross_document": 2, "num_background": 0})
    batch = DistillationBatches(curriculum, tiny_tokenizer, max_chunk_tokens=40)[0]
    for row in range(3):
        asked = segments_of(batch.student, row, tiny_tokenizer)
        assert [kind for kind, _, _ in asked] == ["document", "cross_document", "cross_document"]
        assert "Who is not there?" in asked[1][1]
    assert BaseModelBatches(curriculum, tiny_tokenizer)[0].ids.shape[0] == 3


# Batches for the base model


@pytest.fixture(scope="module")
def base_model_batches(tiny_tokenizer):
    sizes = {"batch_size": 4, "facts_per_entity": [3, 3], "num_background": 2}
    stages = [{"steps": 2, **sizes, "reordering": 1.0, "unanswerable": 1.0}, {"steps": 1, **sizes}]
    return BaseModelBatches(make_curriculum(stages=stages), tiny_tokenizer)


def test_base_model_rows_hold_every_kind_of_question(base_model_batches, tiny_tokenizer):
    rows, records = base_model_batches[0], base_model_batches.curriculum.records(0)
    known = {question.text: question.answer for question in background_questions()}
    for row, record in enumerate(records):
        own = {question.text: question.answer for question in record.questions}
        asked = segments_of(rows, row, tiny_tokenizer)
        sees = [bool(rows.sees_prefix[row, rows.segments[row] == n + 1].all()) for n in range(len(asked))]
        seen = Counter()
        for (kind, prompt, answer), with_article in zip(asked, sees, strict=True):
            if kind == "reordering":
                continue
            start = "\n\n" if with_article else "<|user|>"
            assert prompt.startswith(start)
            text = prompt.removeprefix(start).removesuffix("<|end|><|assistant|>")
            answer = answer.removeprefix(" ").removesuffix("<|end|>")
            if kind == "background":
                assert known[text] == answer
            else:
                assert text in own and answer == (own[text] if with_article else UNKNOWN)
            seen[kind, with_article] += 1
        assert seen["document", True] == 3 and seen["unanswerable", True] == 1 and seen["unanswerable", False] == 1
        assert seen["background", True] + seen["background", False] == 2


def test_reordering_is_the_articles_sentences_in_drawn_order(base_model_batches, tiny_tokenizer):
    rows, records = base_model_batches[1], base_model_batches.curriculum.records(1)
    orders = []
    for row, record in enumerate(records):
        last = rows.segments[row] == rows.segments[row].max()
        text = tiny_tokenizer.decode(rows.ids[row, last])
        orders.append(sorted(range(len(record.sentences)), key=lambda i: text.index(record.sentences[i])))  # noqa: B023
        assert text == "\n\n" + " ".join(record.sentences[i] for i in orders[row])
    # The permutations that this seed draws.
    assert orders == [[2, 0, 4, 3, 1], [2, 1, 0, 3], [2, 0, 4, 3, 1], [1, 4, 0, 3, 2]]


def test_reordering_is_predicted_whole_with_half_the_weight(base_model_batches):
    rows = base_model_batches[1]
    for row in range(len(rows.ids)):
        last = rows.segments[row] == rows.segments[row].max()
        assert set(rows.target_weight[row, last].tolist()) == {0.5}
        assert rows.target_kind[row, last].tolist() == [QUESTION_KINDS.index("reordering")] * (last.sum() - 1) + [-1]


def test_without_reordering_no_row_has_one(base_model_batches):
    assert (base_model_batches[2].target_kind != QUESTION_KINDS.index("reordering")).all()


# Both


@pytest.mark.parametrize("batches", ["distillation", "base_model_batches"])
def test_batches_are_the_same_again_and_after_pickling(batches, request):
    batches = request.getfixturevalue(batches)

    def tensors(batch):
        parts = [part for part in batch if part is not None]
        return [t for part in parts for t in (part if isinstance(part, tuple) else [torch.as_tensor(part)])]

    first = tensors(batches[2])
    for again in (tensors(batches[2]), tensors(pickle.loads(pickle.dumps(batches))[2])):
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


# Joined documents, distractors, documents in the prompt


def test_joined_documents_are_drawn_from_the_step(tiny_tokenizer):
    def batches(**more):
        curriculum = make_curriculum(stages=[{"steps": 3, "batch_size": 6, **more}])
        return list(map(DistillationBatches(curriculum, tiny_tokenizer, max_chunk_tokens=40).__getitem__, range(3)))

    for batch in batches():
        assert batch.members == [[i] for i in range(6)]
    sizes = Counter()
    for batch in batches(num_joined_documents=[1, 3]):
        for row, members in enumerate(batch.members):
            assert members[0] == row and len(set(members)) == len(members) and set(members) <= set(range(6))
            sizes[len(members)] += 1
    assert set(sizes) == {1, 2, 3}
    again = [[batch.members for batch in batches(num_joined_documents=[1, 3])] for _ in range(2)]
    assert again[0] == again[1]
    # No more documents than the step has.
    assert all(len(members) == 6 for batch in batches(num_joined_documents=[9, 9]) for members in batch.members)
    # What is read and asked does not depend on it.
    for alone, joined in zip(batches(), batches(num_joined_documents=[2, 2]), strict=True):
        assert torch.equal(alone.chunk_ids, joined.chunk_ids) and torch.equal(alone.student.ids, joined.student.ids)


def test_in_prompt_rows_have_another_documents_adapter(tiny_tokenizer):
    def batches(**stage):
        stages = [{"steps": 3, "batch_size": 6, "facts_per_entity": [1, 3], "num_joined_documents": [1, 3], **stage}]
        return DistillationBatches(make_curriculum(stages=stages), tiny_tokenizer, max_chunk_tokens=40)

    sizes = set()
    for step, (plain, batch) in enumerate(zip(batches(), batches(num_in_prompt=4), strict=True)):
        records = batches().curriculum.records(step)
        assert batch.num_own_rows == plain.num_own_rows == len(plain.student.ids) == 6
        assert 6 < len(batch.student.ids) == len(batch.teacher.ids) == len(batch.members) <= 10
        # The rows without a document in the prompt are what they were.
        assert batch.members[:6] == plain.members
        for rows, before in ((batch.student, plain.student), (batch.teacher, plain.teacher)):
            width = before.ids.shape[1]
            assert torch.equal(rows.ids[:6, :width], before.ids)
            assert torch.equal(rows.target_kind[:6, :width], before.target_kind)
        for row in range(6, len(batch.student.ids)):
            prefix = batch.student.segments[row] == 0
            text = tiny_tokenizer.decode(batch.student.ids[row][prefix], skip_special_tokens=True)
            (document,) = (i for i, record in enumerate(records) if record.document in text)
            assert document not in batch.members[row]
            assert batch.members[row] in plain.members
            asked = {question.text for question in records[document].questions}
            for number in range(1, int(batch.student.segments[row].max()) + 1):
                own = batch.student.segments[row] == number
                assert batch.student.sees_prefix[row][own].all()
                assert QUESTION_KINDS[int(batch.student.target_kind[row][own].max())] == "in_prompt"
                assert any(q in tiny_tokenizer.decode(batch.student.ids[row][own]) for q in asked)
            sizes.add(number)
            used = batch.student.segments[row] >= 0
            assert torch.equal(batch.student.ids[row][used], batch.teacher.ids[row][batch.teacher.segments[row] >= 0])
    assert sizes == {1, 2}


def test_distractors_are_read_and_joined_but_not_asked_about(tiny_tokenizer):
    def batches(**more):
        stages = [{"steps": 3, "batch_size": 6, **more}]
        filler = Needles("train", tokenizer=tiny_tokenizer, num_tokens=(60, 90), num_needles=(0, 0))
        curriculum = Curriculum(Encyclopedia("train"), stages, sources={"filler": filler})
        return list(map(DistillationBatches(curriculum, tiny_tokenizer, max_chunk_tokens=40).__getitem__, range(3)))

    joined = batches(num_joined_documents=[1, 20], distractor_source="filler", num_distractor_documents=3)
    sizes = {len(members) for batch in joined for members in batch.members}
    assert 1 <= min(sizes) and 10 < max(sizes) <= 20
    texts = set()
    for alone, batch in zip(batches(), joined, strict=True):
        assert [members[0] for members in batch.members] == list(range(6)) and len(batch.chunk_counts) == 9
        assert {m for members in batch.members for m in members[1:]} <= {6, 7, 8}
        assert torch.equal(alone.student.ids, batch.student.ids) and torch.equal(alone.teacher.ids, batch.teacher.ids)
        first = sum(batch.chunk_counts[:6])
        assert batch.chunk_counts[:6] == alone.chunk_counts and sum(batch.chunk_counts) == len(batch.chunk_ids) > first
        distractors = tiny_tokenizer.batch_decode(batch.chunk_ids[first:], skip_special_tokens=True)
        texts |= set(distractors)
        assert not any("secret number" in text for text in distractors)
    assert len(texts) > 6  # other filler in every step


def test_number_of_joined_distractors_is_log_uniform(tiny_tokenizer):
    filler = Needles("train", tokenizer=tiny_tokenizer, num_tokens=(20, 30), num_needles=(0, 0))
    joined = {"num_joined_documents": [1, 40], "distractor_source": "filler", "num_distractor_documents": 3}
    stages = [{"steps": 1, "batch_size": 500, **joined}]
    batches = DistillationBatches(
        Curriculum(Encyclopedia("train"), stages, sources={"filler": filler}), tiny_tokenizer, max_chunk_tokens=40
    )
    sizes = [len(members) for members in batches[0].members]
    for least, most in ((1, 1), (2, 4), (20, 40)):
        share = math.log((most + 1) / least) / math.log(41)
        # Within four standard deviations of a binomial count.
        assert abs(sum(least <= size <= most for size in sizes) / 500 - share) < 4 * (share * (1 - share) / 500) ** 0.5
    assert set(sizes) <= set(range(1, 41))


# What experiments are trained on stays what it is

TINY = [
    {"steps": 400, "batch_size": 48, "facts_per_entity": [1, 1], "num_distractors": [0, 0], "num_background": 2}
    | {"num_cross_document": 1},
    {"steps": 800, "batch_size": 32, "num_entities": [1, 2], "facts_per_entity": [1, 3], "num_distractors": [0, 1]}
    | {"num_background": 2, "num_cross_document": 1, "unanswerable": 0.1},
    {"steps": 1300, "batch_size": 18, "num_entities": [1, 4], "facts_per_entity": [2, 5], "num_background": 3}
    | {"num_cross_document": 1, "unanswerable": 0.1, "num_joined_documents": [1, 2], "shared_relations": 0.5},
]
BASE_MODEL = [
    {"steps": 300, "facts_per_entity": [2, 4], "num_distractors": [0, 1], "num_background": 4, "reordering": 1.0},
    {"steps": 1200, "batch_size": 24, "num_entities": [1, 4], "facts_per_entity": [2, 6], "num_distractors": [0, 3]}
    | {"num_background": 5, "unanswerable": 0.1, "reordering": 0.1},
]


def digest(tokenizer, *parts):
    """Of texts and shapes rather than token ids: another tokenizer is no other batch."""
    result = hashlib.sha256()
    for part in parts:
        if isinstance(part, torch.Tensor):
            result.update("".join(tokenizer.convert_ids_to_tokens(part.flatten().tolist())).encode())
        else:
            result.update(repr(part).encode())
    return result.hexdigest()[:16]


@pytest.mark.parametrize(
    ("step", "expected"),
    [(0, "7e87575c855fc951"), (777, "a29313aaf0d61e4d"), (2400, "642025b5c7649f6d")],
)
def test_distillation_batches_are_unchanged_since_version_0_1(tiny_tokenizer, step, expected):
    batches = DistillationBatches(make_curriculum(stages=TINY), tiny_tokenizer, max_chunk_tokens=112)
    batch = batches[step]
    rows = [t for rows in (batch.student, batch.teacher) for t in (rows.ids, rows.target_kind.tolist())]
    assert digest(tiny_tokenizer, batch.chunk_ids, batch.chunk_counts, batch.members, *rows) == expected


@pytest.mark.parametrize(("step", "expected"), [(0, "95c2dd24c98103d6"), (1499, "76a312f646060ac6")])
def test_base_model_batches_are_unchanged_since_version_0_1(tiny_tokenizer, step, expected):
    rows = BaseModelBatches(make_curriculum(stages=BASE_MODEL), tiny_tokenizer)[step]
    assert digest(tiny_tokenizer, rows.ids, rows.target_kind.tolist(), rows.target_weight.tolist()) == expected


# Drawn numbers of chunks


def test_chunk_weights_draw_the_number_of_chunks(tiny_tokenizer):
    needles = Needles("train", tokenizer=tiny_tokenizer, num_tokens=(300, 300))

    def batches(**more):
        stage = {"steps": 4, "batch_size": 20, "source": "needles", "num_background": 0, **more}
        curriculum = Curriculum(Encyclopedia("train"), [stage], sources={"needles": needles})
        return DistillationBatches(curriculum, tiny_tokenizer, max_chunk_tokens=320)

    weights = [8, 2, 1, 1, 1, 1, 1, 1]
    cut, whole = batches(chunk_weights=weights), batches()
    affixes = 3  # <|user|> before, <|end|><|assistant|> after
    counts = Counter()
    for step in range(4):
        batch, uncut = cut[step], whole[step]
        assert torch.equal(batch.teacher.ids, uncut.teacher.ids) and uncut.chunk_counts == [1] * 20
        counts.update(batch.chunk_counts)
        assert ((batch.chunk_mask.sum(1) - affixes) >= 25).all()
        chunks = iter(zip(batch.chunk_ids, batch.chunk_mask, strict=True))
        for number, ids, mask in zip(batch.chunk_counts, uncut.chunk_ids, uncut.chunk_mask, strict=True):
            pieces = [ids[mask].tolist() for ids, mask in (next(chunks) for _ in range(number))]
            # Joined, the chunks are the document's tokens.
            assert [i for piece in pieces for i in piece[1:-2]] == ids[mask].tolist()[1:-2]
    assert set(counts) <= set(range(1, 9)) and 25 < counts[1] < 55 and 2 < counts[2] < 20 and len(counts) > 5
    assert torch.equal(cut[3].chunk_ids, batches(chunk_weights=weights)[3].chunk_ids)


@pytest.mark.parametrize("num_pieces", [1, 2, 5, 9])
def test_random_pieces_cover_all_and_none_is_too_small(num_pieces):
    rng = random.Random(0)
    seen = set()
    for _ in range(200):
        sizes = [rng.randint(1, 12) for _ in range(rng.randint(1, 30))]
        pieces = random_pieces(rng, sizes, num_pieces=num_pieces, min_size=20)
        assert pieces[0][0] == 0 and pieces[-1][1] == len(sizes)
        assert all(a[1] == b[0] for a, b in pairwise(pieces)) and len(pieces) <= num_pieces
        assert all(sum(sizes[a:b]) >= 20 for a, b in pieces) or len(pieces) == 1
        seen.add(len(pieces))
    assert num_pieces in seen or num_pieces == 9
    assert random_pieces(rng, [30, 30, 30], num_pieces=3, min_size=20) == [(0, 1), (1, 2), (2, 3)]
    places = {random_pieces(rng, [30] * 9, num_pieces=2, min_size=20)[0][1] for _ in range(200)}
    assert places == set(range(1, 9))


# Answer chunks and stored answers


def test_answer_chunk_is_the_one_that_holds_it_verbatim(tiny_tokenizer):
    batches = DistillationBatches(make_curriculum(), tiny_tokenizer, max_chunk_tokens=16)
    document = "The mayor is Tella Garlock. Some 163 people live there. Soft silver is sold. The river is called Ulla."
    asked = [
        [
            *(Question("Who?", "Tella Garlock"), Question("How many?", "16"), Question("What?", "soft silver")),
            *(Question("Which?", "Ulla"), Question("Where?", "there"), Question("What is?", "is")),
            *(Question("And?", "163", "background"), Question("How?", "163"), Question("?", "unknown", "unanswerable")),
        ],
        [Question("Who?", "Tella Garlock")],
    ]
    batch = batches.batch([document, "Nothing is known. Tella Garlock."], asked)
    texts = [tiny_tokenizer.decode(ids[mask]) for ids, mask in zip(batch.chunk_ids, batch.chunk_mask, strict=True)]
    first = batch.chunk_counts[0]
    where = {
        word: [i for i, text in enumerate(texts[:first]) if word in text]
        for word in ("Tella Garlock", "163", "Soft silver", "Ulla.", "there")
    }
    assert first > 2 and all(len(chunks) == 1 for chunks in where.values())
    mayor, people, silver, river, there = (chunks[0] for chunks in where.values())
    # 16 is only part of a number, and "is" in several chunks.
    expected = [[mayor, -1, silver, river, there, -1, -1, people, -1], [0]]
    for row, chunks in enumerate(expected):
        for segment, chunk in enumerate(chunks, start=1):
            inside = batch.student.segments[row] == segment
            is_answer = inside & (batch.student.target_kind[row] >= 0)
            assert is_answer.any() and (batch.answer_chunk[row][is_answer] == chunk).all(), (row, segment)
    assert (batch.answer_chunk[batch.student.target_kind < 0] == -1).all()


def test_answer_chunk_follows_drawn_chunks(tiny_tokenizer):
    curriculum = make_curriculum(stages=[{"steps": 4, "facts_per_entity": [3, 5], "chunk_weights": [1, 2, 2]}])
    batch = DistillationBatches(curriculum, tiny_tokenizer, max_chunk_tokens=200)[1]
    firsts, checked = [sum(batch.chunk_counts[:i]) for i in range(len(batch.chunk_counts))], 0
    assert len(set(batch.chunk_counts)) > 1
    for row, record in enumerate(curriculum.records(1)):
        for segment, question in enumerate(record.questions, start=1):
            inside = (batch.student.segments[row] == segment) & (batch.answer_chunk[row] >= 0)
            for chunk in batch.answer_chunk[row][inside].unique().tolist():
                place = firsts[row] + chunk
                text = tiny_tokenizer.decode(batch.chunk_ids[place][batch.chunk_mask[place]])
                assert question.answer.lower() in text.lower()
                checked += chunk > 0
    assert checked > 5


def test_stored_top_k_lies_where_the_answer_is_predicted(tiny_tokenizer):
    log_probs = np.log([[0.5, 0.2], [0.7, 0.1], [0.9, 1e-9]])
    stored = StoredAnswer((50, 60, 3), np.array([[50, 7], [60, 8], [3, 9]]), log_probs)
    one = stored._replace(ids=(50, 3), indices=np.array([[4], [5]]), log_probs=np.log([[0.25], [0.5]]))
    asked = [
        [Question("Who?", "it"), Question("What?", "stored text", stored=stored)],
        [Question("Where?", "there", stored=one)],
        [Question("When?", "then")],
    ]
    batches = DistillationBatches(make_curriculum(), tiny_tokenizer, max_chunk_tokens=30)
    batch = batches.batch(["A.", "B.", "C."], asked)
    student, found = batch.student, batch.stored
    assert found.where.sum() == 5 and not found.where[2].any()
    assert student.targets()[found.where].tolist() == [50, 60, 3, 50, 3]
    assert found.indices[found.where].tolist() == [[50, 7], [60, 8], [3, 9], [4, 0], [5, 0]]
    expected = torch.tensor([[0.5, 0.2], [0.7, 0.1], [0.9, 0], [0.25, 0], [0.5, 0]])
    torch.testing.assert_close(found.log_probs[found.where].exp(), expected)
    assert (found.where <= (student.target_kind >= 0)).all()
    assert {t.device.type for t in batch.to("meta").stored} == {"meta"}
    assert batches[0].stored is None


def test_training_text_beyond_the_embedding_is_refused(tiny_tokenizer):
    for batches in (
        BaseModelBatches(make_curriculum(), tiny_tokenizer, num_embeddings=300),
        DistillationBatches(make_curriculum(), tiny_tokenizer, max_chunk_tokens=40, num_embeddings=300),
    ):
        with pytest.raises(
            ValueError, match=r"A text has the token '.+' with id \d+, but .* embeddings for 300 tokens"
        ):
            batches[0]


def test_training_rows_have_the_templates_control_tokens_only(tiny_tokenizer):
    """Whatever document, question and answer spell; the teacher's row has the document before the question."""
    question = Question("What is <|user|>?", "It is <|end|>.", "document", "relation")
    batches = DistillationBatches(make_curriculum(), tiny_tokenizer, max_chunk_tokens=40)
    batch = batches.batch(["Turns end in <|end|>."], [[question]])
    control = lambda ids: [token for token in ids.flatten().tolist() if token < 4]  # noqa: E731
    assert control(batch.chunk_ids) == [1, 3, 2]
    assert control(batch.student.ids) == control(batch.teacher.ids) == [1, 3, 2, 3]
    text = "<|user|>Turns end in <|end|>.\n\nWhat is <|user|>?<|end|><|assistant|> It is <|end|>.<|end|>"
    assert tiny_tokenizer.decode(batch.teacher.ids[0]) == text
