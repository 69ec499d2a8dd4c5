"""Context encoders against transformers' own hidden states; the base model stays as it was."""

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma2Config, GPT2Config, LlamaConfig, Qwen3Config

from hypernet.model.context_encoder import (
    CONTEXT_ENCODERS,
    EarlyExit,
    EmbedOnly,
    PerLayerActivations,
    drop_context,
    make_context_encoder,
)

LAYERS, D = 3, 16
SIZES = dict(
    vocab_size=50,
    hidden_size=D,
    intermediate_size=24,
    num_hidden_layers=LAYERS,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=4,
    pad_token_id=0,
)
CONFIGS = {
    "llama": LlamaConfig(**SIZES),
    "qwen3": Qwen3Config(**SIZES),
    # Scales its embeddings outside the embedding layer, norms after attention, sliding windows.
    "gemma2": Gemma2Config(**SIZES, sliding_window=4, query_pre_attn_scalar=4),
    # Its blocks are called h, its positions are learned.
    "gpt2": GPT2Config(vocab_size=50, n_embd=D, n_layer=LAYERS, n_head=4, n_positions=32),
}
LENGTHS = [9, 1, 6]
by_model = pytest.mark.parametrize("model_type", CONFIGS)


def make_base_model(model_type="llama"):
    torch.manual_seed(0)
    base_model = AutoModelForCausalLM.from_config(CONFIGS[model_type], attn_implementation="eager")
    with torch.no_grad():
        for parameter in base_model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return base_model.eval()


def batch():
    torch.manual_seed(1)
    mask = torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]
    return torch.randint(1, 50, mask.shape) * mask, mask


@torch.no_grad()
def hidden_states(base_model, ids, mask):
    return base_model(ids, attention_mask=mask.long(), output_hidden_states=True).hidden_states


@torch.no_grad()
def final_norm(base_model, x):
    decoder = base_model.get_decoder()
    return (decoder.norm if hasattr(decoder, "norm") else decoder.ln_f)(x)


@by_model
def test_per_layer_maps_are_block_inputs_the_last_normed(model_type):
    base_model = make_base_model(model_type)
    ids, mask = batch()
    states = hidden_states(base_model, ids, mask)
    encoder = PerLayerActivations(base_model)
    features = encoder(ids, mask)
    assert features.shape == (3, LAYERS, 9, D) == (3, encoder.num_maps, 9, encoder.feature_dim)
    expected = [*states[: LAYERS - 1], final_norm(base_model, states[LAYERS - 1])]
    for i, state in enumerate(expected):
        torch.testing.assert_close(features[:, i][mask], state[mask], rtol=0, atol=1e-6)


@by_model
def test_per_layer_maps_are_hidden_states_of_the_cut_model(model_type):
    base_model, cut = make_base_model(model_type), make_base_model(model_type)
    decoder = cut.get_decoder()
    name = "h" if model_type == "gpt2" else "layers"
    setattr(decoder, name, getattr(decoder, name)[:-1])
    ids, mask = batch()
    expected = hidden_states(cut, ids, mask)
    features = PerLayerActivations(base_model)(ids, mask)
    assert len(expected) == LAYERS
    torch.testing.assert_close(
        features[mask[:, None].expand(-1, LAYERS, -1)],
        torch.stack(expected, 1)[mask[:, None].expand(-1, LAYERS, -1)],
        rtol=0,
        atol=1e-6,
    )


@by_model
def test_chosen_layers_maps_equal_those_among_all(model_type):
    base_model = make_base_model(model_type)
    ids, mask = batch()
    every = PerLayerActivations(base_model)(ids, mask)
    encoder = PerLayerActivations(base_model, layer_idx=[0, 2])
    features = encoder(ids, mask)
    assert features.shape == (3, 2, 9, D) == (3, encoder.num_maps, 9, encoder.feature_dim)
    for place, layer in enumerate([0, 2]):
        torch.testing.assert_close(features[:, place][mask], every[:, layer][mask], rtol=0, atol=1e-6)
    # The last of a list has passed the final norm, whichever it is.
    (alone,) = PerLayerActivations(base_model, layer_idx=[1])(ids, mask).unbind(1)
    expected = final_norm(base_model, hidden_states(base_model, ids, mask)[1])
    torch.testing.assert_close(alone[mask], expected[mask], rtol=0, atol=1e-6)


@by_model
@pytest.mark.parametrize(("layer_idx", "concat_layer"), [(None, 1), ([0, 2], -2), ([0, 1, 2], 2), ([1, 2], 0)])
def test_concat_layer_is_in_every_map_and_maps_come_in_order(model_type, layer_idx, concat_layer):
    base_model = make_base_model(model_type)
    ids, mask = batch()
    every = PerLayerActivations(base_model)(ids, mask)
    encoder = PerLayerActivations(base_model, layer_idx=layer_idx, concat_layer=concat_layer)
    read = []
    encoder.stream(ids, mask, lambda index, features: read.append((index, features)))
    layers = layer_idx or [0, 1, 2]
    assert encoder.settings["concat_layer"] == concat_layer % LAYERS
    assert [index for index, _ in read] == list(range(len(layers))) and encoder.num_maps == len(layers)
    for layer, (_, features) in zip(layers, read, strict=True):
        expected = torch.cat([every[:, layer], every[:, concat_layer]], -1)
        assert expected.shape[-1] == encoder.feature_dim
        torch.testing.assert_close(features[mask], expected[mask], rtol=0, atol=1e-6)


@by_model
@pytest.mark.parametrize("layer_idx", [1, 2, LAYERS])
def test_early_exit_is_the_normed_state_after_its_blocks(model_type, layer_idx):
    base_model = make_base_model(model_type)
    ids, mask = batch()
    states = hidden_states(base_model, ids, mask)
    # The last of transformers' states is normed already.
    expected = states[-1] if layer_idx == LAYERS else final_norm(base_model, states[layer_idx])
    features = EarlyExit(base_model, layer_idx=layer_idx)(ids, mask)
    assert features.shape == (3, 1, 9, D)
    torch.testing.assert_close(features[:, 0][mask], expected[mask], rtol=0, atol=1e-6)


@by_model
def test_embed_only_equals_the_embedding_layer(model_type):
    base_model = make_base_model(model_type)
    ids, mask = batch()
    features = EmbedOnly(base_model)(ids, mask)
    assert torch.equal(features, base_model.get_input_embeddings()(ids)[:, None])


SETTINGS = ({"kind": "per_layer_activations"}, {"kind": "early_exit", "layer_idx": 2}, {"kind": "embed_only"})
by_kind = pytest.mark.parametrize("settings", SETTINGS, ids=lambda settings: settings["kind"])


@by_kind
def test_padding_does_not_change_chunk_features(settings):
    encoder = make_context_encoder(make_base_model(), settings)
    ids, mask = batch()
    features = encoder(ids, mask)
    for c, length in enumerate(LENGTHS):
        alone = encoder(ids[c : c + 1, :length], mask[c : c + 1, :length])
        torch.testing.assert_close(features[c : c + 1, :, :length], alone, rtol=0, atol=1e-6)


@by_kind
def test_context_encoder_keeps_no_autograd_graph(settings):
    base_model = make_base_model()
    features = make_context_encoder(base_model, settings)(*batch())
    assert all(p.requires_grad for p in base_model.parameters())
    assert not features.requires_grad and features.grad_fn is None


@by_model
def test_context_encoder_does_not_own_the_base_model(model_type):
    encoder = PerLayerActivations(make_base_model(model_type))
    assert not encoder.state_dict() and not list(encoder.parameters()) and not list(encoder.children())


@by_model
def test_context_encoder_leaves_base_model_unchanged(model_type):
    base_model, untouched = make_base_model(model_type), make_base_model(model_type)
    modules = [(name, id(module)) for name, module in base_model.named_modules()]
    ids, mask = batch()
    for settings in SETTINGS:
        make_context_encoder(base_model, settings)(ids, mask)
    assert [name for name, _ in modules] == [name for name, _ in untouched.named_modules()]
    assert [(name, id(module)) for name, module in base_model.named_modules()] == modules
    # All hidden states are still there: transformers installs its own hooks at the first call that asks for them.
    states, expected = hidden_states(base_model, ids, mask), hidden_states(untouched, ids, mask)
    assert len(states) == len(expected) == LAYERS + 1
    assert all(torch.equal(a, b) for a, b in zip(states, expected, strict=True))
    assert not any(module._forward_pre_hooks for module in base_model.modules())


def test_context_encoder_restores_base_model_after_error():
    base_model = make_base_model()
    blocks = base_model.get_decoder().layers
    with pytest.raises(IndexError):
        PerLayerActivations(base_model)(torch.full((1, 4), 99), torch.ones(1, 4))
    assert base_model.get_decoder().layers is blocks
    assert not any(module._forward_pre_hooks for module in base_model.modules())


@pytest.mark.parametrize(
    ("settings", "hint"),
    [
        ({"kind": "last"}, "Unknown context encoder kind 'last': choose one of per_layer_activations, early_exit"),
        ({"kind": "early_exit"}, "layer_idx between 1 and 3, got None"),
        ({"kind": "early_exit", "layer_idx": 4}, "layer_idx between 1 and 3, got 4"),
        ({"kind": "early_exit", "layer_idx": 0}, "layer_idx between 1 and 3, got 0"),
        ({"kind": "embed_only", "layer_idx": 2}, "embed_only takes no layer_idx, got 2"),
        ({"layer_idx": 2}, "ascending list of layers from 0 to 2, or null for all, got 2"),
        ({"layer_idx": []}, "ascending list of layers from 0 to 2"),
        ({"layer_idx": [1, 3]}, "ascending list of layers from 0 to 2"),
        ({"layer_idx": [2, 1]}, "ascending list of layers from 0 to 2"),
        ({"concat_layer": 3}, "concat_layer should be a number of blocks from -3 to 2, got 3"),
        ({"concat_layer": True}, "concat_layer should be a number of blocks from -3 to 2, got True"),
        ({"kind": "embed_only", "concat_layer": 1}, "embed_only takes no concat_layer, got 1. Leave it out."),
        ({"kind": ["early_exit"]}, r"Unknown context encoder kind \['early_exit'\]"),
        ({"kind": "multi_layer", "layer_idx": [0, 2]}, "Unknown context encoder kind 'multi_layer'"),
        ({"depth": 1}, "per_layer_activations takes no depth, got 1"),
        ({"beside": -2}, "has no beside any more; it is called concat_layer now"),
    ],
)
def test_wrong_settings_are_refused_with_a_hint(settings, hint):
    with pytest.raises(ValueError, match=hint):
        make_context_encoder(make_base_model(), settings)


@by_kind
def test_settings_make_the_same_encoder_again(settings):
    base_model = make_base_model()
    encoder = make_context_encoder(base_model, {**settings, "context_tokens": 3})
    again = make_context_encoder(base_model, encoder.settings)
    assert type(again) is type(encoder) is CONTEXT_ENCODERS[settings["kind"]]
    assert again.settings == encoder.settings and encoder.settings.items() >= settings.items()
    assert torch.equal(again(*batch()), encoder(*batch()))


def test_null_settings_may_be_another_kind_s():
    """As conf/task/doc_to_lora.yaml has all of them, whatever the kind."""
    every = {"kind": "embed_only", "layer_idx": None, "concat_layer": None, "context_tokens": 2}
    assert make_context_encoder(make_base_model(), every).settings == {"kind": "embed_only", "context_tokens": 2}


def test_context_encoder_refuses_model_without_block_list():
    base_model = make_base_model()
    base_model.config.num_hidden_layers = 5
    with pytest.raises(ValueError, match="no list of 5 blocks in LlamaModel, which has .*layers"):
        PerLayerActivations(base_model)


# Context


@by_model
@pytest.mark.parametrize("settings", SETTINGS[:2], ids=lambda settings: settings["kind"])
def test_context_tokens_are_attended_and_dropped(model_type, settings):
    """Reference: the whole text without any mask, and its last tokens' features picked out by hand."""
    base_model = make_base_model(model_type)
    encoder = make_context_encoder(base_model, {**settings, "context_tokens": 4})
    ids, mask = batch()
    read = mask.clone()
    read[0, 1:5], read[2, 1:3] = False, False
    features, own = drop_context(encoder(ids, read), read)
    assert features.shape == (3, encoder.num_maps, 5, encoder.feature_dim)
    assert own.sum(1).tolist() == [5, 1, 4] == read.sum(1).tolist()
    for c, length in enumerate(LENGTHS):
        whole = encoder(ids[c : c + 1, :length], mask[c : c + 1, :length])
        picked = [t for t in range(length) if read[c, t]]
        torch.testing.assert_close(features[c, :, : len(picked)], whole[0, :, picked], rtol=0, atol=2e-6)
    without = encoder(ids[:1, 5:9], mask[:1, 5:9])
    assert (features[0, :, 1:] - without[0])[-1].abs().max() > 1e-3  # the context was seen


def test_zero_context_tokens_change_nothing():
    features, (_, mask) = torch.randn(3, 2, 9, 4), batch()
    kept, own = drop_context(features, mask)
    assert kept is features
    assert torch.equal(own, mask)


@pytest.mark.parametrize("context_tokens", [-1, 2.0, True, None])
def test_impossible_context_tokens_are_refused(context_tokens):
    with pytest.raises(ValueError, match="context_tokens should be a whole number, at least 0"):
        PerLayerActivations(make_base_model(), context_tokens=context_tokens)
