"""Where published checkpoints are found: files, folders, numbered checkpoints, and the hub's cache without network."""

import huggingface_hub.constants
import pytest

from hypernet.doc_to_lora import DocToLoRA
from hypernet.interop.checkpoints import open_checkpoint
from hypernet.interop.published import find_published, is_published
from tests.interop.published.published_files import assert_same_adapters, hub_cache, published_content, refusal, save


def test_hub_path_reads_the_cache_and_takes_the_last_checkpoint(make, file, tmp_path, monkeypatch):
    other = save(published_content(make(rank=2)), tmp_path / "other.bin")
    files = {
        "gemma_demo/checkpoint-9000/pytorch_model.bin": other,
        "gemma_demo/checkpoint-80000/pytorch_model.bin": file,
        "qwen_4b_d2l/checkpoint-20000/pytorch_model.bin": other,
    }
    cache = hub_cache(tmp_path / "hub", files)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    for name in (
        "gemma_demo",
        "gemma_demo/",
        "gemma_demo/checkpoint-80000",
        "gemma_demo/checkpoint-80000/pytorch_model.bin",
    ):
        source = f"hub:SakanaAI/doc-to-lora/{name}"
        assert is_published(source)
        assert open_checkpoint(source).hypernetwork.rank == 4
    assert_same_adapters(
        DocToLoRA.from_pretrained("hub:SakanaAI/doc-to-lora/gemma_demo"), DocToLoRA.from_pretrained(file)
    )
    assert "in its folders gemma_demo, qwen_4b_d2l. Name one" in refusal("hub:SakanaAI/doc-to-lora")
    assert "There is no pytorch_model.bin in hub:SakanaAI/doc-to-lora/none" in refusal("hub:SakanaAI/doc-to-lora/none")


def test_published_hub_without_network_or_cache_fails(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    assert "Cannot get SakanaAI/doc-to-lora from the hub" in refusal("hub:SakanaAI/doc-to-lora/gemma_demo")


@pytest.mark.parametrize("source", ["hub:", "hub:SakanaAI", "hub:a/../../b", "hub:a/b/../c", "hub:a b/c", "hub:/a/b"])
def test_published_refuses_impossible_hub_names(source):
    assert "names nothing on the hub. Write hub:owner/repository/name" in refusal(source)


def test_published_folder_is_resolved_to_its_checkpoint(file, tmp_path):
    numbered = tmp_path / "runs/gemma/checkpoint-100/pytorch_model.bin"
    numbered.parent.mkdir(parents=True)
    numbered.write_bytes(file.read_bytes())
    assert find_published(tmp_path) == file
    assert find_published(tmp_path / "runs/gemma") == numbered
    assert "runs holds checkpoints in its folders gemma. Name one:" in refusal(tmp_path / "runs")
    (tmp_path / "empty").mkdir()
    assert not is_published(tmp_path / "empty")
    assert "config.yaml is missing" in refusal(tmp_path / "empty")
