"""The Perceiver against a slow reference written out with loops, and what must not reach its outputs."""

import math

import pytest
import torch

from hypernet.model.perceiver import Perceiver

SIZES = dict(
    feature_dim=7, num_outputs=2, latent_dim=10, num_latents=3, num_blocks=2, num_heads=6, num_kv_heads=2, head_dim=3
)
LENGTHS = [1, 37, 12]


def make(**changes) -> Perceiver:
    torch.manual_seed(0)
    perceiver = Perceiver(**{**SIZES, **changes}).double()
    with torch.no_grad():
        for name, parameter in perceiver.named_parameters():
            if "layernorm" in name:
                parameter += 0.3 * torch.randn_like(parameter)
    return perceiver


def batch(lengths=LENGTHS) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    return torch.randn(len(lengths), max(lengths), SIZES["feature_dim"], dtype=torch.float64), mask


def rms(x, weight):
    return x / torch.sqrt((x * x).sum(-1, keepdim=True) / x.shape[-1] + 1e-6) * weight


def silu_mlp(weights, prefix, x):
    gate = x @ weights[f"{prefix}.gate_proj.weight"].T
    up = x @ weights[f"{prefix}.up_proj.weight"].T
    return (gate / (1 + torch.exp(-gate)) * up) @ weights[f"{prefix}.down_proj.weight"].T


def slow_block(weights, prefix, latents, context, sizes, is_cross=True):
    normed = rms(latents, weights[f"{prefix}.input_latents_layernorm.weight"])
    context = rms(context, weights[f"{prefix}.input_context_layernorm.weight"]) if is_cross else normed
    q, k, v = (
        x @ weights[f"{prefix}.self_attn.{name}_proj.weight"].T
        for x, name in ((normed, "q"), (context, "k"), (context, "v"))
    )
    d, group = sizes["head_dim"], sizes["num_heads"] // sizes["num_kv_heads"]
    rows = []
    for i in range(len(latents)):
        heads = []
        for h in range(sizes["num_heads"]):
            kv = slice(h // group * d, (h // group + 1) * d)
            weight = torch.exp(k[:, kv] @ q[i, h * d : (h + 1) * d] / math.sqrt(d))
            heads.append(weight / weight.sum() @ v[:, kv])
        rows.append(torch.cat(heads))
    attended = torch.stack(rows) @ weights[f"{prefix}.self_attn.o_proj.weight"].T
    latents = latents + rms(attended, weights[f"{prefix}.post_attention_layernorm.weight"])
    hidden = silu_mlp(weights, f"{prefix}.mlp", rms(latents, weights[f"{prefix}.pre_ff_layernorm.weight"]))
    return latents + rms(hidden, weights[f"{prefix}.post_ff_layernorm.weight"])


def slow_perceiver(weights, tokens, sizes):
    """One sequence without padding, [T, D] -> [num_outputs, H]."""
    context = silu_mlp(weights, "modality_projection", tokens)
    latents = weights["encoder.latents_q"]
    per_block = 1 + sizes.get("num_self_attention_blocks", 0)
    for i in range(sizes["num_blocks"] * per_block):
        latents = slow_block(weights, f"encoder.layers.{i}", latents, context, sizes, is_cross=i % per_block == 0)
    latents = rms(latents, weights["encoder.layernorm.weight"])
    outputs = slow_block(weights, "decoder.layers.0", weights["decoder.latents_q"], latents, sizes)
    return rms(outputs, weights["decoder.layernorm.weight"])


@pytest.mark.parametrize("num_self_attention_blocks", [0, 1])
def test_outputs_and_gradients_equal_a_written_out_loop(num_self_attention_blocks):
    perceiver = make(num_self_attention_blocks=num_self_attention_blocks)
    sizes = {**SIZES, "num_self_attention_blocks": num_self_attention_blocks}
    features, mask = batch()
    features.requires_grad_()
    outputs = perceiver(features, mask)
    weights = dict(perceiver.named_parameters())
    expected = torch.stack([slow_perceiver(weights, features[i][mask[i]], sizes) for i in range(len(mask))])
    assert outputs.shape == (3, SIZES["num_outputs"], SIZES["latent_dim"])
    torch.testing.assert_close(outputs, expected, rtol=1e-9, atol=1e-11)

    inputs = {**weights, "features": features}
    direction = torch.randn_like(expected)
    gradients = torch.autograd.grad((outputs * direction).sum(), inputs.values())
    expected_gradients = torch.autograd.grad((expected * direction).sum(), inputs.values())
    for name, got, wanted in zip(inputs, gradients, expected_gradients, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-7, atol=1e-10, msg=lambda m, name=name: f"{name}: {m}")


def test_aggregator_ignores_nan_padding():
    perceiver = make()
    features, mask = batch()
    outputs = perceiver(features, mask)
    poisoned = perceiver(features.masked_fill(~mask.unsqueeze(-1), float("nan")), mask)
    assert torch.equal(outputs, poisoned)
    (gradient,) = torch.autograd.grad(poisoned.sum(), perceiver.modality_projection.gate_proj.weight)
    assert gradient.isfinite().all()


def test_perceiver_ragged_batch_equals_single_sequences():
    perceiver = make()
    features, mask = batch()
    outputs = perceiver(features, mask)
    for i, length in enumerate(LENGTHS):
        alone = perceiver(features[i : i + 1, :length], mask[i : i + 1, :length])
        torch.testing.assert_close(outputs[i : i + 1], alone, rtol=1e-10, atol=1e-12)


def test_place_and_order_of_tokens_do_not_matter():
    perceiver = make()
    features, mask = batch()
    order = torch.randperm(features.shape[1])
    torch.testing.assert_close(
        perceiver(features[:, order], mask[:, order]), perceiver(features, mask), rtol=1e-10, atol=1e-12
    )


def test_norms_of_bfloat16_are_computed_in_float32():
    perceiver = make().bfloat16()
    features, mask = batch()
    outputs = perceiver(features.bfloat16(), mask)
    assert outputs.dtype == torch.bfloat16
    torch.testing.assert_close(outputs.double(), perceiver.double()(features, mask), rtol=0, atol=0.2)


def test_perceiver_refuses_indivisible_heads():
    with pytest.raises(ValueError, match="multiple of num_kv_heads, got 6 and 4"):
        make(num_kv_heads=4)


def test_published_shared_blocks_equal_copies():
    sizes = {"feature_dim": 7, "num_outputs": 2, "latent_dim": 6, "num_latents": 3, "num_blocks": 4}
    sizes |= {"num_heads": 2, "num_kv_heads": 1, "head_dim": 3, "num_self_attention_blocks": 2}
    shared, copied = Perceiver(**sizes, share_blocks=True), Perceiver(**sizes)
    # Cross- and self-attentions of the first block, then one cross-attention with the same self-attentions.
    places = [0, 1, 2, 3, 1, 2, 3, 1, 2, 3, 1, 2]
    assert shared.encoder.order == places and len(shared.encoder.layers) == 4
    state = {key: value for key, value in shared.state_dict().items() if not key.startswith("encoder.layers.")}
    for place, block in enumerate(places):
        layer = shared.encoder.layers[block].state_dict()
        state |= {f"encoder.layers.{place}.{key}": value for key, value in layer.items()}
    copied.load_state_dict(state)
    features, mask = torch.randn(2, 5, 7), torch.arange(5) < torch.tensor([[5], [2]])
    torch.testing.assert_close(shared(features, mask), copied(features, mask))
