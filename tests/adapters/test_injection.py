"""LoRAInjector on a tiny random Llama: what it adds, what it leaves alone, generate, gradient checkpointing."""

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from hypernet.adapters.adapter import LoRAAdapter, new_provenance
from hypernet.adapters.injection import LoRAInjector
from hypernet.base.targets import LoRATarget, find_targets

NAMES = ("down_proj", "q_proj")
RANK, SCALING = 3, 1.5


@pytest.fixture
def base_model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=None,
    )
    model = LlamaForCausalLM(config).eval()
    for parameter in model.parameters():
        # The default init is so small that an adapter's effect would drown in the tolerance.
        parameter.data.mul_(4)
        parameter.requires_grad_(False)
    return model


@pytest.fixture
def targets(base_model):
    return find_targets(base_model, NAMES)


def random_blocks(targets, num_slots, seed):
    generator = torch.Generator().manual_seed(seed)

    def blocks(width):
        return {
            t.name: torch.randn(num_slots, len(t.paths), RANK, getattr(t, width), generator=generator) / 8
            for t in targets
        }

    return blocks("d_in"), blocks("d_out")


def make_adapter(targets, num_chunks, seed, *, bias=None, scaling=SCALING):
    A, B = random_blocks(targets, num_chunks, seed)
    bias_A, bias_B = bias or ({n: b[0] for n, b in blocks.items()} for blocks in random_blocks(targets, 1, seed=99))
    provenance = new_provenance([], generator="g", base_model_name="tiny", base_model_fingerprint="b")
    return LoRAAdapter(targets, A, B, bias_A, bias_B, scaling, provenance)


def merged_logits(base_model, adapter, ids, **kwargs):
    """Independent reference: the delta of every block added to the weights, then taken out again."""
    saved = {}
    for target in adapter.targets:
        for layer, path in enumerate(target.paths):
            weight = base_model.get_submodule(path).weight
            saved[path] = weight.detach().clone()
            n = target.name
            delta = adapter.bias_B[n][layer].T @ adapter.bias_A[n][layer]
            for chunk in range(adapter.num_chunks):
                delta = delta + adapter.B[n][chunk, layer].T @ adapter.A[n][chunk, layer]
            weight.data.add_(adapter.scaling * delta)
    logits = base_model(ids, **kwargs).logits
    for path, weight in saved.items():
        base_model.get_submodule(path).weight.data.copy_(weight)
    return logits


def token_ids(*shape, seed=0):
    return torch.randint(2, 61, shape, generator=torch.Generator().manual_seed(seed))


def test_injector_without_adapter_leaves_model_bit_identical(base_model, targets):
    ids = token_ids(3, 7)
    logits = base_model(ids).logits
    tree, state = (
        [name for name, _ in base_model.named_modules()],
        {k: v.clone() for k, v in base_model.state_dict().items()},
    )
    injector = LoRAInjector(base_model, targets)
    assert torch.equal(base_model(ids).logits, logits)
    with injector.using(None):
        assert torch.equal(base_model(ids).logits, logits)
    with injector.using([None, None, None]):
        assert torch.equal(base_model(ids).logits, logits)
    with injector.using(make_adapter(targets, 2, seed=1)):
        assert not torch.allclose(base_model(ids).logits, logits, atol=1e-2)
        assert [name for name, _ in base_model.named_modules()] == tree
        assert all(torch.equal(value, state[key]) for key, value in base_model.state_dict().items())
    assert list(base_model.state_dict()) == list(state)
    assert torch.equal(base_model(ids).logits, logits)


def test_idle_hook_returns_same_output_tensor(base_model, targets):
    LoRAInjector(base_model, targets)
    module = base_model.get_submodule(targets[0].paths[0])
    (hook,) = module._forward_hooks.values()
    assert hook(module, (torch.zeros(1, 48),), torch.zeros(1, 32)) is None


def test_injector_remove_restores_model(base_model, targets):
    logits = base_model(token_ids(2, 5)).logits
    injector = LoRAInjector(base_model, targets)
    injector._active = injector.pool(make_adapter(targets, 1, seed=1))
    injector.remove()
    assert torch.equal(base_model(token_ids(2, 5)).logits, logits)
    assert not any(module._forward_hooks for module in base_model.modules())


@pytest.mark.parametrize("num_chunks", [0, 1, 3])
def test_shared_adapter_equals_merged_weights(base_model, targets, num_chunks):
    adapter = make_adapter(targets, num_chunks, seed=1)
    injector = LoRAInjector(base_model, targets)
    for ids in (token_ids(1, 1), token_ids(3, 7)):
        expected = merged_logits(base_model, adapter, ids)
        with injector.using(adapter):
            torch.testing.assert_close(base_model(ids).logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rank", [1, 4, 6, 7])
def test_adapters_of_several_ranks_share_a_batch(base_model, targets, rank):
    from hypernet.adapters.composition import compress

    plain = make_adapter(targets, 3, seed=2)
    compressed, _ = compress(make_adapter(targets, 2, seed=1), rank)
    adapters = [plain, compressed, None, plain]
    ids = token_ids(4, 7)
    injector = LoRAInjector(base_model, targets)
    with injector.using(adapters):
        together = base_model(ids).logits
    for i, adapter in enumerate(adapters):
        with injector.using(adapter):
            torch.testing.assert_close(base_model(ids[i : i + 1]).logits[0], together[i], rtol=1e-4, atol=1e-4)


def gated_logits(base_model, adapter, ids, gate):
    """Independent reference: hooks that weight every chunk's delta by its score relative to the largest, in float64."""
    hooks = []
    for target in adapter.targets:
        for layer, path in enumerate(target.paths):
            blocks = [tensors[target.name][:, layer].double() for tensors in (adapter.A, adapter.B)]
            shared = [tensors[target.name][layer].double() for tensors in (adapter.bias_A, adapter.bias_B)]

            def add(_, inputs, output, blocks=blocks, shared=shared):
                x = inputs[0].double()
                delta = x @ shared[0].T @ shared[1]
                S = torch.stack([x @ A.T for A in blocks[0]])
                e = (S**2).sum(-1, keepdim=True)
                for weight, values, B in zip((e / e.amax(0)) ** gate, S, blocks[1], strict=True):
                    delta = delta + weight * values @ B
                return (output.double() + adapter.scaling * delta).to(output.dtype)

            hooks.append(base_model.get_submodule(path).register_forward_hook(add))
    logits = base_model(ids).logits
    for hook in hooks:
        hook.remove()
    return logits


@pytest.mark.parametrize("gate", [0.5, 2.0])
def test_gate_weights_chunks_by_score_and_not_the_bias_block(base_model, targets, gate):
    adapters = [make_adapter(targets, 3, seed=1), make_adapter(targets, 1, seed=2), make_adapter(targets, 2, seed=3)]
    ids = token_ids(4, 7)
    expected = [gated_logits(base_model, adapter, ids, gate) for adapter in adapters]
    plain = base_model(ids).logits
    injector = LoRAInjector(base_model, targets)
    with injector.using(adapters[0], gate_power=gate):
        torch.testing.assert_close(base_model(ids).logits, expected[0], rtol=1e-4, atol=1e-4)
    with injector.using(adapters[0]):
        assert not torch.allclose(base_model(ids).logits, expected[0], atol=1e-2)
    given = [adapters[2], None, adapters[0], adapters[1]]
    with injector.using(injector.pool(given, gate_power=gate)):
        logits = base_model(ids).logits
    for row, own in enumerate((expected[2], plain, expected[0], expected[1])):
        torch.testing.assert_close(logits[row], own[row], rtol=1e-4, atol=1e-4)


def test_gate_handles_adapters_without_chunks_or_bias_block(base_model, targets):
    none = [{t.name: torch.zeros(len(t.paths), 0, getattr(t, w)) for t in targets} for w in ("d_in", "d_out")]
    alone, empty = make_adapter(targets, 2, seed=1, bias=none), make_adapter(targets, 0, seed=2)
    ids = token_ids(2, 5)
    expected = gated_logits(base_model, alone, ids, 1.5)
    plain = base_model(ids).logits
    injector = LoRAInjector(base_model, targets)
    with injector.using([alone, empty]):
        ungated = base_model(ids).logits
    with injector.using([alone, empty], gate_power=1.5):
        logits = base_model(ids).logits
    torch.testing.assert_close(logits[0], expected[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logits[1], ungated[1])
    assert injector.pool(make_adapter(targets, 0, seed=2, bias=none), gate_power=1.5) is None
    with injector.using([None, None], gate_power=1.5):
        assert torch.equal(base_model(ids).logits, plain)


def test_gate_refuses_compressed_adapters(base_model, targets):
    from hypernet.adapters.composition import compress

    injector, adapter = LoRAInjector(base_model, targets), make_adapter(targets, 3, seed=1)
    with pytest.raises(ValueError, match="cannot be gated: compress"):
        injector.pool(compress(adapter, 2)[0], gate_power=1.0)
    separated = make_adapter(targets, 2, seed=1)
    separated.provenance["documents"].append({"sha256": "", "characters": 9, "chunks": [[0, 4], [4, 9]], "ridge": 2.0})
    with pytest.raises(ValueError, match="cannot be gated: version 0.1 separated its chunks"):
        injector.pool([separated, None], gate_power=1.0)
    narrow = make_adapter(targets, 2, seed=2)
    for blocks, axis in ((narrow.A, 2), (narrow.B, 2), (narrow.bias_A, 1), (narrow.bias_B, 1)):
        blocks.update({name: rows.narrow(axis, 0, RANK - 1) for name, rows in blocks.items()})
    with pytest.raises(ValueError, match=r"must agree in rank per chunk, got \[2, 3\]"):
        injector.pool([adapter, narrow], gate_power=1.0)
    for gate in (-1.0, float("nan")):
        with injector.using(adapter, gate_power=gate), pytest.raises(ValueError, match="gate should be a number of at"):
            base_model(token_ids(1, 3))


def test_pool_is_activated_repeatedly_without_copy(base_model, targets):
    adapters = [make_adapter(targets, 2, seed=1), make_adapter(targets, 1, seed=2)]
    ids = token_ids(2, 5)
    injector = LoRAInjector(base_model, targets)
    pools = [injector.pool(adapter) for adapter in adapters]
    assert injector.pool(None) is None and injector.pool([None, None]) is None
    for pool, adapter in 2 * list(zip(pools, adapters, strict=True)):
        with injector.using(pool):
            assert injector._active is pool
            pooled = base_model(ids).logits
        with injector.using(adapter):
            assert torch.equal(base_model(ids).logits, pooled)


def test_mixed_adapter_batch_equals_single_sequences(base_model, targets):
    one, three = make_adapter(targets, 1, seed=1), make_adapter(targets, 3, seed=2)
    adapters = [None, one, three, None, one]
    ids = token_ids(5, 7)
    injector = LoRAInjector(base_model, targets)
    with injector.using(adapters):
        together = base_model(ids).logits
    for index, adapter in enumerate(adapters):
        with injector.using(adapter):
            alone = base_model(ids[index : index + 1]).logits[0]
        torch.testing.assert_close(together[index], alone, rtol=1e-4, atol=1e-4)
        if adapter is not None:
            assert not torch.allclose(alone, base_model(ids[index : index + 1]).logits[0], atol=1e-2)


def test_summed_adapters_ignore_order_and_count_bias_once(base_model, targets):
    bias = tuple({n: b[0] for n, b in blocks.items()} for blocks in random_blocks(targets, 1, seed=99))
    a, b = make_adapter(targets, 2, seed=1, bias=bias), make_adapter(targets, 1, seed=2, bias=bias)
    ids = token_ids(2, 7)
    expected = merged_logits(base_model, a + b, ids)
    injector = LoRAInjector(base_model, targets)
    for adapter in (a + b, b + a):
        with injector.using(adapter):
            torch.testing.assert_close(base_model(ids).logits, expected, rtol=1e-4, atol=1e-4)


def test_shared_bias_block_uses_one_slot(base_model, targets):
    bias = tuple({n: b[0] for n, b in blocks.items()} for blocks in random_blocks(targets, 1, seed=99))
    a, b = make_adapter(targets, 2, seed=1, bias=bias), make_adapter(targets, 1, seed=2, bias=bias)
    c = make_adapter(targets, 1, seed=3)
    injector = LoRAInjector(base_model, targets)
    with injector.using([a, b, a, None]):
        assert injector._active.slots == [[0, 1, 2], [3, 2], [0, 1, 2], []]
        assert injector._active.num_slots == 4
    with injector.using([a, c]):
        assert injector._active.slots == [[0, 1, 2], [3, 4]]


def test_shared_adapter_accepts_two_dimensional_inputs(base_model, targets):
    adapter = make_adapter(targets, 2, seed=1)
    injector = LoRAInjector(base_model, targets)
    target = targets[0]
    module = base_model.get_submodule(target.paths[1])
    x = torch.randn(5, target.d_in)
    with injector.using(adapter):
        torch.testing.assert_close(module(x), module(x[None])[0])
    with injector.using([adapter]), pytest.raises(ValueError, match="1 adapters are set.*unknown size"):
        module(x)


def test_batch_size_must_equal_number_of_adapters(base_model, targets):
    injector = LoRAInjector(base_model, targets)
    with injector.using([make_adapter(targets, 1, seed=1), None]):
        with pytest.raises(ValueError, match="2 adapters are set, one per sequence.*batch of 3"):
            base_model(token_ids(3, 4))


def test_using_restores_state_after_errors_and_nesting(base_model, targets):
    outer, inner = make_adapter(targets, 1, seed=1), make_adapter(targets, 2, seed=2)
    ids = token_ids(2, 5)
    plain = base_model(ids).logits
    injector = LoRAInjector(base_model, targets)
    with injector.using(outer):
        with_outer = base_model(ids).logits
        with pytest.raises(RuntimeError, match="stop"), injector.using(inner):
            assert not torch.equal(base_model(ids).logits, with_outer)
            raise RuntimeError("stop")
        assert torch.equal(base_model(ids).logits, with_outer)
        with injector.using(None):
            assert torch.equal(base_model(ids).logits, plain)
        assert torch.equal(base_model(ids).logits, with_outer)
    assert torch.equal(base_model(ids).logits, plain)
    A, B = random_blocks(targets, 2, seed=3)
    injector.set(A, B, [[0], [1]], scaling=SCALING)
    from_set = base_model(ids).logits
    with injector.using(inner):
        pass
    assert torch.equal(base_model(ids).logits, from_set)
    injector.clear()
    assert torch.equal(base_model(ids).logits, plain)


def greedy_without_cache(base_model, ids, mask, new_tokens):
    for _ in range(new_tokens):
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        logits = base_model(ids, attention_mask=mask, position_ids=positions, use_cache=False).logits[:, -1]
        ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], dim=1)
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
    return ids


def test_cached_generation_equals_full_forward_left_padded(base_model, targets):
    injector = LoRAInjector(base_model, targets)
    adapters = [make_adapter(targets, 3, seed=1), None, make_adapter(targets, 1, seed=2)]
    ids, mask = token_ids(3, 9), torch.ones(3, 9, dtype=torch.int64)
    mask[1, :4] = mask[2, :7] = 0
    ids[mask == 0] = 0
    settings = {"max_new_tokens": 6, "do_sample": False}
    with injector.using(adapters):
        together = base_model.generate(ids, attention_mask=mask, **settings)
        assert torch.equal(together, greedy_without_cache(base_model, ids, mask, 6))
    for index, adapter in enumerate(adapters):
        prompt = ids[index : index + 1, mask[index].bool()]
        with injector.using(adapter):
            alone = base_model.generate(prompt, attention_mask=torch.ones_like(prompt), **settings)
        assert torch.equal(alone[0, -6:], together[index, -6:])
    assert not torch.equal(together, base_model.generate(ids, attention_mask=mask, **settings))


def gradients(base_model, injector, targets, *, through=None):
    """Loss and gradients on A and B of a training step with shared, repeated and no slots."""
    A, B = random_blocks(targets, 4, seed=5)
    leaves = [tensor.requires_grad_() for pools in (A, B) for tensor in pools.values()]
    if through is not None:  # as a hypernetwork does: the pools are results, not leaves
        A, B = ({name: through(pool) for name, pool in pools.items()} for pools in (A, B))
    injector.set(A, B, [[0, 3], [1, 3], [], [0, 0, 2]], scaling=SCALING)
    ids = token_ids(4, 7)
    loss = base_model(ids, labels=ids, use_cache=False).loss
    loss.backward()
    injector.clear()
    return loss.detach(), [leaf.grad for leaf in leaves]


@pytest.mark.parametrize("through", [None, torch.tanh], ids=["leaves", "generated"])
def test_gradient_checkpointing_keeps_gradients(base_model, targets, through):
    injector = LoRAInjector(base_model, targets)
    base_model.train()
    loss, expected = gradients(base_model, injector, targets, through=through)
    assert all(grad.abs().max() > 1e-4 for grad in expected)
    base_model.gradient_checkpointing_enable({"use_reentrant": False})
    again, grads = gradients(base_model, injector, targets, through=through)
    assert torch.equal(again, loss)
    for grad, reference in zip(grads, expected, strict=True):
        torch.testing.assert_close(grad, reference)


def test_reentrant_checkpointing_works_on_leaf_weights_only(base_model, targets):
    injector = LoRAInjector(base_model, targets)
    base_model.train()
    loss, expected = gradients(base_model, injector, targets)
    base_model.gradient_checkpointing_enable({"use_reentrant": True})
    base_model.enable_input_require_grads()  # reentrant blocks are skipped in backward if no input needs a gradient
    again, grads = gradients(base_model, injector, targets)
    assert torch.equal(again, loss)
    for grad, reference in zip(grads, expected, strict=True):
        torch.testing.assert_close(grad, reference)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        gradients(base_model, injector, targets, through=torch.tanh)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.down_proj = nn.Linear(6, 6)

    def forward(self, x):
        return x + self.down_proj(torch.tanh(x))


@pytest.mark.parametrize("whole", [True, False], ids=["whole", "by block"])
def test_compiled_model_applies_adapters_of_later_blocks(whole):
    torch.manual_seed(0)
    model = nn.Sequential(Block(), Block()).requires_grad_(False)  # torch needs ten times as long for a Llama
    targets = [LoRATarget("down_proj", ("1.down_proj",), 6, 6)]
    injector = LoRAInjector(model, targets)
    adapters = [make_adapter(targets, 2, seed=1), make_adapter(targets, 1, seed=2)]
    x = torch.randn(2, 5, 6)

    def results():
        outputs = []
        for used in (None, adapters[0], [adapters[1], None], None):
            with injector.using(used), torch.no_grad():
                outputs.append(model(x))
        A, B = random_blocks(targets, 2, seed=5)
        leaves = [A["down_proj"].requires_grad_(), B["down_proj"].requires_grad_()]
        injector.set(A, B, [[0, 1], [1]], scaling=SCALING)
        outputs += torch.autograd.grad(model(x).square().sum(), leaves)
        injector.clear()
        return outputs

    expected = results()
    assert not torch.allclose(expected[0], expected[1], atol=1e-2)
    for module in [model] if whole else model:
        module.compile(backend="eager")
    for found, reference in zip(results(), expected, strict=True):
        torch.testing.assert_close(found, reference)


def test_set_matches_using_for_same_blocks(base_model, targets):
    adapter = make_adapter(targets, 2, seed=1)
    injector = LoRAInjector(base_model, targets)
    ids = token_ids(2, 5)
    with injector.using([adapter, None]):
        expected = base_model(ids).logits
    pools = [
        {n: torch.cat([blocks[n], bias[n][None]]) for n in NAMES}
        for blocks, bias in ((adapter.A, adapter.bias_A), (adapter.B, adapter.bias_B))
    ]
    injector.set(*pools, [[0, 1, 2], []], scaling=SCALING)
    assert torch.equal(base_model(ids).logits, expected)
    assert base_model(ids[:, :3]).logits.shape == (2, 3, 61)  # another prompt length needs another plan


def test_bfloat16_base_model_takes_float32_adapters(base_model, targets):
    adapter = make_adapter(targets, 2, seed=1)
    ids = token_ids(2, 5)
    base_model.to(torch.bfloat16)
    injector = LoRAInjector(base_model, targets)
    plain = base_model(ids).logits
    with injector.using(adapter):
        logits = base_model(ids).logits
    assert logits.dtype == torch.bfloat16 and not torch.equal(logits, plain)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda A, B, slots: A.pop("q_proj"), r"Expected A and B for the targets \['down_proj', 'q_proj'\]"),
        (lambda A, B, slots: A.update(q_proj=A["q_proj"][:, :1]), r"pools of q_proj do not fit: .*got \[2, 1, 3, 32\]"),
        (lambda A, B, slots: B.update(q_proj=B["q_proj"][:1]), r"pools of q_proj do not fit"),
        (lambda A, B, slots: slots.append([2]), r"Slot ids \[2\] are not all in the pool: it has 2 slots"),
    ],
)
def test_set_refuses_mismatched_pools_and_ids(base_model, targets, change, message):
    injector = LoRAInjector(base_model, targets)
    A, B = random_blocks(targets, 2, seed=1)
    slots = [[0], [1]]
    change(A, B, slots)
    with pytest.raises(ValueError, match=message):
        injector.set(A, B, slots, scaling=1.0)


def test_using_refuses_other_targets_or_scaling(base_model, targets):
    injector = LoRAInjector(base_model, targets)
    adapter = make_adapter(targets, 1, seed=1)
    with pytest.raises(ValueError, match=r"The adapter is for down_proj \(48 to 32, 2 layers\), the injector for"):
        injector.using(make_adapter(targets[:1], 1, seed=1)).__enter__()
    with pytest.raises(ValueError, match=r"must agree in scaling, got \[1.5, 2.5\]"):
        injector.using([adapter, make_adapter(targets, 1, seed=1, scaling=2.5)]).__enter__()


def test_injector_refuses_model_without_targets(base_model, targets):
    with pytest.raises(ValueError, match="Sequential has no module 'model.layers.0.mlp.down_proj'"):
        LoRAInjector(nn.Sequential(), targets)
    wrong = [targets[0]._replace(d_in=7)]
    with pytest.raises(ValueError, match="to be an nn.Linear from 7 to 32 features, got Linear"):
        LoRAInjector(base_model, wrong)
    assert not any(module._forward_hooks for module in base_model.modules())
