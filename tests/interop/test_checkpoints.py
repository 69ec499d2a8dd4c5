"""Checkpoints from wherever they come, and their conversion: the same model, all or nothing, errors in one line."""

import os
import pickle
from pathlib import Path

import huggingface_hub
import pytest

from hypernet.base.base_model import build_base_model
from hypernet.doc_to_lora import DocToLoRA
from hypernet.interop.checkpoints import open_checkpoint
from hypernet.model import checkpoint as checkpoint_module
from tests.cli.command import hypernet
from tests.interop.published.published_files import (
    Calls,
    assert_same_adapters,
    hub_cache,
    published_content,
    save,
    with_pickle,
)

ROOT = Path(__file__).parents[2]


# Conversion


def convert(source: str | Path, output_dir: Path, *options: str | Path) -> int:
    """The exit status of the command."""
    return hypernet("checkpoint", "convert", "--source", source, "--output-dir", output_dir, *options)


def test_converted_checkpoint_is_the_same_model(file, tmp_path, capsys):
    assert convert(file, tmp_path / "out") == 0
    assert "rank 4, down_proj in 2 layers" in capsys.readouterr().out
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["config.yaml", "hypernetwork.safetensors"]
    assert "fingerprint: null" in (tmp_path / "out/config.yaml").read_text()
    converted = DocToLoRA.from_pretrained(tmp_path / "out")
    assert_same_adapters(DocToLoRA.from_pretrained(file), converted)
    adapter = converted.internalize("Norbach was founded by Ilda Renwick.")
    assert converted.generate(["Who founded Norbach?"], adapter, max_new_tokens=2)
    assert adapter.provenance["base_model"]["fingerprint"] == converted.base_model_fingerprint


def test_converted_checkpoint_keeps_shared_blocks(make, tmp_path):
    model = make(aggregator={"num_blocks": 3, "num_self_attention_blocks": 1, "share_blocks": True})
    path = save(published_content(model), tmp_path / "pytorch_model.bin")
    assert convert(path, tmp_path / "out") == 0
    assert_same_adapters(model, DocToLoRA.from_pretrained(tmp_path / "out"))


def test_convert_needs_no_base_model_weights(file, tmp_path, tiny_base_model_folder):
    (tmp_path / "only").mkdir()
    (tmp_path / "only/config.json").write_bytes((tiny_base_model_folder / "config.json").read_bytes())
    arguments = ["--base-model", tmp_path / "only", "--max-chunk-tokens", "77"]
    assert convert(file, tmp_path / "out", *arguments) == 0
    assert open_checkpoint(tmp_path / "out").max_chunk_tokens == 77
    assert open_checkpoint(tmp_path / "out").base_model == str(tmp_path / "only")


def test_convert_replaces_output_only_with_overwrite(file, tmp_path, capsys):
    out = tmp_path / "out"
    assert convert(file, out) == 0
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    assert convert(file, out, "--max-chunk-tokens", "5") == 1
    assert "exists and is not empty" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert convert(file, out, "--max-chunk-tokens", "5", "--overwrite") == 0
    assert open_checkpoint(out).max_chunk_tokens == 5
    (out / "notes.txt").write_text("mine")
    assert convert(file, out, "--overwrite") == 1
    assert "it also holds ['notes.txt']" in capsys.readouterr().err and (out / "notes.txt").exists()


@pytest.mark.parametrize("existing", [False, True])
def test_failing_convert_leaves_output_unchanged(file, tmp_path, monkeypatch, capsys, existing):
    out = tmp_path / "out"
    if existing:
        assert convert(file, out, "--overwrite") == 0
    before = {path.name: path.read_bytes() for path in out.iterdir()} if existing else None

    def full(*_, **__):
        raise OSError(28, "No space left on device", str(out))

    monkeypatch.setattr(checkpoint_module.yaml, "safe_dump", full)
    assert convert(file, out, "--overwrite") == 1
    assert capsys.readouterr().err.count("\n") == 1
    assert (before is None and not out.exists()) or {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert {path.name for path in tmp_path.iterdir()} <= {"pytorch_model.bin", "out"}


def test_converted_checkpoint_refuses_another_base_model(file, tmp_path, tiny_tokenizer):
    assert convert(file, tmp_path / "out") == 0
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
    base_model = build_base_model({"model_type": "llama", **sizes, "vocab_size": len(tiny_tokenizer)})
    base_model.save_pretrained(tmp_path / "other")
    tiny_tokenizer.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="reads 2 feature maps of width 32 .* gives 3 of width 32"):
        DocToLoRA.from_pretrained(tmp_path / "out", base_model=tmp_path / "other")


# The commands


def test_convert_command_reads_the_hub_cache(file, tmp_path, monkeypatch):
    cache = hub_cache(tmp_path / "hub", {"gemma_demo/checkpoint-80000/pytorch_model.bin": file})
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    source = ("--source", "hub:SakanaAI/doc-to-lora/gemma_demo")
    assert hypernet("checkpoint", "convert", *source, "--output-dir", tmp_path / "out") == 0
    assert open_checkpoint(tmp_path / "out").hypernetwork.rank == 4


def test_convert_command_refuses_malicious_file(commands, tmp_path):
    program = pickle.dumps({"a": Calls(os.mkdir, str(tmp_path / "DAMAGE"))}, protocol=2)
    path = with_pickle(tmp_path / "pytorch_model.bin", program)
    arguments = ["checkpoint", "convert", "--source", str(path), "--output-dir", str(tmp_path / "out")]
    result = commands.run("hypernet", arguments, cwd=ROOT)
    assert result.code == 1 and "it asks for posix.mkdir" in result.stderr.splitlines()[-1]
    assert "Traceback" not in result.stderr and not result.stdout
    assert sorted(p.name for p in tmp_path.iterdir()) == ["pytorch_model.bin"]


def test_generate_adapter_accepts_published_file(commands, file, tmp_path):
    document = tmp_path / "document.txt"
    document.write_text("Norbach was founded by Ilda Renwick.")
    arguments = [f"document={document}", f"output_dir={tmp_path / 'adapter'}", f"checkpoint={file}", "device=cpu"]
    result = commands.run("generate_adapter.py", arguments, cwd=ROOT)
    assert result.code == 0, result.stderr
    assert (tmp_path / "adapter/adapter_model.safetensors").is_file()
