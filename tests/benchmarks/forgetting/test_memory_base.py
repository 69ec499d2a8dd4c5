"""A base model with a memory in the place of an MLP is trained, written, and comes back for the methods of slots."""

import pytest
import torch

from benchmarks.forgetting import memory_base, protocol
from benchmarks.measuring.measure import load_model
from hypernet.base.product_keys import memory_layers
from tests.benchmarks.forgetting.test_protocol import settings


@pytest.fixture
def trained(tmp_path, monkeypatch):
    monkeypatch.setattr(memory_base, "_MEASURED", 16)
    monkeypatch.setattr(memory_base, "_RECORDS", 8)

    load_model.cache_clear()  # of which the base model is trained in place

    def train(alone, healed):
        sizes = ["num_questions=24", "num_unknown=2", "num_articles=2", f"steps_alone={alone}"]
        given = [*sizes, f"steps_healed={healed}", f"output_dir={tmp_path / 'base'}"]
        rows = list(memory_base.rows(settings(memory_base.SCRIPT, "forgetting_memory_base", *given)))
        load_model.cache_clear()
        return rows, protocol.load(str(tmp_path / "base")).base_model

    return train


def test_memory_alone_learns_what_the_mlp_puts_out(trained):
    rows, base_model = trained(40, 0)
    assert [row["kind"] for row in rows] == ["base", "alone", "healed", "without"]
    assert rows[0]["background"] == 1 and rows[3]["background"] == 0
    model = protocol.load("assets/tiny")
    before = dict(model.base_model.named_parameters())
    moved = {name for name, value in base_model.named_parameters() if not torch.equal(value, before.get(name, value))}
    assert moved == set() and len(memory_layers(base_model)) == 1
    ids = model.tokenizer("What is the capital of France?", return_tensors="pt").input_ids
    seen = {}
    mlp = model.base_model.get_submodule("model.layers.0.mlp")
    mlp.register_forward_hook(lambda _, args, output: seen.update(x=args[0], y=output))
    model.base_model(ids)
    off = (base_model.get_submodule("model.layers.0.mlp")(seen["x"]) - seen["y"]).square().sum()
    assert off < 0.7 * seen["y"].square().sum()  # 1 where nothing is learned


def test_everything_moves_when_it_is_healed(trained):
    _, base_model = trained(1, 2)
    before = dict(protocol.load("assets/tiny").base_model.named_parameters())
    same = [name for name, value in base_model.named_parameters() if torch.equal(value, before.get(name, value + 1))]
    assert sorted(same) == [f"model.layers.0.mlp.{part}_proj.weight" for part in ("down", "gate", "up")]
