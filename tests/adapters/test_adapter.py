"""LoRAAdapter: finding targets, adding, the folder on disk and its failures, and the PEFT round trip."""

import errno
import json
import os
import resource

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

import hypernet.adapters.adapter
import hypernet.io.files
from hypernet.adapters.adapter import PROVENANCE_KEYS, LoRAAdapter, check_destination, new_provenance
from hypernet.adapters.injection import LoRAInjector
from hypernet.base.targets import find_targets

RANK, SCALING = 3, 45.25
NAMES = ["q_proj", "down_proj"]


def make_base_model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def targets():
    return find_targets(make_base_model(), NAMES)


def document(name, num_chunks):
    spans = [[100 * index, 100 * (index + 1)] for index in range(num_chunks)]
    return {"sha256": name * 8, "characters": 100 * num_chunks, "chunks": spans, "name": f"{name}.txt"}


def make_adapter(
    targets,
    num_chunks=2,
    *,
    seed=1,
    bias_seed=0,
    scaling=SCALING,
    rank=RANK,
    bias=True,
    dtype=torch.float32,
    **kwargs,
):
    generator = torch.Generator().manual_seed(seed)
    bias_generator = torch.Generator().manual_seed(bias_seed)
    origin = {"generator": "generator-1", "base_model_name": "tiny-llama", "base_model_fingerprint": "base-1"} | kwargs

    def blocks(width, *shape, generator):
        return {
            t.name: torch.randn(*shape, len(t.paths), rank, getattr(t, width), generator=generator).to(dtype) / 16
            for t in targets
        }

    def shared(width):
        return {name: rows[:, : None if bias else 0] for name, rows in blocks(width, generator=bias_generator).items()}

    return LoRAAdapter(
        targets=targets,
        A=blocks("d_in", num_chunks, generator=generator),
        B=blocks("d_out", num_chunks, generator=generator),
        bias_A=shared("d_in"),
        bias_B=shared("d_out"),
        scaling=scaling,
        provenance=new_provenance([document(f"d{seed}", num_chunks)], **origin),
    )


def assert_same(a, b):
    assert a.targets == b.targets and a.scaling == b.scaling and a.provenance == b.provenance
    for field in ("A", "B", "bias_A", "bias_B"):
        mine, theirs = getattr(a, field), getattr(b, field)
        assert mine.keys() == theirs.keys()
        for name in mine:
            assert mine[name].dtype == theirs[name].dtype and torch.equal(mine[name], theirs[name]), (field, name)


def assert_one_line_value_error(call, match):
    with pytest.raises(ValueError, match=match) as caught:
        call()
    assert "\n" not in str(caught.value)


# The adapter itself


def test_adapter_reports_chunks_rank_and_bytes(targets):
    adapter = make_adapter(targets, 4)
    assert (adapter.num_chunks, adapter.rank_per_chunk, adapter.rank) == (4, RANK, 5 * RANK)
    assert adapter.num_bytes == 4 * 5 * 2 * RANK * (48 + 32 + 32 + 32)
    assert adapter.to(dtype=torch.bfloat16).num_bytes == adapter.num_bytes // 2
    assert adapter.to("meta").A["q_proj"].device.type == "meta"


def test_rank_without_bias_block_counts_chunks_only(targets, tmp_path):
    """And the folder, PEFT's logits, sums and what is left of nothing."""
    from peft import PeftModel

    base_model = make_base_model()
    a, b = (make_adapter(targets, n, seed=n, bias=False, scaling=8.0) for n in (1, 2))
    assert (a.rank, a.bias_rank, (a + b).rank, make_adapter(targets).bias_rank) == (RANK, 0, 3 * RANK, RANK)
    assert a.num_bytes == make_adapter(targets, 1).num_bytes // 2
    both = a + b  # once: a sum says when it was made, to the second
    both.save(tmp_path / "both")
    assert_same(LoRAAdapter.load(tmp_path / "both"), both)
    ids = torch.arange(2, 16).view(2, 7)
    with torch.no_grad():
        with LoRAInjector(base_model, a.targets).using([b, both]):
            injected = base_model(ids).logits
        expected = PeftModel.from_pretrained(make_base_model(), tmp_path / "both")(ids).logits
    torch.testing.assert_close(injected[1], expected[1], rtol=0, atol=1e-4)
    assert (injected[0] - expected[0]).abs().max() > 0.01
    with_bias = make_adapter(targets, 1, scaling=8.0)
    assert_one_line_value_error(lambda: a + with_bias, "rank of the bias block 0 and 3")


def test_empty_adapter_equals_base_model_and_is_not_saved(targets, tmp_path):
    base_model, empty = make_base_model(), make_adapter(targets, 0, bias=False)
    assert (empty.rank, empty.num_bytes) == (0, 0)
    ids = torch.arange(2, 16).view(2, 7)
    with torch.no_grad():
        plain = base_model(ids).logits
        injector = LoRAInjector(base_model, targets)
        with injector.using(empty):
            assert torch.equal(base_model(ids).logits, plain)
        with injector.using([empty, make_adapter(targets, 1, bias=False)]):
            mixed = base_model(ids).logits
    torch.testing.assert_close(mixed[0], plain[0], rtol=0, atol=1e-5)
    assert (mixed[1] - plain[1]).abs().max() > 0.01
    assert_one_line_value_error(lambda: empty.save(tmp_path / "empty"), "This adapter is empty: it has no documents")
    others = make_adapter(find_targets(base_model, ["up_proj"]), 0, bias=False)
    assert_one_line_value_error(lambda: injector.pool(others), "The adapter is for up_proj")
    assert not list(tmp_path.iterdir())


def test_concatenated_has_the_bias_block_in_the_last_rows(targets):
    adapter = make_adapter(targets, 2)
    for name, (A, B) in adapter.concatenated().items():
        assert A.shape[1] == B.shape[1] == 3 * RANK
        for layer in range(2):
            expected = sum(adapter.B[name][c, layer].T @ adapter.A[name][c, layer] for c in range(2))
            expected = expected + adapter.bias_B[name][layer].T @ adapter.bias_A[name][layer]
            torch.testing.assert_close(B[layer].T @ A[layer], expected)
        assert torch.equal(A[:, -RANK:], adapter.bias_A[name]) and torch.equal(B[:, -RANK:], adapter.bias_B[name])


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_provenance_may_have_a_byte_order_mark(saved, encoding):
    path, before = saved / "provenance.json", LoRAAdapter.load(saved).provenance
    path.write_text(path.read_text(encoding="utf-8"), encoding=encoding)
    assert LoRAAdapter.load(saved).provenance == before


@pytest.mark.parametrize(
    "change, message",
    [
        ({"A": {}}, r"Expected A for the targets \['down_proj', 'q_proj'\], got \[\]"),
        ({"targets": ()}, "Expected A for the targets"),
        ({"A": {"down_proj": torch.zeros(2, RANK, 48), "q_proj": torch.zeros(2, RANK, 32)}}, "down_proj do not fit"),
        (
            {"bias_A": {"down_proj": torch.zeros(2, RANK, 47), "q_proj": torch.zeros(2, RANK, 32)}},
            "down_proj do not fit",
        ),
        ({"provenance": {"documents": []}}, r"Expected provenance with documents, .*Make it with new_provenance\(\)"),
        ({"provenance": dict.fromkeys(PROVENANCE_KEYS, "x")}, "name and fingerprint in base_model"),
    ],
)
def test_adapter_refuses_weights_that_mismatch_provenance(targets, change, message):
    adapter = make_adapter(targets)
    fields = {name: getattr(adapter, name) for name in adapter.__dataclass_fields__} | change
    assert_one_line_value_error(lambda: LoRAAdapter(**fields), message)


def test_sum_keeps_chunk_order_and_one_bias_block(targets):
    a, b = make_adapter(targets, 2, seed=1), make_adapter(targets, 1, seed=2)
    both, swapped = a + b, b + a
    assert both.num_chunks == 3 and both.rank == 4 * RANK
    for field in ("A", "B"):
        for name in NAMES:
            one, two = getattr(a, field)[name], getattr(b, field)[name]
            assert torch.equal(getattr(both, field)[name], torch.cat([one, two]))
            assert torch.equal(getattr(swapped, field)[name], torch.cat([two, one]))
    assert all(torch.equal(both.bias_A[name], a.bias_A[name]) for name in NAMES)
    assert both.provenance["documents"] == [document("d1", 2), document("d2", 1)]
    assert swapped.provenance["documents"] == [document("d2", 1), document("d1", 2)]
    assert both.provenance["generator"] == "generator-1"
    assert both.provenance["base_model"] == {"name": "tiny-llama", "fingerprint": "base-1"}
    assert a.num_chunks == 2 and len(a.provenance["documents"]) == 1
    for name in NAMES:  # the summed weights commute
        (A, B), (A_swapped, B_swapped) = both.concatenated()[name], swapped.concatenated()[name]
        torch.testing.assert_close(B.mT @ A, B_swapped.mT @ A_swapped)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"generator": "generator-2"}, "hypernetwork generator-1 and generator-2"),
        ({"base_model_fingerprint": "base-2"}, "base model base-1 and base-2"),
        ({"bias_seed": 5}, "different bias blocks for"),
        ({"scaling": 1.0}, "scaling 45.25 and 1.0"),
        ({"rank": 4}, "rank per chunk 3 and 4"),
        ({"dtype": torch.bfloat16}, r"agree in dtype and device, got torch.float32 on cpu and torch.bfloat16"),
    ],
)
def test_add_refuses_adapters_of_another_generator(targets, change, message):
    assert_one_line_value_error(lambda: make_adapter(targets) + make_adapter(targets, seed=2, **change), message)


def test_add_refuses_other_targets_and_other_types(targets):
    assert_one_line_value_error(lambda: make_adapter(targets) + make_adapter(targets[:1]), "have targets")
    with pytest.raises(TypeError):
        make_adapter(targets) + 1


# On disk


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("num_chunks", [0, 1, 3])
def test_save_load_roundtrip_is_exact(targets, tmp_path, num_chunks, dtype):
    adapter = make_adapter(targets, num_chunks, dtype=dtype)
    folder = tmp_path / "made" / "on the way" / "adapter"
    adapter.save(folder)
    assert_same(LoRAAdapter.load(folder), adapter)
    assert sorted(path.name for path in folder.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "provenance.json",
    ]
    assert [path.name for path in folder.parent.iterdir()] == ["adapter"]
    assert len({path.stat().st_mode for path in folder.iterdir()}) == 1


def test_sum_roundtrips_and_loaded_adapter_can_be_added(targets, tmp_path):
    a, b = make_adapter(targets, 2, seed=1), make_adapter(targets, 1, seed=2)
    (a + b).save(tmp_path / "both")
    a.save(tmp_path / "a")
    again = LoRAAdapter.load(tmp_path / "both")
    fresh = LoRAAdapter.load(str(tmp_path / "a")) + b
    for name in NAMES:
        assert torch.equal(again.A[name], fresh.A[name]) and torch.equal(again.B[name], fresh.B[name])
    assert again.provenance["documents"] == fresh.provenance["documents"]


def test_peft_config_has_alpha_of_scaling_times_total_rank(targets, tmp_path):
    make_adapter(targets, 2).save(tmp_path / "a")
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert config["r"] == 3 * RANK and config["lora_alpha"] == SCALING * 3 * RANK
    assert config["target_modules"] == sorted(path for target in targets for path in target.paths)
    assert (config["peft_type"], config["task_type"]) == ("LORA", "CAUSAL_LM")
    assert config["base_model_name_or_path"] == "tiny-llama"
    provenance = json.loads((tmp_path / "a" / "provenance.json").read_text())
    assert (provenance["format_version"], provenance["rank"], provenance["num_chunks"]) == (1, 3 * RANK, 2)


@pytest.fixture
def base_model_folder(tmp_path, monkeypatch):
    """tmp_path/models/base with a config.json, the user in tmp_path and at home in tmp_path/models."""
    folder = tmp_path / "models" / "base"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (tmp_path / "link").symlink_to(folder)
    monkeypatch.setenv("HOME", str(tmp_path / "models"))
    monkeypatch.chdir(tmp_path)
    return folder


def peft_base_model(folder):
    return json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]


@pytest.mark.parametrize("name", ["models/base", "./models/base/", "models/../models/base", "~/base", "link"])
def test_peft_config_names_a_local_base_model_absolutely(targets, tmp_path, base_model_folder, monkeypatch, name):
    adapter = make_adapter(targets, base_model_name=name)
    monkeypatch.chdir("/")  # where it is saved does not count
    adapter.save(tmp_path / "a")
    assert peft_base_model(tmp_path / "a") == str(base_model_folder)


@pytest.mark.parametrize("name", ["org/model", "models", "models/none", "", None])
def test_peft_config_keeps_the_name_of_a_hub_model(targets, tmp_path, base_model_folder, name):
    make_adapter(targets, base_model_name=name).save(tmp_path / "a")
    assert peft_base_model(tmp_path / "a") == name


def test_adapter_with_a_relative_base_model_still_loads(targets, tmp_path, base_model_folder):
    adapter = make_adapter(targets, base_model_name="elsewhere")
    adapter.provenance["base_model"]["name"] = "models/base"  # as version 0.1 wrote it
    adapter.save(tmp_path / "old")
    again = LoRAAdapter.load(tmp_path / "old", base_model_fingerprint="base-1")
    assert_same(again, adapter)
    assert peft_base_model(tmp_path / "old") == str(base_model_folder)


@pytest.mark.parametrize("names", [["down_proj"], NAMES, ["q_proj", "k_proj", "o_proj", "gate_proj", "down_proj"]])
def test_peft_gives_the_logits_of_the_injection(tmp_path, names):
    from peft import PeftModel

    base_model = make_base_model()
    adapter = make_adapter(find_targets(base_model, names), 3, scaling=8.0)
    ids = torch.arange(2, 16).view(2, 7)
    with torch.no_grad():
        plain = base_model(ids).logits
        with LoRAInjector(base_model, adapter.targets).using(adapter):
            injected = base_model(ids).logits
        adapter.save(tmp_path / "adapter")
        peft_model = PeftModel.from_pretrained(make_base_model(), tmp_path / "adapter")
        logits = peft_model(ids).logits
    torch.testing.assert_close(logits, injected, rtol=0, atol=1e-4)
    assert (injected - plain).abs().max() > 0.01
    adapted = {path.removeprefix("base_model.model.") for path, m in peft_model.named_modules() if hasattr(m, "lora_A")}
    assert adapted == {path for target in adapter.targets for path in target.paths}


def no_space(*args, **kwargs):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def no_space_in_safetensors(*args, **kwargs):
    raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


@pytest.mark.parametrize("failure", [no_space, no_space_in_safetensors])
def test_save_on_full_disk_leaves_no_files(targets, tmp_path, monkeypatch, failure):
    monkeypatch.setattr("safetensors.torch.save_file", failure)
    with pytest.raises(OSError) as caught:
        make_adapter(targets).save(tmp_path / "made" / "adapter")
    assert caught.value.errno == errno.ENOSPC
    assert list(tmp_path.iterdir()) == []


def test_save_write_failure_raises_oserror_and_leaves_no_files(targets, tmp_path):
    adapter = make_adapter(targets, 3, rank=64)
    adapter._peft_config()  # imports what may want to write its bytecode
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(OSError) as caught:
            adapter.save(tmp_path / "adapter")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert caught.value.errno == errno.EFBIG
    assert list(tmp_path.iterdir()) == []


def test_failed_overwrite_keeps_old_adapter(targets, tmp_path, monkeypatch):
    old = make_adapter(targets, 1)
    old.save(tmp_path / "adapter")
    monkeypatch.setattr("safetensors.torch.save_file", no_space)
    with pytest.raises(OSError):
        make_adapter(targets, 3).save(tmp_path / "adapter", overwrite=True)
    assert_same(LoRAAdapter.load(tmp_path / "adapter"), old)
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_failed_rename_restores_old_adapter(targets, tmp_path, monkeypatch):
    old = make_adapter(targets, 1)
    old.save(tmp_path / "adapter")
    rename = hypernet.adapters.adapter.Path.rename

    def refuse_new(self, target):
        if self.name.endswith(".new"):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return rename(self, target)

    monkeypatch.setattr(hypernet.adapters.adapter.Path, "rename", refuse_new)
    with pytest.raises(OSError):
        make_adapter(targets, 3).save(tmp_path / "adapter", overwrite=True)
    assert_same(LoRAAdapter.load(tmp_path / "adapter"), old)
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_save_replaces_existing_folder_only_with_overwrite(targets, tmp_path):
    old, new = make_adapter(targets, 1), make_adapter(targets, 3, seed=2)
    old.save(tmp_path / "adapter")
    with pytest.raises(FileExistsError, match="exists and is not empty.*overwrite=True"):
        new.save(tmp_path / "adapter")
    assert_same(LoRAAdapter.load(tmp_path / "adapter"), old)
    new.save(tmp_path / "adapter", overwrite=True)
    assert_same(LoRAAdapter.load(tmp_path / "adapter"), new)
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_save_accepts_empty_folder_and_folder_symlink(targets, tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    adapter = make_adapter(targets)
    adapter.save(tmp_path / "link")
    assert_same(LoRAAdapter.load(tmp_path / "real"), adapter)
    assert (tmp_path / "link").is_symlink()


def test_overwrite_refuses_folder_that_is_no_adapter(targets, tmp_path):
    adapter = make_adapter(targets)
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match="is not replaced.*has no adapter_config.json"):
        adapter.save(tmp_path / "thesis", overwrite=True)
    adapter.save(tmp_path / "adapter")
    (tmp_path / "adapter" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"is not replaced.*also holds \['notes.txt'\]"):
        adapter.save(tmp_path / "adapter", overwrite=True)
    with pytest.raises(FileExistsError, match="is a file"):
        adapter.save(tmp_path / "adapter" / "notes.txt", overwrite=True)
    assert (tmp_path / "thesis" / "thesis.tex").read_text() == "years of work"
    check_destination(tmp_path / "nowhere")


@pytest.fixture
def saved(targets, tmp_path):
    make_adapter(targets).save(tmp_path / "adapter")
    return tmp_path / "adapter"


def test_load_checks_base_model_fingerprint_on_request(saved):
    LoRAAdapter.load(saved, base_model_fingerprint="base-1")
    assert_one_line_value_error(
        lambda: LoRAAdapter.load(saved, base_model_fingerprint="base-2"),
        "for the base model tiny-llama with fingerprint base-1, but this base model has base-2",
    )


def test_load_names_missing_folder_and_files(saved, tmp_path):
    assert_one_line_value_error(lambda: LoRAAdapter.load(tmp_path / "nowhere"), "No adapter folder at .*nowhere")
    (saved / "adapter_model.safetensors").unlink()
    assert_one_line_value_error(lambda: LoRAAdapter.load(saved), "adapter_model.safetensors missing")
    (saved / "provenance.json").unlink()
    assert_one_line_value_error(lambda: LoRAAdapter.load(saved), "adapter_model.safetensors, provenance.json missing")


def test_load_refuses_peft_folder_without_provenance(saved):
    (saved / "provenance.json").unlink()
    assert_one_line_value_error(lambda: LoRAAdapter.load(saved), "PEFT adapter without provenance.json.*PeftModel")


@pytest.mark.parametrize("kept", [0, 5, 200, -1])
def test_load_refuses_truncated_weights(saved, kept):
    weights = saved / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:kept])
    assert_one_line_value_error(lambda: LoRAAdapter.load(saved), "cannot be read .*cut off")


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", '{"format_version": 1}', '{"format_version": 1, "targets": [{}]}']
)
def test_load_refuses_damaged_provenance(saved, text):
    (saved / "provenance.json").write_text(text)
    assert_one_line_value_error(lambda: LoRAAdapter.load(saved), "provenance.json is damaged")


@pytest.mark.parametrize(
    "change, message",
    [
        ({"format_version": 2}, "has adapter format 2, this version reads format 1"),
        ({"rank": 10}, r"rank 10 is not 2 chunks \* 3, with or without 3 more"),
        ({"rank_per_chunk": 0, "rank": 0}, "rank 0 is not"),
        ({"num_chunks": "two"}, "provenance.json is damaged"),
        ({"base_model": None}, "provenance.json is damaged"),
        ({"num_chunks": 3, "rank": 12}, r"does not fit provenance.json: expected .* \[12, 48\], got \[9, 48\]"),
        ({"targets": []}, "holds weights that provenance.json does not name, such as base_model.model"),
    ],
)
def test_load_refuses_provenance_that_mismatches_weights(saved, change, message):
    provenance = json.loads((saved / "provenance.json").read_text())
    (saved / "provenance.json").write_text(json.dumps(provenance | change))
    assert_one_line_value_error(lambda: LoRAAdapter.load(saved), message)


def test_load_refuses_missing_and_surplus_weights(saved):
    weights = load_file(saved / "adapter_model.safetensors")
    key = "base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight"
    save_file({name: tensor for name, tensor in weights.items() if name != key}, saved / "adapter_model.safetensors")
    assert_one_line_value_error(lambda: LoRAAdapter.load(saved), r"q_proj.lora_B.weight \[32, 9\], got nothing")
    save_file(weights | {"surplus": torch.zeros(1)}, saved / "adapter_model.safetensors")
    assert_one_line_value_error(lambda: LoRAAdapter.load(saved), "such as surplus")
