"""vllm_export: folders against a reader that knows only vLLM's documented limits, against PEFT and the injector."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file

from hypernet.adapters.adapter import LoRAAdapter
from hypernet.adapters.composition import compress
from hypernet.adapters.injection import LoRAInjector
from hypernet.base.targets import LoRATarget, find_targets
from hypernet.interop.vllm import export_vllm
from tests.adapters.test_adapter import assert_one_line_value_error, make_adapter, make_base_model, targets  # noqa: F401
from tests.adapters.test_composition import deltas, uneven_adapter

IDS = torch.arange(2, 16).view(2, 7)
# https://docs.vllm.ai/en/latest/api/vllm/config/lora/, written down here a second time.
ALLOWED_RANKS = {1, 8, 16, 32, 64, 128, 256, 320, 512}
# The linear modules of vLLM's Llama, qkv_proj and gate_up_proj as the parts they are packed from.
LLAMA_MODULES = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def read_as_vllm(folder, *, max_lora_rank, modules):
    """Module path to (lora_a, lora_b times the factor), or an AssertionError where vLLM would refuse the folder."""
    config = json.loads((folder / "adapter_config.json").read_text())
    assert max_lora_rank in ALLOWED_RANKS
    assert isinstance(config["r"], int) and 0 < config["r"] <= max_lora_rank
    assert isinstance(config["target_modules"], list) and isinstance(config["lora_alpha"], (int, float))
    assert config["bias"] == "none" and not config["modules_to_save"]
    assert not config["use_dora"] and not config["use_rslora"]
    # Not read by vLLM, so they have to say nothing.
    assert not config["rank_pattern"] and not config["alpha_pattern"] and not config.get("trainable_token_indices")
    factor = config["lora_alpha"] / config["r"]
    found = {}
    for key, weight in load_file(folder / "adapter_model.safetensors").items():
        path, letter = re.fullmatch(r"base_model\.model\.(.+)\.lora_([AB])\.weight", key).groups()
        assert path.rsplit(".", 1)[-1] in modules and ".experts" not in path
        assert weight.dtype in (torch.float16, torch.bfloat16, torch.float32) and weight.ndim == 2
        assert weight.shape["AB".index(letter)] == config["r"]
        found.setdefault(path, {})[letter] = weight
    assert all(set(pair) == {"A", "B"} for pair in found.values())
    assert {path.rsplit(".", 1)[-1] for path in config["target_modules"]} <= modules
    return {path: (pair["A"], pair["B"] * factor) for path, pair in found.items()}


def peft_logits(folder):
    from peft import PeftModel

    with torch.no_grad():
        return PeftModel.from_pretrained(make_base_model(), folder)(IDS).logits


def injected_logits(adapter):
    base_model = make_base_model()
    with torch.no_grad(), LoRAInjector(base_model, adapter.targets).using(adapter):
        return base_model(IDS).logits


@pytest.mark.parametrize(
    "num_chunks, rank, expected", [(0, 1, 1), (0, 3, 8), (1, 4, 8), (1, 3, 8), (5, 3, 32), (4, 13, 128)]
)
def test_padding_to_an_allowed_rank_keeps_the_delta_exactly(tmp_path, num_chunks, rank, expected):
    adapter = uneven_adapter(num_chunks, rank=rank)
    export = export_vllm(adapter, tmp_path / "served")
    assert (export.rank_before, export.rank, export.max_lora_rank) == (adapter.rank, expected, expected)
    assert export.compression is None and export.directory == tmp_path / "served"
    read = read_as_vllm(tmp_path / "served", max_lora_rank=expected, modules={"up", "down"})
    before = deltas(adapter)
    assert read.keys() == before.keys()
    concatenated = adapter.concatenated()
    for target in adapter.targets:
        for module in target.modules():
            A, B = read[module.path]
            assert A.shape == (expected, module.d_in) and B.shape == (module.d_out, expected)
            rows = adapter.rank
            assert torch.equal(A[:rows], concatenated[target.name][0][module.layer, :, : module.d_in])
            assert not A[rows:].any() and not B[:, rows:].any()
            torch.testing.assert_close(B.double() @ A.double(), before[module.path], rtol=1e-5, atol=1e-6)
    again = LoRAAdapter.load(tmp_path / "served")
    assert again.scaling == adapter.scaling and again.provenance["documents"] == adapter.provenance["documents"]


def test_vllm_export_keeps_allowed_rank(targets, tmp_path):  # noqa: F811
    adapter = make_adapter(targets, 3, rank=4)
    assert export_vllm(adapter, tmp_path / "a").rank == 16
    assert LoRAAdapter.load(tmp_path / "a").num_chunks == 3


@pytest.mark.parametrize("names", [["down_proj"], ["q_proj", "v_proj", "gate_proj"]])
def test_vllm_export_keeps_injected_logits_in_peft(tmp_path, names):
    adapter = make_adapter(find_targets(make_base_model(), names), 6, scaling=8.0)  # rank 21
    export = export_vllm(adapter, tmp_path / "padded")
    assert export.rank == 32
    read_as_vllm(tmp_path / "padded", max_lora_rank=32, modules=LLAMA_MODULES)
    torch.testing.assert_close(peft_logits(tmp_path / "padded"), injected_logits(adapter), rtol=0, atol=1e-4)
    export = export_vllm(adapter, tmp_path / "small", max_lora_rank=16, fit="compress")
    read_as_vllm(tmp_path / "small", max_lora_rank=16, modules=LLAMA_MODULES)
    small, report = compress(adapter, 16)
    assert export.rank == 16 and export.compression == report and 0 < report.relative_error < 0.5
    torch.testing.assert_close(peft_logits(tmp_path / "small"), injected_logits(small), rtol=0, atol=1e-4)


def test_vllm_export_compresses_only_above_max_rank(tmp_path):
    export = export_vllm(uneven_adapter(4), tmp_path / "a", max_lora_rank=16, fit="compress")
    assert (export.rank, export.compression) == (16, None)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", None])
@pytest.mark.parametrize("own", [torch.float32, torch.bfloat16])
def test_vllm_export_writes_given_dtype(tmp_path, dtype, own):
    export_vllm(uneven_adapter(1, dtype=own), tmp_path / "a", dtype=dtype)
    expected = own if dtype is None else getattr(torch, dtype)
    assert {weight.dtype for weight in load_file(tmp_path / "a" / "adapter_model.safetensors").values()} == {expected}


def test_vllm_export_prints_serving_flags(tmp_path):
    export = export_vllm(uneven_adapter(2, base_model_name="org/tiny model"), tmp_path / "fenda", max_lora_rank=64)
    # 9 rows need 16, whatever the server could do.
    assert export.serve_arguments == (
        "--enable-lora", "--max-lora-rank", "16", "--lora-modules", f"fenda={tmp_path / 'fenda'}"
    )  # fmt: skip
    assert export.command.startswith(
        "vllm serve 'org/tiny model' --enable-lora --max-lora-rank 16 --lora-modules fenda="
    )
    nameless = export_vllm(uneven_adapter(2, base_model_name=None), tmp_path / "nameless")
    assert nameless.command.startswith("vllm serve BASE_MODEL ")


def test_vllm_export_serves_a_local_base_model_absolutely(tmp_path, monkeypatch):
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    adapter = uneven_adapter(1)
    adapter.provenance["base_model"]["name"] = "base"  # as version 0.1 wrote it
    assert export_vllm(adapter, tmp_path / "a").command.startswith(f"vllm serve {tmp_path / 'base'} ")


@pytest.mark.parametrize(
    "change, message",
    [
        ({"max_lora_rank": 8}, 'total rank is 9, vLLM\'s limit here 8.*fit="compress"'),
        ({"max_lora_rank": 12}, r"one of \(1, 8, 16, .*got 12"),
        ({"max_lora_rank": True}, "got True"),
        ({"dtype": "float64"}, "dtype to be one of float16, bfloat16, float32, got 'float64'"),
        ({"fit": "cut"}, 'fit to be "pad" or "compress", got'),
    ],
)
def test_vllm_export_refuses_wrong_settings(tmp_path, change, message):
    assert_one_line_value_error(lambda: export_vllm(uneven_adapter(2), tmp_path / "a", **change), message)
    assert list(tmp_path.iterdir()) == []


def test_vllm_export_refuses_weights_beyond_its_dtype(tmp_path):
    adapter = uneven_adapter(1)
    adapter.B["up"][0, 0, 0, 0] = 60000  # times the scaling of 45.25 is beyond float16
    assert_one_line_value_error(
        lambda: export_vllm(adapter, tmp_path / "a", dtype="float16"), "all fit into torch.float16"
    )
    export_vllm(adapter, tmp_path / "a", dtype="bfloat16")
    double = adapter.to(dtype=torch.float64)
    assert_one_line_value_error(lambda: export_vllm(double, tmp_path / "b"), "no torch.float64 weights")
    adapter.A["up"][0, 0, 0, 0] = torch.nan
    assert_one_line_value_error(lambda: export_vllm(adapter, tmp_path / "b"), "if they are not finite")
    expert = make_adapter((LoRATarget("up", ("layers.0.mlp.experts.0.up",), 3, 4),), 1)
    assert_one_line_value_error(lambda: export_vllm(expert, tmp_path / "b"), "mixture-of-experts")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_vllm_export_replaces_folder_only_with_overwrite(tmp_path):
    export_vllm(uneven_adapter(1), tmp_path / "a")
    with pytest.raises(FileExistsError):
        export_vllm(uneven_adapter(2), tmp_path / "a")
    assert export_vllm(uneven_adapter(2), tmp_path / "a", overwrite=True).rank == 16
