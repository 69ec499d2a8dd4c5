"""read_chunks: the same matrices as all at once, in bounded memory, when memory runs out; to the bit in passes."""

import pytest
import torch

from hypernet.model.streaming import read_chunks, read_in_passes

TEXT = "Norbach is a town. " + "Ilda Renwick founded the mill in 1807, and it still stands by the river. " * 9


def rows_of(model, *texts):
    chunks = [model.chunk(text) for text in texts]
    return [(ids, mask) for chunk in chunks for ids, mask in zip(chunk.ids, chunk.mask, strict=True)]


ENCODERS = [
    {"kind": "per_layer_activations"},
    {"kind": "early_exit", "layer_idx": 1},
    {"kind": "embed_only"},
    {"kind": "per_layer_activations", "context_tokens": 5},
    {"kind": "per_layer_activations", "concat_layer": 1},
]


@pytest.mark.parametrize("encoder", ENCODERS, ids=lambda encoder: "-".join(map(str, encoder.values())))
@pytest.mark.parametrize("names", [["down_proj"], ["q_proj", "down_proj"]], ids=len)
@pytest.mark.parametrize("max_batch_tokens", [1, 60, 10_000])
def test_layer_and_batch_streaming_agree_with_all_at_once(make_doc_to_lora, encoder, names, max_batch_tokens):
    model = make_doc_to_lora(context_encoder=encoder, target_modules=names)
    # In double precision: unit rms makes the rounding of this model's small embeddings large.
    model.double()
    rows = rows_of(model, TEXT, "A short one.")
    streamed = read_chunks(rows, model.context_encoder, model.hypernetwork, max_batch_tokens=max_batch_tokens)
    width = max(len(ids) for ids, _ in rows)
    ids, mask = (
        torch.stack([torch.nn.functional.pad(row[i], (0, width - len(row[i]))) for row in rows]) for i in (0, 1)
    )
    with torch.no_grad():
        at_once = model.adapt(ids, mask)
    for mine, theirs in zip(streamed, at_once, strict=True):
        assert mine.keys() == theirs.keys() == set(names)
        for name in names:
            torch.testing.assert_close(mine[name], theirs[name])
            assert mine[name][:, 0].is_contiguous() and not mine[name].requires_grad


@pytest.mark.parametrize("max_batch_tokens, expected", [(1, "h0h"), (1000, "0h")])
def test_features_are_used_before_the_next_block_runs(make_doc_to_lora, max_batch_tokens, expected):
    model = make_doc_to_lora()
    order = []
    blocks = model.base_model.model.layers
    blocks[0].register_forward_hook(lambda *_: order.append("0"))
    model.hypernetwork.register_forward_hook(lambda *_: order.append("h"))
    rows = rows_of(model, "A short one.")
    read_chunks(rows, model.context_encoder, model.hypernetwork, max_batch_tokens=max_batch_tokens)
    assert "".join(order) == expected


@pytest.mark.parametrize("max_batch_tokens, batches", [(1, [1] * 5), (60, [2, 2, 1]), (75, [2, 2, 1]), (10_000, [5])])
def test_streaming_batch_fits_budget_with_padding(make_doc_to_lora, max_batch_tokens, batches):
    model = make_doc_to_lora()
    sizes = []
    stream = model.context_encoder.stream
    model.context_encoder.stream = lambda ids, mask, read: (sizes.append(len(ids)), stream(ids, mask, read))
    chunks = [(torch.full((n,), 7), torch.ones(n, dtype=torch.bool)) for n in (30, 10, 30, 5, 20)]
    calls = []
    read_chunks(
        chunks,
        model.context_encoder,
        model.hypernetwork,
        max_batch_tokens=max_batch_tokens,
        progress=lambda done, total: calls.append((done, total)),
    )
    assert sizes == batches
    assert calls == [(sum(batches[:i]), 5) for i in range(len(batches) + 1)]


def failing(model, *, most_tokens, error):
    """Lets the encoder fail with more tokens than that; gives the list of the sizes that it was asked for."""
    asked, stream = [], model.context_encoder.stream

    def limited(ids, mask, read):
        asked.append(ids.numel())
        if ids.numel() > most_tokens:
            stream(ids, mask, lambda *_: None)  # it fails somewhere on the way
            raise error
        stream(ids, mask, read)

    model.context_encoder.stream = limited
    return asked


OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    RuntimeError("[enforce fail at alloc_cpu.cpp:124] . DefaultCPUAllocator: can't allocate memory: you tried to ..."),
]


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=["gpu", "cpu"])
def test_out_of_memory_halves_the_budget_and_continues(make_doc_to_lora, error, caplog):
    model = make_doc_to_lora()
    rows = rows_of(model, TEXT)
    expected = read_chunks(rows, model.context_encoder, model.hypernetwork)
    longest = max(len(ids) for ids, _ in rows)
    asked = failing(model, most_tokens=2 * longest, error=error)
    done = []
    A, B = read_chunks(rows, model.context_encoder, model.hypernetwork, progress=lambda count, _: done.append(count))
    assert asked[0] > 2 * longest >= asked[-1] and done == sorted(done) and done[-1] == len(rows)
    assert "Out of memory with" in caplog.text
    for mine, theirs in zip((A, B), expected, strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=["gpu", "cpu"])
def test_a_chunk_that_does_not_fit_alone_is_one_line(make_doc_to_lora, error):
    model = make_doc_to_lora()
    failing(model, most_tokens=3, error=error)
    with pytest.raises(
        MemoryError, match=r"one chunk of \d+ tokens does not fit on cpu .*Lower max_chunk_tokens"
    ) as caught:
        read_chunks(rows_of(model, TEXT), model.context_encoder, model.hypernetwork)
    assert "\n" not in str(caught.value)


def test_streaming_reraises_other_errors(make_doc_to_lora):
    model = make_doc_to_lora()
    failing(model, most_tokens=3, error=RuntimeError("shape mismatch"))
    with pytest.raises(RuntimeError, match="shape mismatch"):
        read_chunks(rows_of(model, TEXT), model.context_encoder, model.hypernetwork)


@pytest.mark.parametrize("budget", [0, -3, 2.5, True])
def test_token_budget_below_one_is_refused(make_doc_to_lora, budget):
    model = make_doc_to_lora()
    with pytest.raises(ValueError, match=f"max_batch_tokens should be a whole number, at least 1, got {budget}"):
        read_chunks(rows_of(model, "A."), model.context_encoder, model.hypernetwork, max_batch_tokens=budget)


@pytest.mark.parametrize("encoder", ENCODERS, ids=lambda encoder: "-".join(map(str, encoder.values())))
@pytest.mark.parametrize("pass_chunks", [2, 7])
def test_chunk_in_passes_depends_on_no_other(make_doc_to_lora, encoder, pass_chunks):
    model = make_doc_to_lora(context_encoder=encoder)
    parts = model.context_encoder, model.hypernetwork
    rows = rows_of(model, TEXT, "A short one.", *(f"Sentence number {n} is short." for n in range(15)))
    told: list[tuple[int, int]] = []
    together = read_in_passes(rows, *parts, pass_chunks=pass_chunks, progress=lambda *done: told.append(done))
    assert told == sorted(told) and told[-1] == (len(rows), len(rows))
    expected = read_chunks(rows, *parts)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)).tolist()
    permuted = read_in_passes([rows[place] for place in order], *parts, pass_chunks=pass_chunks)
    for whole, plain, mixed in zip(together, expected, permuted, strict=True):
        torch.testing.assert_close(whole["down_proj"], plain["down_proj"], rtol=1e-3, atol=1e-4)
        assert torch.equal(whole["down_proj"][order], mixed["down_proj"])
    for place in (0, 9, len(rows) - 1):
        alone = read_in_passes(rows[place : place + 1], *parts, pass_chunks=pass_chunks)
        for one, of in zip(alone, together, strict=True):
            assert torch.equal(one["down_proj"][0], of["down_proj"][place])


@pytest.mark.parametrize("pass_chunks", [1, 2.0, True])
def test_pass_has_at_least_two_chunks(make_doc_to_lora, pass_chunks):
    model = make_doc_to_lora()
    with pytest.raises(ValueError, match="pass_chunks should be a whole number, at least 2"):
        model.internalize("One.", pass_chunks=pass_chunks)
