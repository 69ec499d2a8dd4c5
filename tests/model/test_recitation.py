"""Recitation against loops in float64; chunks read while their rows act; questions find their chunk; it is learned."""

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, LlamaConfig

from hypernet.base.targets import find_targets
from hypernet.model.context_encoder import drop_context, make_context_encoder
from hypernet.model.hypernetwork import HyperNetwork
from hypernet.model.recitation import Recitation, place_gains, placed
from hypernet.model.streaming import read_and_write, read_chunks, read_in_passes
from tests.recited_model import DOCUMENT, OTHERS, calibrated_model

LAYERS, KEYS, RANK, D, WIDTH = 5, 2, 4, 8, 12


def make_base_model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40, hidden_size=D, intermediate_size=WIDTH, num_hidden_layers=LAYERS, num_attention_heads=2,
        num_key_value_heads=1, pad_token_id=0, tie_word_embeddings=True, initializer_range=0.4,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)


def make(base_model, **sizes):
    torch.manual_seed(1)
    encoder = make_context_encoder(base_model, {"kind": "recited"})
    aggregator = {"name": "recitation", "num_key_layers": KEYS, "key_dim": 7, **sizes}
    network = HyperNetwork(
        targets=find_targets(base_model, ["down_proj"]), feature_dim=encoder.feature_dim, num_maps=encoder.num_maps,
        rank=RANK, scaling=1.0, bias_block=False, aggregator=aggregator,
    )  # fmt: skip
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return encoder, network


def batch(lengths=(7, 4, 5), before=3):
    """Ids and mask: `before` tokens of a prompt, of which the last is read, the chunk, and what ends the answer."""
    torch.manual_seed(2)
    width = before + max(lengths) + 1
    ids = torch.randint(1, 40, (len(lengths), width))
    ids[:, :before] = torch.arange(1, before + 1)
    place = torch.arange(width)
    mask = (place >= before - 1) & (place < before + torch.tensor(lengths)[:, None] + 1)
    return ids, mask


def calibrated(encoder, network):
    batches = [batch((7, 4, 5)), batch((3, 6))]
    network.calibrate(drop_context(encoder(ids, mask), mask) for ids, mask in batches)
    return network


def test_places_are_spread_and_no_layer_holds_one_twice():
    for num_places in (1, 5, 17, 24, 40):
        layers = placed(num_places, 6, 4, 3)
        rows = [[place for place in row if place >= 0] for row in layers]
        assert all(len(row) == 4 for row in layers) and all(len(set(row)) == len(row) for row in rows)
        counts = [sum(place in row for row in rows) for place in range(num_places)]
        assert max(counts) <= 3
        if num_places <= 24:
            assert min(counts) >= 1


def test_statistics_equal_those_of_all_tokens():
    encoder, network = make(make_base_model())
    calibrated(encoder, network)
    x = []
    for ids, mask in (batch((7, 4, 5)), batch((3, 6))):
        features, own = drop_context(encoder(ids, mask), mask)
        x.append(features[..., :WIDTH].transpose(1, 2)[own].double())
    x = torch.cat(x)  # [tokens, L, d_in]
    std = x.std(0, correction=0)
    std = std + 0.1 * std.mean(-1, keepdim=True)
    torch.testing.assert_close(network.recitation.input_std.double(), std, rtol=1e-4, atol=1e-6)
    for layer in range(KEYS):
        z = (x[:, layer] - x[:, layer].mean(0)) / std[layer]
        eigenvalues, vectors = torch.linalg.eigh(z.T @ z / len(z))
        P = vectors[:, -7:] * (eigenvalues[-7:].clamp(min=0) + 0.05).rsqrt() / std[layer][:, None]
        got = network.recitation.metric[layer].double()
        torch.testing.assert_close(got @ got.T, P @ P.T, rtol=1e-3, atol=1e-4)


def slow(network, features, mask, added=None):
    """A and B of one chunk's features [L, T, D], loop by loop, in float64; what the reader adds to each token's key."""
    part: Recitation = network.recitation
    count = int(mask.sum())
    features = features[:, :count].double()
    A, B = torch.zeros(LAYERS, RANK, WIDTH).double(), torch.zeros(LAYERS, RANK, D).double()
    table = placed(count - 1, LAYERS - KEYS, RANK, part.max_copies)
    for layer in range(LAYERS):
        x, state, direction = features[layer].split([WIDTH, D, D], dim=-1)
        if layer < KEYS:
            P = part.metric[layer].double()
            for token in range(count - 2):
                if token % KEYS == layer and token // KEYS < RANK:
                    k = P.T @ (x[1 + token] - part.input_mean[layer].double())
                    k = k / k.norm()
                    if added is not None:
                        k = k + added[token]
                        k = k / k.norm()
                        k = k + k @ part.key_maps[layer].double()
                    A[layer, token // KEYS] = P @ k
            continue
        std = part.input_std[layer].double()
        Z = x[: count - 1] / std
        gram = Z @ Z.T
        inverse = torch.linalg.inv(gram + part.ridge * gram.diagonal().mean() * torch.eye(count - 1).double())
        typical = state[: count - 1].norm(dim=-1).median()
        for row, place in enumerate(table[layer - KEYS]):
            if place < 0:
                continue
            A[layer, row] = inverse[place] @ Z / std
            h = state[place] / state[place].norm()
            V, S = (p[layer - KEYS].double() for p in (part.values, part.states))
            gain = part.log_gain[layer - KEYS].double().exp()
            B[layer, row] = typical * gain * (direction[place] @ V + h @ S)
    return A, B


def test_rows_and_every_gradient_equal_loops_in_float64():
    encoder, network = make(make_base_model())
    calibrated(encoder, network)
    ids, mask = batch()
    features, own = drop_context(encoder(ids, mask), mask)
    A, B = (part["down_proj"] for part in network(features, own))
    expected = [slow(network, features[c], own[c]) for c in range(len(ids))]
    for c, (slow_A, slow_B) in enumerate(expected):
        torch.testing.assert_close(A[c].double(), slow_A, rtol=2e-3, atol=2e-4)
        torch.testing.assert_close(B[c].double(), slow_B, rtol=2e-3, atol=2e-4)
    weight = torch.randn_like(B)
    trained = [network.recitation.values, network.recitation.states, network.recitation.log_gain]
    got = torch.autograd.grad((weight * B).sum(), trained)
    wanted = torch.autograd.grad(
        sum((weight[c].double() * rows).sum() for c, (_, rows) in enumerate(expected)), trained
    )
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-3, atol=2e-4)


def test_a_row_answers_at_its_own_place_alone():
    encoder, network = make(make_base_model(), ridge=1e-4)
    calibrated(encoder, network)
    ids, mask = batch((6,))
    features, own = drop_context(encoder(ids, mask), mask)
    A = network(features, own)[0]["down_proj"][0]
    for layer in range(KEYS, LAYERS):
        answers = features[0, layer, :7, :WIDTH] @ A[layer].T  # [places, R]
        for row, place in enumerate(placed(7, LAYERS - KEYS, RANK, network.recitation.max_copies)[layer - KEYS]):
            wanted = F.one_hot(torch.tensor(place), 7).float() if place >= 0 else torch.zeros(7)
            torch.testing.assert_close(answers[:, row], wanted, atol=0.1, rtol=0)


def test_rows_act_while_later_layers_are_read():
    """Every layer's features are those of a pass in which the rows of the layers before are injected."""
    from hypernet.adapters.injection import LoRAInjector

    base_model = make_base_model()
    encoder, network = make(base_model)
    calibrated(encoder, network)
    ids, mask = batch()
    with torch.no_grad():
        A, B = read_and_write(ids, mask, encoder, network)
    plain, _ = network(*drop_context(encoder(ids, mask), mask))
    assert (A["down_proj"][:, -1] - plain["down_proj"][:, -1]).abs().max() > 1e-3
    injector = LoRAInjector(base_model, network.targets, answers_only=True)
    for layer in range(KEYS, LAYERS):
        earlier = {"down_proj": B["down_proj"].clone()}
        earlier["down_proj"][:, layer:] = 0
        injector.set(A, earlier, [[c] for c in range(len(ids))], scaling=1.0)
        with injector.answering(mask):
            features, own = drop_context(encoder(ids, mask), mask)
        injector.clear()
        again, _ = network(features[:, layer : layer + 1], own, layers=slice(layer, layer + 1))
        torch.testing.assert_close(again["down_proj"][:, 0], A["down_proj"][:, layer], rtol=1e-3, atol=1e-4)


def test_reading_in_batches_gives_the_same_rows(monkeypatch):
    base_model = make_base_model()
    encoder, network = make(base_model)
    calibrated(encoder, network)
    ids, mask = batch()
    with torch.no_grad():
        A, B = read_and_write(ids, mask, encoder, network)
    rows = list(zip(ids, mask, strict=True))
    monkeypatch.setattr("hypernet.model.streaming.place_gains", torch.ones_like)  # in training there are none
    for tokens in (11, 4096):
        got_A, got_B = read_chunks(rows, encoder, network, max_batch_tokens=tokens)
        torch.testing.assert_close(got_A["down_proj"], A["down_proj"], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(got_B["down_proj"], B["down_proj"], rtol=1e-4, atol=1e-5)


def test_rows_of_several_readings_answer_in_each_of_them():
    """A against float64: 1 at its place in both readings, 0 elsewhere; B as of the first reading, times its gain."""
    encoder, network = make(make_base_model())
    part = calibrated(encoder, network).recitation
    ids, mask = batch((6, 4))
    features, own = drop_context(encoder(ids, mask), mask)
    features = torch.stack([features, features + 0.3 * torch.randn_like(features)], 2)  # [C, L, M, T, D]
    gains = 1 + torch.rand(own.shape)
    for layer in range(KEYS, LAYERS):
        A, B, found = part.saying(layer, features[:, layer], own, gains)
        x = features[:, layer, ..., :WIDTH] * F.pad(own[:, 1:], (0, 1))[:, None, :, None]
        torch.testing.assert_close(found, torch.einsum("cmti, cri -> cmtr", x, A), rtol=1e-3, atol=1e-4)
        plain = part.saying(layer, features[:, layer, :1], own)[1]
        for c, count in enumerate((7, 5)):  # places that say something
            Z = features[c, layer, :, :count, :WIDTH].double().flatten(0, 1) / part.input_std[layer].double()
            gram = Z @ Z.T
            gram += part.ridge * gram.diagonal().mean() * torch.eye(2 * count).double()
            for row, place in enumerate(placed(count, LAYERS - KEYS, RANK, part.max_copies)[layer - KEYS]):
                if place < 0:
                    assert not A[c, row].any() and not B[c, row].any()
                    continue
                wanted = F.one_hot(torch.tensor([place, count + place]), 2 * count).sum(0).double()
                expected = torch.linalg.solve(gram, wanted) @ Z / part.input_std[layer].double()
                torch.testing.assert_close(A[c, row].double(), expected, rtol=2e-3, atol=2e-4)
                torch.testing.assert_close(B[c, row], plain[c, row] * gains[c, place])


@pytest.fixture(scope="module")
def twice():
    """A tiny model that reads each chunk behind two questions, and its chunks of two documents."""
    model = calibrated_model((DOCUMENT, OTHERS), key_dim=32)
    settings = {**model.context_encoder.settings, "other_questions": ["When and where does it take place?"]}
    model.context_encoder = make_context_encoder(model.base_model, settings, model.tokenizer)
    return model, model.chunk(DOCUMENT + " " + OTHERS + " Yes.")


def test_a_reading_is_that_of_the_prompt_alone(twice):
    """What stands before the answer is read once for all; each reading equals one of the whole prompt."""
    model, chunks = twice
    encoder, plain = model.context_encoder, make_context_encoder(model.base_model, {"kind": "recited"})
    maps: list[torch.Tensor] = []
    states = encoder.stream(chunks.ids, chunks.mask, lambda _, features: maps.append(features))
    found = torch.stack(maps, 1).unflatten(0, (2, -1))
    assert encoder.num_readings == 2 and len(states) == 2 * len(chunks.ids)
    for reading, question in enumerate((encoder.question, *encoder.other_questions)):
        frame = encoder._frame(model.tokenizer, question)
        ids = torch.cat(
            [torch.tensor(frame.before[:-1]).expand(len(chunks.ids), -1), chunks.ids[:, encoder.unread :]], 1
        )
        mask = F.pad(chunks.mask[:, encoder.unread :], (len(frame.before) - 1, 0))
        wanted, own = drop_context(plain(ids, mask), mask)
        got, _ = drop_context(found[reading], chunks.mask[:, encoder.unread :])
        shown = own[:, None, :, None]
        torch.testing.assert_close(got * shown, wanted * shown, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(
        encoder(chunks.ids, chunks.mask)[:, :, encoder.unread :] * chunks.mask[:, None, encoder.unread :, None],
        found[0] * chunks.mask[:, None, encoder.unread :, None],
    )


def test_margins_are_the_least_of_all_readings(twice):
    model, chunks = twice
    encoder, mask = model.context_encoder, chunks.mask[:, model.context_encoder.unread :]
    states = encoder.stream(chunks.ids, chunks.mask, lambda *_: None)
    margins = encoder.margins(states, chunks.ids, chunks.mask)
    logits = model.base_model.get_output_embeddings()(states).unflatten(0, (2, -1))
    ids = chunks.ids[:, encoder.unread :]
    for c in range(len(ids)):
        for place in range(ids.shape[1]):
            if not mask[c, place] or place + 1 == ids.shape[1] or not mask[c, place + 1]:
                assert margins[c, place].isinf()
                continue
            token, least = int(ids[c, place + 1]), []
            for reading in logits[:, c, place].tolist():
                least.append(reading[token] - max(logit for t, logit in enumerate(reading) if t != token))
            assert margins[c, place] == pytest.approx(min(least), abs=1e-3)


def test_a_chunk_that_misses_a_token_is_read_again_with_gains(twice, monkeypatch):
    """Its rows are those of the same passes by hand; another chunk's, and all keys, are those of one pass."""
    model, chunks = twice
    rows, parts = list(zip(chunks.ids, chunks.mask, strict=True)), (model.context_encoder, model.hypernetwork)
    margins = torch.full((len(rows), chunks.ids.shape[1] - model.context_encoder.unread), 9.0)
    margins[1, 2], margins[1, 3], margins[2, 1] = -1.0, 2.0, 0.5
    left = chunks.mask[:, model.context_encoder.unread :]

    def given(states, ids, mask):
        own = [next(c for c, row in enumerate(chunks.ids) if torch.equal(row[: len(one)], one)) for one in ids]
        return margins[own][:, : ids.shape[1] - model.context_encoder.unread]

    monkeypatch.setattr(model.context_encoder, "margins", given)
    again = read_chunks(rows, *parts)
    monkeypatch.setattr("hypernet.model.streaming.place_gains", torch.ones_like)
    once = read_chunks(rows, *parts)
    A, B = (part["down_proj"] for part in again)
    assert [bool((B[c] - once[1]["down_proj"][c]).abs().max() > 1e-5) for c in range(3)] == [False, True, False]
    torch.testing.assert_close(A[:, :2], once[0]["down_proj"][:, :2])
    gains = place_gains(margins)
    assert gains[1, 2].item() == pytest.approx(1.75) and gains[1, 3].item() == pytest.approx(1.3)
    assert place_gains(torch.tensor([torch.inf, 4.0, 0.0, -4.0, -99.0])).tolist() == pytest.approx(
        [1, 1, 1.6, 2.2, 2.2]
    )
    # The first layer that says something reads what it read before, so that its rows are those times the gains.
    count, part = int(left[1].sum()) - 1, model.hypernetwork.recitation
    for row, place in enumerate(placed(count, part.num_layers - 2, part.rank, part.max_copies)[0]):
        if place >= 0:
            torch.testing.assert_close(B[1, 2, row], once[1]["down_proj"][1, 2, row] * gains[1, place])


def test_a_recitation_in_passes_depends_on_no_other_chunk(twice):
    model, chunks = twice
    rows, parts = list(zip(chunks.ids, chunks.mask, strict=True)), (model.context_encoder, model.hypernetwork)
    together = read_in_passes(rows, *parts, pass_chunks=4)
    plain = read_chunks(rows, *parts)
    for place in range(len(rows)):
        alone = read_in_passes(rows[place : place + 1], *parts, pass_chunks=4)
        for one, of, other in zip(alone, together, plain, strict=True):
            assert torch.equal(one["down_proj"][0], of["down_proj"][place])
            torch.testing.assert_close(other["down_proj"][place], of["down_proj"][place], rtol=1e-2, atol=1e-3)


def test_a_filler_of_a_pass_is_not_read_again(twice, monkeypatch):
    model, chunks = twice
    encoder, network = model.context_encoder, model.hypernetwork
    rows, passes = list(zip(chunks.ids, chunks.mask, strict=True))[:2], []
    stream, misses = encoder.stream, torch.tensor([1.0, 1.0, -1.0])  # the filler says something else, as it would

    def counted(ids, *given, **settings):
        passes.append(len(ids))
        return stream(ids, *given, **settings)

    monkeypatch.setattr(encoder, "stream", counted)
    monkeypatch.setattr(encoder, "margins", lambda states, ids, mask: misses[:, None].expand(-1, mask.shape[1]))
    width = {len(row) for row in read_in_passes(rows, encoder, network, pass_chunks=3)[0].values()}
    assert width == {2} and passes == [3]
    misses[1] = 0.0
    read_in_passes(rows, encoder, network, pass_chunks=3)
    assert passes == [3, 3, 3]


def test_rows_without_the_frame_or_tokenizer_are_refused(twice):
    model, chunks = twice
    with pytest.raises(ValueError, match="does not begin as the context encoder's frame has it"):
        model.context_encoder(chunks.ids[:, 1:], chunks.mask[:, 1:])
    with pytest.raises(ValueError, match="reads other_questions with the base model's tokenizer, got none"):
        make_context_encoder(model.base_model, {"kind": "recited", "other_questions": ["When?"]})
    with pytest.raises(ValueError, match="other_questions should be a list of texts, got 'When"):
        make_context_encoder(model.base_model, {"kind": "recited", "other_questions": "When?"}, model.tokenizer)


READER = {"width": 32, "num_blocks": 1, "dropout": 0.1}


def read_keys(network, features, mask):
    """What one chunk's reader adds, [tokens, K], in float64: attention and MLP behind norms, written out."""
    part, reader = network.recitation, network.recitation.key_reader
    count, block = int(mask.sum()) - 2, reader.blocks.layers[0]
    k = []
    for token in range(count):
        x = features[token % KEYS, 1 + token, :WIDTH].double() - part.input_mean[token % KEYS].double()
        k.append(F.normalize(x @ part.metric[token % KEYS].double(), dim=0))
    weights = {name: value.double() for name, value in reader.named_parameters()}
    own = {name.removeprefix("blocks.layers.0."): value for name, value in weights.items()}

    def norm(x, name, of=own):
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
        return x * of[f"{name}.weight"] + of[f"{name}.bias"]

    x = torch.stack([key @ weights["enter"][t % KEYS] + weights["places"][t] for t, key in enumerate(k)])
    q, k_, v = (norm(x, "norm1") @ own["self_attn.in_proj_weight"].T + own["self_attn.in_proj_bias"]).chunk(3, -1)
    attended = (q @ k_.T / 32**0.5).softmax(-1) @ v  # one head of 32
    x = x + attended @ own["self_attn.out_proj.weight"].T + own["self_attn.out_proj.bias"]
    inner = F.gelu(norm(x, "norm2") @ own["linear1.weight"].T + own["linear1.bias"])
    x = x + inner @ own["linear2.weight"].T + own["linear2.bias"]
    assert block.norm_first
    x = norm(x, "norm", weights)
    return torch.stack([row @ weights["leave"][t % KEYS] for t, row in enumerate(x)])


def test_learned_keys_and_every_gradient_equal_loops():
    encoder, network = make(make_base_model(), key_reader=READER)
    calibrated(encoder, network).eval()
    ids, mask = batch((7, 4, 1))
    features, own = drop_context(encoder(ids, mask), mask)
    A = network(features, own)[0]["down_proj"]
    expected = [slow(network, features[c], own[c], read_keys(network, features[c], own[c]))[0] for c in range(len(ids))]
    torch.testing.assert_close(A.double(), torch.stack(expected), rtol=2e-3, atol=2e-4)
    weight = torch.randn_like(A[:, :KEYS])
    part = network.recitation
    trained = [part.key_maps, *part.key_reader.parameters()]
    got = torch.autograd.grad((A[:, :KEYS] * weight).sum(), trained)
    wanted = torch.autograd.grad((torch.stack(expected)[:, :KEYS] * weight).sum(), trained)
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-2, atol=2e-4)


def test_keys_alone_are_those_of_the_whole():
    encoder, network = make(make_base_model(), key_reader=READER)
    calibrated(encoder, network).eval()
    ids, mask = batch()
    whole = read_and_write(ids, mask, encoder, network)[0]["down_proj"]
    alone = read_and_write(ids, mask, encoder, network, keys_only=True)[0]["down_proj"]
    assert alone.shape[1] == KEYS
    torch.testing.assert_close(alone, whole[:, :KEYS])
    with pytest.raises(ValueError, match="Keys need the first 2 layers together, got 1"):
        network(*drop_context(encoder(ids, mask)[:, :1], mask), layers=slice(0, 1))


def test_context_before_a_chunk_gets_no_row_and_changes_none():
    """A chunk behind tokens that its mask leaves out: the rows act on its own places alone."""
    encoder, network = make(make_base_model())
    calibrated(encoder, network)
    ids, mask = batch((5, 3))
    mask[:, 3:5] = False  # the first two tokens are context
    A, B = read_and_write(ids, mask, encoder, network)
    seen: list[torch.Tensor] = []

    def read(index, features):
        if index < KEYS:
            return None
        rows = network(*drop_context(features[:, None], mask), layers=slice(index, index + 1))
        for one, (made, _) in zip(rows, ((A, 0), (B, 0)), strict=True):
            seen.append((one["down_proj"][:, 0] - made["down_proj"][:, index]).abs().max())
        x = features[..., :WIDTH] * mask[..., None]
        return x @ A["down_proj"][:, index].mT @ B["down_proj"][:, index]

    with torch.no_grad():
        encoder.stream(ids, mask, read)
    assert len(seen) == 2 * (LAYERS - KEYS) and max(seen) < 1e-3


def test_chunks_read_by_length_come_back_in_their_order():
    encoder, network = make(make_base_model(), key_reader=READER)
    calibrated(encoder, network).eval()
    ids, mask = batch((7, 1, 5, 2, 2, 6, 3, 4, 7, 1, 5, 2, 6, 3, 1, 4, 2, 7, 5))
    together = read_and_write(ids, mask, encoder, network)
    for place in range(len(ids)):
        alone = read_and_write(ids[place : place + 1], mask[place : place + 1], encoder, network)
        for part, own in zip(together, alone, strict=True):
            torch.testing.assert_close(part["down_proj"][place], own["down_proj"][0], rtol=1e-4, atol=1e-5)


def test_an_untrained_reader_changes_no_key():
    base_model = make_base_model()
    encoder, plain = make(base_model)
    network = make(base_model, key_reader=READER)[1]
    with torch.no_grad():
        for parameter in (network.recitation.key_reader.leave, network.recitation.key_maps):
            parameter.zero_()
    ids, mask = batch()
    features = drop_context(encoder(ids, mask), mask)
    keys = [calibrated(encoder, one).eval()(*features)[0]["down_proj"][:, :KEYS] for one in (plain, network)]
    torch.testing.assert_close(*keys, rtol=1e-4, atol=1e-5)


def test_learned_weights_and_gains_count_in_a_match():
    base_model = make_base_model()
    encoder, network = make(base_model, key_reader=READER)
    calibrated(encoder, network).eval()
    ids, mask = batch((5, 5, 5))
    features, own = drop_context(encoder(ids, mask), mask)
    A = network(features, own)[0]["down_proj"]
    inputs = {layer: features[:, layer, 1:6, :WIDTH] for layer in range(KEYS)}
    asked = torch.tensor([[True] * 5, [True, True, False, True, False], [False, True, True, True, True]])
    part = network.recitation
    scores, closeness = part.match(inputs, asked, A)
    for q in range(3):
        total, near, weights = torch.zeros(3).double(), 0.0, 0.0
        for s in asked[q].nonzero()[:, 0].tolist():
            best, log_weight = torch.zeros(3).double(), torch.tensor(0.0).double()
            for layer in range(KEYS):
                x = inputs[layer][q, s].double() - part.input_mean[layer].double()
                z = x @ part.metric[layer].double()
                found = (A[:, layer].double() @ x).amax(1) / z.norm() * part.log_key_gain[layer].double().exp()
                best = torch.maximum(best, found)
                log_weight = log_weight + z / z.norm() @ part.token_weights[layer].double()
            total = total + log_weight.exp() * (best - best.mean()).clamp(min=1e-4) ** 1.5
            near, weights = near + log_weight.exp() * best.max(), weights + log_weight.exp()
        torch.testing.assert_close(scores[q].double(), total, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(closeness[q].double(), near / weights, rtol=1e-3, atol=1e-4)


def test_a_question_made_of_a_chunks_words_finds_it():
    base_model = make_base_model()
    encoder, network = make(base_model)
    calibrated(encoder, network)
    ids, mask = batch((5, 5, 5))
    features, own = drop_context(encoder(ids, mask), mask)
    A = network(features, own)[0]["down_proj"]
    inputs = {layer: features[:, layer, 1:6, :WIDTH] for layer in range(KEYS)}
    asked = torch.ones(3, 5, dtype=torch.bool)
    scores, closeness = network.recitation.match(inputs, asked, A)
    assert scores.argmax(1).tolist() == [0, 1, 2]
    # Each of its tokens is one of the keys, in one of the layers.
    torch.testing.assert_close(closeness, torch.ones(3), atol=1e-4, rtol=0)
    best = torch.zeros(3, 5, 3)
    for layer, x in inputs.items():
        part = network.recitation
        q = F.normalize((x - part.input_mean[layer]) @ part.metric[layer], dim=-1)
        k = torch.linalg.lstsq(part.metric[layer][None], A[:, layer].mT).solution.mT
        best = torch.maximum(best, torch.einsum("qsd, crd -> qscr", q, k).amax(-1))
    best = best.clamp(min=0)
    wanted = (best - best.mean(-1, keepdim=True)).clamp(min=1e-4).pow(1.5).sum(1)
    torch.testing.assert_close(scores, wanted, rtol=1e-3, atol=1e-4)


def test_training_makes_a_random_model_say_its_chunk():
    from hypernet.adapters.injection import LoRAInjector

    base_model = make_base_model()
    encoder, network = make(base_model)
    calibrated(encoder, network)
    injector = LoRAInjector(base_model, network.targets, answers_only=True)
    optimizer = torch.optim.Adam(network.parameters(), 0.03)
    ids, mask = batch()
    says = mask.clone()
    says[:, :-1] &= mask[:, 1:]
    says[:, -1] = False
    others = ids.clone()
    others[:, 0] = 30  # another question

    def loss(shift=0):
        A, B = read_and_write(ids, mask, encoder, network)
        injector.set(A, B, [[(c + shift) % 3] for c in range(3)], scaling=1.0)
        with injector.answering(says):
            logits = base_model(others).logits[says]
        injector.clear()
        return F.cross_entropy(logits, ids.roll(-1, 1)[says])

    start = loss().item()
    for _ in range(60):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    own, wrong = loss().item(), loss(1).item()
    assert own < 0.6 * start and own < 0.6 * wrong, (start, own, wrong)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"num_key_layers": LAYERS}, "num_key_layers=5"),
        ({"ridge": 0.0}, "ridge=0.0"),
        ({"key_dim": 0}, "key_dim=0"),
    ],
)
def test_sizes_that_do_not_fit_are_named(sizes, message):
    with pytest.raises(ValueError, match=message):
        make(make_base_model(), **sizes)


def test_a_chunk_beyond_its_rows_is_refused():
    encoder, network = make(make_base_model())
    calibrated(encoder, network)
    assert network.recitation.max_tokens == RANK * KEYS
    ids, mask = batch((RANK * KEYS + 1,))
    with pytest.raises(ValueError, match="Lower max_chunk_tokens"):
        network(*drop_context(encoder(ids, mask), mask))


def test_other_features_and_several_modules_are_refused():
    targets = find_targets(make_base_model(), ["down_proj"])
    with pytest.raises(ValueError, match="recited"):
        Recitation(targets, feature_dim=D, rank=RANK, num_key_layers=KEYS)
    with pytest.raises(ValueError, match="one module"):
        Recitation([*targets, *targets], feature_dim=WIDTH + 2 * D, rank=RANK, num_key_layers=KEYS)
