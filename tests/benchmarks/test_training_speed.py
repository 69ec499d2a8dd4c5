"""benchmarks/training_speed.py: all ways take the same step, to its gradients; rows say what was measured.

That the packed step of training is the padded one is tested here too: the benchmark's padded methods are the reference.
"""

import json

import pytest
import torch
from hydra import compose, initialize_config_dir

from benchmarks.training_speed import __main__ as training_speed
from benchmarks.training_speed.__main__ import (
    METHODS,
    TOLERANCE,
    Ours,
    Padded,
    Prompts,
    build_model,
    difference,
    loss_and_gradients,
    main,
    make_batches,
    markdown,
    measure,
    quantiles,
)
from hypernet.adapters.joining import Joining
from hypernet.base.packed_rows import QUESTION_KINDS

STAGE = {"batch_size": 4, "num_entities": [1, 3], "facts_per_entity": [1, 4], "num_cross_document": 1}
STAGE |= {"unanswerable": 0.5}
CHUNKED = {**STAGE, "chunk_weights": [1, 1, 1, 1], "min_chunk_tokens": 10}
SMALL = "{batch_size: 2, num_entities: [2, 2], facts_per_entity: [1, 2], max_questions: 2, chunk_weights: [1, 1]}"


def settings(*overrides):
    with initialize_config_dir(str(training_speed.ROOT / "conf"), version_base="1.3"):
        return compose("training_speed", overrides=list(overrides))


def small(*overrides):
    stages = [f"stages.{stage}={SMALL}" for stage in ("stage_1", "stage_2")]
    return settings(*stages, "batches=2", "runs=3", "device=cpu", *overrides)


@pytest.fixture(scope="module")
def shipped():
    return build_model("tiny", device="cpu")


# The same step


def test_padded_question_row_equals_its_prompt(make_doc_to_lora):
    model = make_doc_to_lora()
    (batch,) = make_batches(model, CHUNKED, number=1, seed=3)
    decode = model.tokenizer.decode
    for rows, with_document in ((batch.student, False), (batch.teacher, True)):
        prompts = Prompts.of(rows)
        kinds = iter(prompts.kinds.tolist())
        for ids, mask, predicts, document in zip(*prompts[:3], prompts.document, strict=True):
            text = decode(ids[mask])
            question = text.split("\n\n")[-1].split("?")[0].removeprefix(model.layout.before_user) + "?"
            own_kinds = {next(kinds) for _ in range(int(predicts.sum()))}
            answer = decode(ids[1:][predicts[:-1]])
            (kind,) = (QUESTION_KINDS[kind] for kind in own_kinds)
            prefix = rows.ids[document][rows.segments[document] == 0]
            about = with_document and kind in ("document", "unanswerable")
            context = decode(prefix).removeprefix(model.layout.before_user) if about else None
            assert answer.endswith(model.layout.after_answer)
            assert text == model.layout.prompt(question, context) + answer
        assert torch.equal(prompts.targets, rows.targets()[rows.target_kind >= 0])
        assert next(kinds, None) is None


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("num_joined, ridge", [([1, 1], None), ([1, 3], None), ([1, 3], 2.0)])
@pytest.mark.parametrize("per_token", [True, False])
def test_packed_step_equals_padded_step_in_every_gradient(make_doc_to_lora, attention, num_joined, ridge, per_token):
    """By blocks, and with a mask over whole rows; adapters of several chunks, also of several documents."""
    model = make_doc_to_lora()
    model.trained_joining = Joining() if ridge is None else Joining("ridge", ridge=ridge)
    model.base_model.set_attn_implementation(attention)
    (batch,) = make_batches(model, {**CHUNKED, "num_joined_documents": num_joined}, number=1, seed=1)
    assert len(set(batch.chunk_counts)) > 2 and (num_joined == [1, 1]) == all(len(m) == 1 for m in batch.members)
    names, parameters = zip(*model.hypernetwork.named_parameters(), strict=True)
    results = []
    for method in (Ours(model), Padded(model, per_token=per_token)):
        results.append(loss_and_gradients(method, method.prepare(batch), parameters, device="cpu", dtype=torch.float32))
    (loss, gradients), (other_loss, others) = results
    assert loss.item() == pytest.approx(other_loss.item(), rel=1e-5)
    for name, own, other in zip(names, gradients, others, strict=True):
        assert own.norm() > 0, name
        assert (own - other).abs().max() <= 1e-5 * own.abs().max(), name


@pytest.mark.parametrize("name", METHODS)
def test_training_methods_leave_base_model_plain(shipped, name):
    (batch,) = make_batches(shipped, CHUNKED, number=1, seed=1)
    ids = batch.chunk_ids[:1]
    before = shipped.base_model(ids).logits
    method = METHODS[name](shipped)
    parameters = list(shipped.hypernetwork.parameters())
    loss_and_gradients(method, method.prepare(batch), parameters, device="cpu", dtype=torch.float32)
    assert torch.equal(shipped.base_model(ids).logits, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_shipped_model_takes_the_same_step_in_both_precisions(shipped, dtype):
    (batch,) = make_batches(shipped, CHUNKED, number=1, seed=2)
    for name in ("padded_per_token", "padded_per_question"):
        found = difference([Ours(shipped), METHODS[name](shipped)], batch, shipped, device="cpu", dtype=dtype)
        assert found < TOLERANCE[dtype] / 3


def test_method_with_another_step_is_not_timed(shipped, monkeypatch):
    class Wrong(Padded):
        def loss(self, prepared):
            return 1.01 * super().loss(prepared)

    monkeypatch.setitem(METHODS, "padded_per_token", lambda model: Wrong(model, per_token=True))
    with pytest.raises(ValueError, match="padded_per_token does not take our step in stage_1.*0.01.*Nothing is timed"):
        next(measure(small(), shipped, device="cpu", dtype=torch.float32))


# What is measured


def test_stages_have_the_same_documents_in_one_or_eight_chunks(shipped):
    cfg = settings()
    one, many = (make_batches(shipped, dict(stage), number=2, seed=0) for stage in cfg.stages.values())
    for a, b in zip(one, many, strict=True):
        assert torch.equal(a.teacher.ids, b.teacher.ids)
        assert set(a.chunk_counts) == {1} and max(b.chunk_counts) > 6
        assert b.teacher.positions.max() < shipped.base_model.config.max_position_embeddings


def test_training_speed_rows_make_the_table(make_doc_to_lora, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(training_speed, "build_model", lambda *_, **__: make_doc_to_lora())
    output = tmp_path / "speed.jsonl"
    main.__wrapped__(small(f"output={output}"))
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert [(row["stage"], row["method"]) for row in rows] == [(s, m) for s in ("stage_1", "stage_2") for m in METHODS]
    for row in rows:
        assert row["runs"] == 3 and len(row["context_tokens"]) == len(row["chunks"]) == 2 and row["difference"] < 1e-4
        assert 0 < row["p20_s"] <= row["p50_s"] <= row["p80_s"] and row["peak_mib"] > 1
        rate = row["p50_context_tokens_per_s"] * row["p50_s"]
        assert 0.5 * min(row["context_tokens"]) < rate < 2 * max(row["context_tokens"])
        assert row["run"]["commit"] and row["dtype"] == "float32" and row["run"]["config"]["batches"] == 2
    assert all(row["p50_times_ours"] == row["peak_times_ours"] == 1 for row in rows if row["method"] == "ours")
    assert markdown(rows) in capsys.readouterr().out


def test_training_method_out_of_memory_is_a_result(shipped, monkeypatch):
    class Large(Padded):
        def prepare(self, batch):
            self.is_check = len(batch.student.ids) < 3
            return super().prepare(batch)

        def loss(self, prepared):
            if self.is_check:
                return super().loss(prepared)
            raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setitem(METHODS, "padded_per_token", lambda model: Large(model, per_token=True))
    monkeypatch.setattr(training_speed, "CHECKED_DOCUMENTS", 2)
    cfg = small("methods=[ours,padded_per_token]", "stages.stage_1.batch_size=3", "stages.stage_2.batch_size=3")
    rows = list(measure(cfg, shipped, device="cpu", dtype=torch.float32))
    assert [row["out_of_memory"] for row in rows] == [False, True] * 2
    assert markdown(rows).count("out of memory") == 2


def test_hypernetwork_is_compiled_as_in_training(monkeypatch):
    model, compiled = build_model("tiny", device="cpu"), []
    monkeypatch.setattr(training_speed, "build_model", lambda *_, **__: model)

    def measured(cfg, measured_model, **_):
        assert measured_model is model and model.hypernetwork._compiled_call_impl is not None
        compiled.append(cfg.compile)
        yield from ()

    monkeypatch.setattr(training_speed, "measure", measured)
    main.__wrapped__(small("compile=eager", "output=null"))
    assert compiled == ["eager"]


def test_quantiles_of_few_and_many_values():
    assert quantiles([2.0], "s") == {"p20_s": 2.0, "p50_s": 2.0, "p80_s": 2.0}
    assert quantiles(range(101), "s") == {"p20_s": 20, "p50_s": 50, "p80_s": 80}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model=gpt-5", "model should be one of tiny, gemma-2-2b, got 'gpt-5'"),
        ("methods=[ours,magic]", "methods should be a list, each one of ours, padded_per_token, "),
        ("methods=[padded_per_token]", "methods lacks ours"),
        ("dtype=int8", "dtype should be one of float32, bfloat16 or null, got 'int8'"),
        (
            "+stages.stage_1.batch=3",
            "There is no setting 'stages.stage_1.batch'. There are .*stages.stage_1.batch_size",
        ),
        ("stages.stage_1.batch_size=x", "stages.stage_1.batch_size should be a whole number, got 'x'"),
        ("compile=indctor", "torch.compile has no backend 'indctor'. Use one of: .*inductor"),
    ],
)
def test_training_speed_errors_are_one_line(override, message):
    with pytest.raises(SystemExit, match=f"benchmarks.training_speed: {message}"):
        main.__wrapped__(settings(override))


def test_model_of_another_shape_steps_in_mixed_precision(monkeypatch):
    from benchmarks import internalize_cost

    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 2100}
    shape |= {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "query_pre_attn_scalar": 16}
    monkeypatch.setattr(internalize_cost, "GEMMA_2_2B", internalize_cost.GEMMA_2_2B | shape)
    model = build_model("gemma-2-2b", device="cpu")
    assert {p.dtype for p in model.base_model.parameters()} == {torch.bfloat16}
    assert {(p.dtype, p.requires_grad) for p in model.hypernetwork.parameters()} == {(torch.float32, True)}
    assert torch.get_default_dtype() == torch.float32
    (batch,) = make_batches(model, CHUNKED, number=1, seed=1)
    methods = [Ours(model), Padded(model, per_token=True)]
    found = difference(methods, batch, model, device="cpu", dtype=torch.bfloat16)
    assert found < TOLERANCE[torch.bfloat16]


@pytest.mark.requires_gpu
def test_gemma_2_2b_shape_takes_same_step_on_a_gpu():
    model = build_model("gemma-2-2b", device="cuda")
    (batch,) = make_batches(model, {**CHUNKED, "batch_size": 2, "min_chunk_tokens": 25}, number=1, seed=1)
    methods = [Ours(model), Padded(model, per_token=True)]
    found = difference(methods, batch, model, device="cuda", dtype=torch.bfloat16)
    assert found < TOLERANCE[torch.bfloat16]
