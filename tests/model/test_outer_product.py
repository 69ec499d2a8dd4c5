"""OuterProduct: the delta against a loop over tokens, forward and every gradient; its zero start, sums and learning."""

import copy

import pytest
import torch

from hypernet.base.targets import LoRATarget
from hypernet.model.outer_product import OuterProduct
from hypernet.model.streaming import read_chunks

LAYERS, RANK, D, H, T = 3, 2, 5, 4, 7
TARGETS = [
    LoRATarget("down_proj", ("a", "b", "c"), 11, 7),
    LoRATarget("up_proj", ("d", None, "f"), 7, 13, widths=((7, 13), None, (3, 9))),
]
LENGTHS = (7, 1, 3)
SETTINGS = {"rank": 2, "aggregator": {"name": "outer_product", "inner_dim": 5}}


def make(targets=TARGETS, *, start=False) -> OuterProduct:
    torch.manual_seed(0)
    generator = OuterProduct(targets, feature_dim=D, rank=RANK, inner_dim=H).double()
    if not start:
        with torch.no_grad():
            for parameter in generator.parameters():
                parameter += 0.3 * torch.randn_like(parameter)
    return generator


def batch(num_maps=LAYERS) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    mask = torch.arange(T) < torch.tensor(LENGTHS)[:, None]
    return torch.randn(len(LENGTHS), num_maps, T, D, dtype=torch.float64), mask


def slow_delta(generator: OuterProduct, tokens, name, layer):
    """The delta [d_out, d_in] that these tokens [T, D] write: outer products, summed one by one, then projected."""
    total, mixed = 0, list(generator.queries[name][layer])
    for token in tokens:
        gate, key, value = (token @ part[name][layer] for part in (generator.gates, generator.keys, generator.values))
        total = total + torch.outer(key, value)
        mixed = [row + gate[r] * key for r, row in enumerate(mixed)]
    delta = 0
    for row in mixed:
        direction = row / row.square().sum().sqrt()
        written = direction @ total
        written = written / written.square().sum().sqrt()
        delta = delta + torch.outer(written @ generator.out_B[name][layer], direction @ generator.out_A[name][layer])
    return delta


@pytest.mark.parametrize("num_maps", [1, LAYERS])
def test_delta_and_every_gradient_equal_a_loop_over_tokens(num_maps):
    generator = make()
    features, mask = batch(num_maps)
    features.requires_grad_()
    A, B = generator(features, mask)
    got, expected = [], []
    for target in TARGETS:
        assert A[target.name].shape == (len(LENGTHS), LAYERS, RANK, target.d_in)
        assert B[target.name].shape == (len(LENGTHS), LAYERS, RANK, target.d_out)
        for place in target.modules():
            for chunk, length in enumerate(LENGTHS):
                a, b = A[target.name][chunk, place.layer], B[target.name][chunk, place.layer]
                assert not a[:, place.d_in :].any() and not b[:, place.d_out :].any()
                got.append((b.mT @ a)[: place.d_out, : place.d_in])
                tokens = features[chunk, place.layer if num_maps > 1 else 0, :length]
                delta = slow_delta(generator, tokens, target.name, place.layer)
                expected.append(delta[: place.d_out, : place.d_in])
                torch.testing.assert_close(got[-1], expected[-1])
    inputs = {k: v for k, v in generator.named_parameters() if not k.startswith("bias_")} | {"features": features}
    directions = [torch.randn_like(delta) for delta in got]
    gradients, expected_gradients = (
        torch.autograd.grad(sum((x * d).sum() for x, d in zip(deltas, directions, strict=True)), inputs.values())
        for deltas in (got, expected)
    )
    for name, got_gradient, wanted in zip(inputs, gradients, expected_gradients, strict=True):
        torch.testing.assert_close(got_gradient, wanted, msg=lambda m, name=name: f"{name}: {m}")


def test_padding_is_never_read_and_chunks_are_independent():
    generator, (features, mask) = make(), batch()
    expected = generator(features, mask)
    poisoned = generator(features.masked_fill(~mask[:, None, :, None], float("nan")), mask)
    order = torch.tensor([2, 0, 1])
    permuted = generator(features[order], mask[order])
    holes = torch.randperm(T)  # a sum over tokens does not know their order, nor where the padding stands
    shuffled = generator(features[:, :, holes], mask[:, holes])
    for side, wanted in enumerate(expected):
        for name in wanted:
            assert torch.equal(poisoned[side][name], wanted[name])
            torch.testing.assert_close(permuted[side][name], wanted[name][order])
            torch.testing.assert_close(shuffled[side][name], wanted[name])
            for chunk, length in enumerate(LENGTHS):
                alone = generator(features[chunk : chunk + 1, :, :length], mask[chunk : chunk + 1, :length])
                torch.testing.assert_close(alone[side][name][0], wanted[name][chunk])


def test_b_starts_at_zero_and_a_at_lora_scale():
    targets = [LoRATarget("down_proj", ("a", "b", "c"), 300, 70)]
    generator = make(targets, start=True)
    A, B = generator(*batch())
    assert not B["down_proj"].any() and not generator.bias_B["down_proj"].any()
    assert 0.5 < A["down_proj"].std() * 300**0.5 < 2
    assert torch.equal(A["down_proj"][0], A["down_proj"][1])  # one A for all chunks, until the gates have learned
    assert 0 < generator.bias_A["down_proj"].std() < 0.5 * A["down_proj"].std()


def test_all_but_the_bias_block_learn_from_the_second_step():
    """W_B has a gradient at the zero start, and once it has moved, so has everything that it reads."""
    generator, (features, mask) = make(TARGETS[:1], start=True), batch()
    optimizer = torch.optim.SGD(generator.parameters(), lr=0.1)
    for step, still in enumerate([{"queries", "gates", "keys", "values", "out_A"}, set()]):
        optimizer.zero_grad()
        A, B = generator(features, mask)
        (A["down_proj"].mT @ B["down_proj"] - 1).square().sum().backward()
        without = {n.split(".")[0] for n, p in generator.named_parameters() if p.grad is None or not p.grad.any()}
        assert without - {"bias_A", "bias_B"} == still, step
        optimizer.step()


def test_generated_matrices_of_a_layer_are_contiguous():
    A, B = make(TARGETS[:1])(*batch())
    assert all(matrices["down_proj"][:, 1].is_contiguous() for matrices in (A, B))


def test_outer_product_refuses_inner_dim_below_one():
    with pytest.raises(ValueError, match="inner_dim must be at least 1, got 0"):
        OuterProduct(TARGETS, feature_dim=D, rank=RANK, inner_dim=0)


# In the whole path

TEXT = "Norbach was founded by Ilda Renwick. It makes tin boxes and carved combs. The firm employs 312 people. " * 2


def test_document_delta_is_the_sum_of_chunks_and_bias_block(make_doc_to_lora):
    model = make_doc_to_lora(hypernetwork=SETTINGS)
    model.hypernetwork.double()
    adapter = model.internalize(TEXT)
    assert adapter.num_chunks > 2
    A, B = adapter.concatenated()["down_proj"]
    chunk = model.chunk(TEXT)
    head = model.hypernetwork.lora_head
    for layer in range(A.shape[0]):
        expected = head.bias_B["down_proj"][layer].mT @ head.bias_A["down_proj"][layer]
        for ids, mask in zip(chunk.ids, chunk.mask, strict=True):
            length = int(mask.sum())
            tokens = model.context_encoder(ids[None, :length], mask[None, :length])[0, layer].double()
            expected = expected + slow_delta(head, tokens, "down_proj", layer)
        torch.testing.assert_close(B[layer].mT @ A[layer], expected, rtol=1e-4, atol=1e-5)


def test_untrained_outer_product_keeps_base_model_bit_equal(make_doc_to_lora, tiny_base_model):
    model = make_doc_to_lora(trained=False, hypernetwork=SETTINGS, target_modules=["down_proj", "q_proj"])
    ids = torch.tensor([model.tokenizer(TEXT)["input_ids"][:50]])
    with torch.no_grad(), model.injector.using(model.internalize(TEXT)):
        assert torch.equal(model.base_model(ids).logits, tiny_base_model(ids).logits)


@pytest.mark.parametrize(
    "encoder", [{"kind": "per_layer_activations"}, {"kind": "early_exit", "layer_idx": 1}], ids=lambda e: e["kind"]
)
@pytest.mark.parametrize("max_batch_tokens", [1, 60, 10_000])
def test_layer_and_batch_streaming_agree_with_all_at_once(make_doc_to_lora, encoder, max_batch_tokens):
    settings = {**SETTINGS, "standardize_features": True}
    model = make_doc_to_lora(hypernetwork=settings, context_encoder=encoder, target_modules=["q_proj", "down_proj"])
    model.double()
    chunk = model.chunk(TEXT)
    model.hypernetwork.calibrate([(model.context_encoder(chunk.ids, chunk.mask), chunk.mask)])
    rows = list(zip(chunk.ids, chunk.mask, strict=True))
    streamed = read_chunks(rows, model.context_encoder, model.hypernetwork, max_batch_tokens=max_batch_tokens)
    with torch.no_grad():
        at_once = model.adapt(chunk.ids, chunk.mask)
    for mine, theirs in zip(streamed, at_once, strict=True):
        for name in ("q_proj", "down_proj"):
            torch.testing.assert_close(mine[name], theirs[name])


def test_a_few_steps_teach_each_documents_answer(make_doc_to_lora):
    model = make_doc_to_lora(trained=False, hypernetwork=SETTINGS)
    wanted = copy.deepcopy(model.base_model.state_dict())
    rows = [model.chunk(text) for text in ("Norbach makes tin boxes.", "Vel.")]
    width = max(row.ids.shape[1] for row in rows)
    ids, mask = (
        torch.cat([torch.nn.functional.pad(part, (0, width - part.shape[1])) for part in parts])
        for parts in ([row.ids for row in rows], [row.mask for row in rows])
    )
    question, answers = torch.tensor([[7, 9, 11], [7, 9, 11]]), torch.tensor([21, 34])  # only the document decides
    optimizer = torch.optim.AdamW(model.hypernetwork.parameters(), lr=1e-2)
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        model.activate(*model.adapt(ids, mask), [1, 1])
        logits = model.base_model(question).logits[:, -1]
        loss = torch.nn.functional.cross_entropy(logits, answers)
        loss.backward()
        model.injector.clear()
        optimizer.step()
        losses.append(loss.item())
    # A frozen random head bounds the logits, so the loss cannot come near zero.
    assert losses[-1] < losses[0] - 2
    assert (logits.argmax(-1) == answers).all()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in model.base_model.state_dict().items())
