"""HyperNetwork: shapes, independence of chunks, zero start, gradients, configuration, errors and the published size."""

import json

import pytest
import torch
import yaml

from hypernet.base.targets import LoRATarget
from hypernet.model.hypernetwork import AGGREGATORS, HyperNetwork
from hypernet.model.outer_product import OuterProduct
from hypernet.model.recitation import Recitation

LAYERS, RANK, D, CHUNKS, T = 3, 2, 6, 5, 11
DOWN = LoRATarget("down_proj", ("a", "b", "c"), 13, 7)
UP = LoRATarget("up_proj", ("d", "e", "f"), 7, 13)
PERCEIVER = dict(name="perceiver", latent_dim=8, num_latents=3, num_blocks=2, num_heads=4, num_kv_heads=2, head_dim=3)
MEAN_POOL = dict(name="mean_pool", latent_dim=8)
OUTER_PRODUCT = dict(name="outer_product", inner_dim=4)
by_aggregator = pytest.mark.parametrize("aggregator", [PERCEIVER, MEAN_POOL, OUTER_PRODUCT], ids=lambda a: a["name"])


def make(*, trained=True, **changes) -> HyperNetwork:
    torch.manual_seed(0)
    arguments = dict(targets=[UP, DOWN], feature_dim=D, num_maps=LAYERS, rank=RANK, aggregator=PERCEIVER)
    hypernetwork = HyperNetwork(**{**arguments, **changes})
    if trained:
        with torch.no_grad():
            for parameter in hypernetwork.parameters():
                parameter += 0.3 * torch.randn_like(parameter)
    return hypernetwork


def batch(num_maps=LAYERS, lengths=(11, 3, 1, 8, 11)) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    mask = torch.arange(T) < torch.tensor(lengths)[:, None]
    return torch.randn(len(lengths), num_maps, T, D), mask


def assert_same(got, expected, **tolerance):
    for matrices, wanted in zip(got, expected, strict=True):
        assert list(matrices) == list(wanted)
        for name in matrices:
            torch.testing.assert_close(matrices[name], wanted[name], **tolerance)


@by_aggregator
@pytest.mark.parametrize("num_maps", [1, LAYERS])
def test_hypernetwork_yields_matrices_per_chunk_layer_target(aggregator, num_maps):
    hypernetwork = make(aggregator=aggregator, num_maps=num_maps)
    A, B = hypernetwork(*batch(num_maps))
    assert list(A) == list(B) == list(hypernetwork.bias_A) == ["down_proj", "up_proj"]
    for target in (DOWN, UP):
        assert A[target.name].shape == (CHUNKS, LAYERS, RANK, target.d_in)
        assert B[target.name].shape == (CHUNKS, LAYERS, RANK, target.d_out)
        assert hypernetwork.bias_A[target.name].shape == (LAYERS, RANK, target.d_in)
        assert hypernetwork.bias_B[target.name].shape == (LAYERS, RANK, target.d_out)


def test_each_map_yields_weights_of_its_own_layer_only():
    hypernetwork = make()
    features, mask = batch()
    A, _ = hypernetwork(features, mask)
    features[:, 1] += 1
    changed, _ = hypernetwork(features, mask)
    difference = (changed["down_proj"] - A["down_proj"]).abs().amax((0, 2, 3))
    assert difference[1] > 0 and difference[0] == difference[2] == 0


def test_a_single_maps_outputs_go_by_layer_target_rank():
    hypernetwork = make(num_maps=1)
    features, mask = batch(1)
    latents = hypernetwork.aggregator(features[:, 0], mask)
    assert latents.shape[1] == LAYERS * 2 * RANK
    expected = hypernetwork.lora_head(latents.view(CHUNKS, LAYERS, 2, RANK, -1))
    assert_same(hypernetwork(features, mask), expected)


@by_aggregator
def test_hypernetwork_ignores_nan_padding(aggregator):
    hypernetwork = make(aggregator=aggregator)
    features, mask = batch()
    expected = hypernetwork(features, mask)
    poisoned = features.masked_fill(~mask[:, None, :, None], float("nan"))
    assert_same(hypernetwork(poisoned, mask), expected, rtol=0, atol=0)
    for c, length in enumerate(mask.sum(1)):
        alone = hypernetwork(features[c : c + 1, :, :length], mask[c : c + 1, :length])
        assert_same(alone, [{n: x[c : c + 1] for n, x in matrices.items()} for matrices in expected])


@by_aggregator
def test_permuting_chunks_permutes_their_matrices(aggregator):
    hypernetwork = make(aggregator=aggregator)
    features, mask = batch()
    expected = hypernetwork(features, mask)
    order = torch.tensor([3, 0, 4, 2, 1])
    assert_same(
        hypernetwork(features[order], mask[order]),
        [{n: x[order] for n, x in matrices.items()} for matrices in expected],
    )


def test_hypernetwork_accepts_integer_mask():
    hypernetwork = make()
    features, mask = batch()
    assert_same(hypernetwork(features, mask.long()), hypernetwork(features, mask))


@by_aggregator
@pytest.mark.parametrize("num_maps", [1, LAYERS])
def test_b_starts_at_zero_and_a_depends_on_the_chunk(aggregator, num_maps):
    hypernetwork = make(trained=False, aggregator=aggregator, num_maps=num_maps)
    A, B = hypernetwork(*batch(num_maps))
    assert not any(x.any() for x in (*B.values(), *hypernetwork.bias_B.values()))
    assert aggregator is OUTER_PRODUCT or all(x.std(0).mean() > 0.01 for x in A.values())


@by_aggregator
def test_every_parameter_gets_a_gradient_once_b_is_nonzero(aggregator):
    hypernetwork = make(aggregator=aggregator)
    A, B = hypernetwork(*batch())
    chunks = sum((A[n].mT @ B[n]).square().sum() for n in A)
    shared = sum((hypernetwork.bias_A[n].mT @ hypernetwork.bias_B[n]).square().sum() for n in A)
    (chunks + shared).backward()
    without = [n for n, p in hypernetwork.named_parameters() if p.grad is None or not p.grad.any()]
    assert without == []


@pytest.mark.parametrize(
    "settings",
    [
        {"aggregator": {"name": "perceiver", "latent_dim": 8}, "num_pre_head_blocks": 2},
        {"aggregator": {"name": "mean_pool", "latent_dim": 8}, "num_pre_head_blocks": 2},
        {"aggregator": {"name": "outer_product"}},
    ],
    ids=lambda s: s["aggregator"]["name"],
)
def test_config_survives_yaml_and_json_and_rebuilds(settings):
    hypernetwork = make(**settings, scaling=3)
    for dump in (yaml.safe_load(yaml.safe_dump(hypernetwork.config)), json.loads(json.dumps(hypernetwork.config))):
        assert dump == hypernetwork.config
        rebuilt = HyperNetwork(**dump)
        assert rebuilt.config == hypernetwork.config
        assert rebuilt.targets == hypernetwork.targets == (DOWN, UP)
        assert rebuilt.scaling == 3
        rebuilt.load_state_dict(hypernetwork.state_dict())
        assert_same(rebuilt(*batch()), hypernetwork(*batch()), rtol=0, atol=0)


def test_hypernetwork_config_spells_out_defaults():
    assert make(aggregator={"name": "perceiver", "latent_dim": 8}).config["aggregator"] == dict(
        name="perceiver",
        latent_dim=8,
        num_latents=8,
        num_blocks=9,
        num_self_attention_blocks=0,
        share_blocks=False,
        num_heads=16,
        num_kv_heads=4,
        head_dim=128,
        mlp_multiple=4,
        projection_multiple=4,
    )


@pytest.mark.parametrize("aggregator", [PERCEIVER, OUTER_PRODUCT])
def test_disabled_bias_block_is_zero_and_stays_zero(aggregator):
    hypernetwork = make(aggregator=aggregator, bias_block=False, trained=False)
    shared = [*hypernetwork.bias_A.values(), *hypernetwork.bias_B.values()]
    assert not any(p.requires_grad or p.abs().max() for p in shared)
    assert hypernetwork.config["bias_block"] is False and make().config["bias_block"] is True
    assert hypernetwork.state_dict().keys() == make(aggregator=aggregator).state_dict().keys()
    others = [p for name, p in hypernetwork.named_parameters() if not name.startswith("lora_head.bias_")]
    assert all(p.requires_grad for p in others)


def test_head_settings_need_an_aggregator_with_head():
    head = {"num_pre_head_blocks": 1, "pre_head_multiple": 4}
    assert make().config.items() >= head.items()
    config = make(aggregator={"name": "outer_product"}).config
    assert config["aggregator"] == {"name": "outer_product", "inner_dim": 128} and not config.keys() & head.keys()


def test_scaling_defaults_to_the_published_one():
    assert make(rank=8).scaling == pytest.approx(45.254834)


@pytest.mark.parametrize(
    ("changes", "hint"),
    [
        (
            {"aggregator": {"name": "perciever"}},
            r"'perciever': .* one of \['mean_pool', 'outer_product', 'perceiver', 'recitation'\]",
        ),
        ({"aggregator": {"latent_dim": 8}}, r"Unknown aggregator None: .*'outer_product', 'perceiver', 'recitation'\]"),
        ({"aggregator": {**MEAN_POOL, "num_latents": 4}}, "'mean_pool' has no num_latents; it has latent_dim"),
        ({"aggregator": {**PERCEIVER, "feature_dim": 4}}, "'perceiver' has no feature_dim"),
        ({"aggregator": {**OUTER_PRODUCT, "rank": 4}}, "'outer_product' has no rank; it has inner_dim"),
        (
            {"aggregator": OUTER_PRODUCT, "num_pre_head_blocks": 1, "pre_head_multiple": 4},
            "'outer_product' has no head behind it; leave num_pre_head_blocks and pre_head_multiple out",
        ),
        ({"num_maps": 2}, "num_maps must be 1 or the number of adapted layers, 3, got 2"),
        ({"rank": 0}, "rank must be at least 1, got 0"),
        ({"bias_block": 0}, "bias_block must be true or false, got 0"),
        ({"targets": []}, "at least one target module"),
        ({"targets": [DOWN, DOWN]}, "may be given once"),
        (
            {"targets": [DOWN, UP._replace(paths=("d",))]},
            r"same number of layers, got \{'down_proj': 3, 'up_proj': 1\}",
        ),
    ],
)
def test_hypernetwork_refuses_invalid_settings(changes, hint):
    with pytest.raises(ValueError, match=hint):
        make(**changes)


@pytest.mark.parametrize(
    "shapes",
    [((5, 3, 11, 7), (5, 11)), ((5, 2, 11, 6), (5, 11)), ((5, 3, 11, 6), (5, 10)), ((5, 3, 11, 6), (4, 11))]
    + [((3, 11, 6), (3, 11)), ((5, 3, 11, 6), (5, 3, 11))],
)
def test_hypernetwork_refuses_mismatched_features(shapes):
    features, mask = torch.zeros(shapes[0]), torch.ones(shapes[1], dtype=torch.bool)
    with pytest.raises(ValueError) as error:
        make()(features, mask)
    assert (
        "D=6" in str(error.value) and str(list(shapes[0])) in str(error.value) and "context encoder" in str(error.value)
    )


def test_chunk_without_tokens_is_refused():
    features, mask = batch()
    mask[2] = False
    with pytest.raises(ValueError, match="Every chunk needs a token"):
        make()(features, mask)


@by_aggregator
def test_parameter_counts_add_up(aggregator):
    hypernetwork = make(aggregator=aggregator)
    counts = hypernetwork.parameter_counts()
    assert (
        counts["total"]
        == counts.get("aggregator", 0) + counts["lora_head"]
        == sum(p.numel() for p in hypernetwork.parameters())
    )
    assert ("aggregator" in counts) == (aggregator is not OUTER_PRODUCT)


def test_published_configuration_has_309_million_parameters():
    """gemma-2-2b, down_proj, rank 8, 8 blocks: 309,456,384 without the parts that are listed here and all vectors."""
    with torch.device("meta"):
        hypernetwork = HyperNetwork(
            targets=[LoRATarget("down_proj", tuple(f"layers.{i}" for i in range(26)), 9216, 2304)],
            feature_dim=2304,
            num_maps=26,
            aggregator={"name": "perceiver", "num_blocks": 8},
        )
    not_counted = (
        "latents_q",
        "encoder.layernorm",
        "decoder.layernorm",
        "scaler_",
        "layers.0.layers.0",
        "layers.0.layers.4",
    )
    rest = {
        name: parameter.numel()
        for name, parameter in hypernetwork.named_parameters()
        if any(part in name.removeprefix("aggregator.").removeprefix("lora_head.") for part in not_counted)
    }
    assert hypernetwork.parameter_counts()["total"] - sum(rest.values()) == 309_456_384
    assert sum(rest.values()) == 2 * 8 * 512 + 2 * 512 + 2 * 26 * 8 + 4 * 512


def test_an_aggregator_is_any_class_with_latent_dim():
    for aggregator_class in set(AGGREGATORS.values()) - {OuterProduct, Recitation}:  # nothing stands behind these
        aggregator = aggregator_class(feature_dim=D, num_outputs=4, latent_dim=8)
        assert aggregator.latent_dim == 8
        assert aggregator(torch.randn(2, 5, D), torch.ones(2, 5, dtype=torch.bool)).shape == (2, 4, 8)


# Standardized features


@pytest.mark.parametrize("num_maps", [1, LAYERS])
def test_calibrated_features_have_mean_zero_and_variance_one(num_maps):
    hypernetwork, (features, mask) = make(num_maps=num_maps, standardize_features=True), batch(num_maps)
    features = features * torch.tensor([1.0, 50, 0.01, 3, 0, 2]) + torch.tensor([0.0, -300, 1, 7, 5, 0])
    assert not hypernetwork.is_calibrated
    # In two pieces, with padding that must not count.
    rest = features[2:].masked_fill(~mask[2:, None, :, None], 9e9)
    hypernetwork.calibrate([(features[:2], mask[:2]), (rest, mask[2:])])
    assert hypernetwork.is_calibrated

    plain = make(num_maps=num_maps)
    tokens = features.transpose(1, 2)[mask]
    mean, std = tokens.mean(0), tokens.std(0, correction=0)
    std[:, 4] = 1  # never changes: must not become the largest
    standardized = (features - mean[:, None]) / std[:, None]
    assert_same(hypernetwork(features, mask), plain(standardized, mask), rtol=1e-3, atol=1e-4)


@by_aggregator
def test_statistics_are_per_layer_and_in_the_state_dict(aggregator):
    hypernetwork, (features, mask) = make(aggregator=aggregator, standardize_features=True), batch()
    hypernetwork.calibrate([(features * torch.arange(1.0, 4)[:, None, None] + 2, mask)])
    whole = hypernetwork(features, mask)
    part = hypernetwork(features[:, 1:], mask, layers=slice(1, 3))
    assert_same(part, [{name: matrices[:, 1:] for name, matrices in side.items()} for side in whole])
    loaded = HyperNetwork(**hypernetwork.config)
    loaded.load_state_dict(hypernetwork.state_dict())
    assert loaded.is_calibrated
    assert_same(loaded(features, mask), whole, rtol=0, atol=0)


def test_calibration_needs_standardize_and_tokens():
    features, mask = batch()
    with pytest.raises(ValueError, match="standardize_features=True"):
        make().calibrate([(features, mask)])
    with pytest.raises(ValueError, match="at least one token"):
        make(standardize_features=True).calibrate([])
    assert make().is_calibrated
    assert make(standardize_features=True).parameter_counts() == make().parameter_counts()


# Another rank


@pytest.mark.parametrize("aggregator", [PERCEIVER, MEAN_POOL], ids=lambda a: a["name"])
@pytest.mark.parametrize("num_maps", [1, LAYERS])
@pytest.mark.parametrize("rank", [1, 3, 5])
def test_another_rank_takes_first_rows_or_adding_copies(aggregator, num_maps, rank):
    hypernetwork = make(aggregator=aggregator, num_maps=num_maps)
    other = hypernetwork.at_rank(rank)
    assert other.rank == rank and HyperNetwork(**other.config).state_dict().keys() == other.state_dict().keys()
    (A, B), (other_A, other_B) = hypernetwork(*batch(num_maps)), other(*batch(num_maps))
    kept = min(rank, RANK)
    copies = [1 + (rank - 1 - row) // RANK for row in range(kept)]  # of each row that was there
    for name in A:
        torch.testing.assert_close(other_A[name][:, :, :kept], A[name][:, :, :kept])
        for row in range(kept):
            expected = hypernetwork.scaling * B[name][:, :, row] / copies[row]
            torch.testing.assert_close(other.scaling * other_B[name][:, :, row], expected)
        for further in range(kept, rank):  # like the row it is a copy of, and not the same
            difference = other_A[name][:, :, further] - A[name][:, :, further % RANK]
            assert 0 < difference.norm() < A[name][:, :, further % RANK].norm()
        expected = [hypernetwork.bias_A[name][:, row % RANK] for row in range(rank)]
        torch.testing.assert_close(other.bias_A[name], torch.stack(expected, dim=1))
        scaled = hypernetwork.scaling * hypernetwork.bias_B[name]
        expected = [scaled[:, row % RANK] / copies[row % RANK] for row in range(rank)]
        torch.testing.assert_close(other.scaling * other.bias_B[name], torch.stack(expected, dim=1))


def test_at_its_own_rank_nothing_changes():
    hypernetwork = make()
    state = hypernetwork.at_rank(RANK).state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in hypernetwork.state_dict().items())


def test_outer_products_have_no_other_rank():
    with pytest.raises(ValueError, match="outer product's rows have no queries"):
        make(aggregator=OUTER_PRODUCT).at_rank(3)
