"""Files that want to do harm, damaged ones and those of another kind: refused in one line, and nothing is executed."""

import io
import os
import pickle
import re
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from hypernet.doc_to_lora import DocToLoRA
from hypernet.interop.published import read_published
from tests.interop.published.published_files import (
    AsPickled,
    Calls,
    assert_same_adapters,
    published_content,
    refusal,
    save,
    with_pickle,
)

# Harm


def global_(name: str) -> bytes:
    module, _, name = name.rpartition(".")
    return f"c{module}\n{name}\n".encode()


HYPERNET = global_("ctx_to_lora.modeling.hypernet.HypernetConfig")
REBUILD = global_("torch._utils._rebuild_tensor_v2")
FLOATS = b"(X\x07\x00\x00\x00storage" + global_("torch.FloatStorage") + b"X\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x04tQ"


@pytest.mark.parametrize(
    ("program", "named"),
    [
        (global_("os.system") + b"X\x0c\x00\x00\x00touch DAMAGE\x85R.", "os.system"),
        (b"(X\x0c\x00\x00\x00touch DAMAGEios\nsystem\n.", "instruction b'i'"),  # INST
        (b"(" + global_("os.system") + b"X\x0c\x00\x00\x00touch DAMAGEo.", "os.system"),  # OBJ
        (b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x0ctouch DAMAGE\x85R.", "os.system"),  # STACK_GLOBAL
        (b"\x80\x02\x82\x01.", "instruction"),  # EXT1
        (b"\x80\x02I1\n.", "instruction"),
        (b"\x80\x05\x96\xff\xff\xff\xff\xff\xff\xff\x7f.", "instruction"),  # BYTEARRAY8 of 2^63 bytes
        (global_("builtins.eval") + b"X\x01\x00\x00\x001\x85R.", "builtins.eval"),
        (global_("__builtin__.getattr") + b".", "__builtin__.getattr"),
        (global_("builtins.__import__") + b".", "builtins.__import__"),
        (global_("torch._utils.torch.os.system") + b".", "torch._utils.torch.os.system"),
        (global_("torch.load") + b".", "torch.load"),
        (global_("ctx_to_lora.modeling.hypernet.HyperLoRA") + b".", "HyperLoRA"),
        (b"\x80\x04\x8c\x05torch\x8c\x10_utils.os.system\x93.", "torch._utils.os.system"),
        # Allowed names in use for something else.
        (HYPERNET + b")R.", "calls HypernetConfig"),
        (HYPERNET + b"K\x01\x85\x81.", "makes an object of HypernetConfig"),
        (global_("collections.OrderedDict") + b")\x81.", "makes an object"),
        (global_("collections.OrderedDict") + b"]\x85R.", "damaged"),
        (REBUILD + b"}X\x01\x00\x00\x00aK\x01sb.", "sets the state"),
        (HYPERNET + b"}X\x01\x00\x00\x00aK\x01sb.", "sets the state of HypernetConfig"),
        (HYPERNET + b")\x81]b.", "sets the state"),
        (HYPERNET + b")\x81)R.", "calls HypernetConfig"),
        (global_("__builtin__.set") + b"]K\x01a\x85R.", "set of something else than texts"),
        (b"}(K\x01K\x01K\x02K\x02u.", "other keys than texts"),
        (b"})K\x01s.", "other keys than texts"),
        (b"(X\x06\x00\x00\x00modulecos\nsystem\ntQ.", "os.system"),
        (b"(X\x06\x00\x00\x00moduleK\x01K\x01K\x01K\x01tQ.", "something else than a storage"),
        # Tensors that are none.
        (REBUILD + b"(" + FLOATS + b"K\x00K\x05\x85K\x01\x85\x89Nt" + b"R.", "beyond its 4 stored"),
        (REBUILD + b"(" + FLOATS + b"K\x01K\x04\x85K\x01\x85\x89Nt" + b"R.", "beyond its 4 stored"),
        (REBUILD + b"(" + FLOATS + b"K\x00K\x02\x85K\x04\x85\x89Nt" + b"R.", "beyond its 4 stored"),
        (REBUILD + b"(" + FLOATS + b"K\x00J\xff\xff\xff\xff\x85K\x01\x85\x89Nt" + b"R.", "none can be"),
        (REBUILD + b"(" + FLOATS + b"J\xff\xff\xff\xffK\x02\x85K\x01\x85\x89Nt" + b"R.", "none can be"),
        (REBUILD + b"(" + FLOATS + b"K\x00J\xff\xff\xff\x7f\x85K\x00\x85\x89Nt" + b"R.", "none can be"),
        (REBUILD + b"(" + FLOATS + b"K\x00K\x02\x85K\x01K\x01\x86\x89Nt" + b"R.", "none can be"),
        (REBUILD + b"(K\x01K\x00K\x02\x85K\x01\x85\x89Nt" + b"R.", "none can be"),
        (FLOATS.replace(b"K\x04tQ", b"K\x05tQ") + b".", "has 16 bytes for 5 numbers"),
        (FLOATS.replace(b"X\x01\x00\x00\x000", b"X\x0a\x00\x00\x00../../x/yz") + b".", "damaged"),
        (b")" + b"\x85" * 400_000 + b".", "does not hold a dict"),
        (b"}" + b")" + b"\x85" * 400_000 + b"K\x01s.", "other keys than texts"),
        (b"\x8b\x00\xff\x00\x00" + b"." * 99, "instruction"),
        (b"", "damaged"),
        (b"N", "damaged"),
        (b"\x80\x63.", "damaged"),
        (b"0.", "instruction"),
        (b"}(K\x01u.", "damaged|other keys"),
        (b"K\x01K\x02a.", "damaged"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_published_refuses_other_pickle_globals_by_name(tmp_path, monkeypatch, program, named):
    monkeypatch.chdir(tmp_path)
    path = with_pickle(tmp_path / "pytorch_model.bin", program, storages={"0": b"\0" * 16})
    message = refusal(path)
    assert re.search(named, message) and str(path) in message
    assert [p.name for p in tmp_path.iterdir()] == ["pytorch_model.bin"]


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("place", ["config", "peft", "encoder", "tensor", "key"])
def test_published_refuses_malicious_pickle_in_checkpoint(make, tmp_path, place, protocol):
    made = tmp_path / "DAMAGE"
    harm = Calls(os.mkdir, str(made))
    changes = {place: {"extra": [harm]}} if place in ("config", "peft", "encoder") else {}
    content = published_content(make(), changes=changes)
    if place == "tensor":
        content["head.weight"] = harm
    if place == "key":
        content[Calls(str, "x")] = 1
    kept = dict(sys.modules)
    sys.modules.update(AsPickled.modules)
    try:
        torch.save(content, tmp_path / "pytorch_model.bin", pickle_protocol=protocol)
    finally:
        for name in AsPickled.modules:
            sys.modules.pop(name)
        sys.modules.update(kept)
        AsPickled.modules.clear()
    message = refusal(tmp_path / "pytorch_model.bin")
    assert re.search(r"it asks for (posix|nt)\.mkdir|it asks for (__builtin__|builtins)\.(str|unicode)", message)
    assert "Nothing of it was executed. Get the file from its authors." in message
    assert not made.exists()


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_published_reads_every_pickle_protocol(make, tmp_path, protocol, monkeypatch):
    monkeypatch.setattr(torch.serialization, "DEFAULT_PROTOCOL", protocol)
    model = make()
    content = published_content(model)
    save_with = torch.save
    monkeypatch.setattr(torch, "save", lambda c, p: save_with(c, p, pickle_protocol=protocol))
    assert_same_adapters(model, DocToLoRA.from_pretrained(save(content, tmp_path / "pytorch_model.bin")))


def test_published_refuses_compressed_or_oversized_entries(tmp_path):
    bomb = with_pickle(tmp_path / "bomb.bin", b"N" * 10**8, compress=True)
    assert bomb.stat().st_size < 10**6
    assert "its entry data.pkl is compressed" in refusal(bomb)
    assert "its entry data.pkl has 5000000 bytes" in refusal(with_pickle(tmp_path / "large.bin", b"N" * 5_000_000))


def test_published_shared_storage_is_read_once(make, tmp_path):
    model = make(num_pre_head_blocks=30)
    content = published_content(model)
    block = {key: value for key, value in content.items() if key.startswith("layers.0.")}
    large = torch.zeros(sum(value.numel() for value in block.values()))
    for key, value in list(content.items()):
        if key.startswith("layers."):
            content[key] = large[: value.numel()].view(value.shape)
    assert "describes more numbers than it holds" in refusal(save(content, tmp_path / "pytorch_model.bin"))


# Damage


def outcome(path: Path, content: bytes, intact: dict[str, torch.Tensor]) -> str:
    """Reads the damaged file: refused in one line, or exactly the intact tensors."""
    path.write_bytes(content)
    try:
        published = read_published(path)
    except ValueError as error:
        assert "\n" not in str(error) and str(path) in str(error)
        return "refused"
    assert published.weights.keys() == intact.keys()
    assert all(torch.equal(published.weights[name], tensor) for name, tensor in intact.items())
    return "intact"


@pytest.fixture
def small(make, tmp_path) -> Path:
    model = make(aggregator={"latent_dim": 8, "num_blocks": 1, "num_heads": 1, "num_latents": 1}, rank=1)
    return save(published_content(model), tmp_path / "small.bin")


def test_published_refuses_file_truncated_anywhere(small, tmp_path):
    content, intact = small.read_bytes(), read_published(small).weights
    ends = [
        *range(0, 100, 9),
        *range(100, len(content), len(content) // 60),
        *range(len(content) - 60, len(content), 3),
    ]
    assert {outcome(tmp_path / "cut.bin", content[:end], intact) for end in ends} == {"refused"}


def test_published_file_with_flipped_bit_is_refused_or_equal(small, tmp_path):
    content, intact = small.read_bytes(), read_published(small).weights
    directory = zipfile.ZipFile(small).start_dir
    generator = torch.Generator().manual_seed(0)

    def places(start: int, end: int, count: int) -> list[int]:
        return torch.randint(8 * start, 8 * end, (count,), generator=generator).tolist()

    program = zipfile.ZipFile(small).getinfo("small/data.pkl").file_size
    chosen = [*places(0, program, 80), *places(program, directory, 120), *places(directory, len(content), 150)]
    outcomes = []
    for bit in chosen:
        damaged = bytearray(content)
        damaged[bit // 8] ^= 1 << bit % 8
        outcomes.append(outcome(tmp_path / "flipped.bin", bytes(damaged), intact))
    assert outcomes.count("refused") > len(outcomes) // 2


def test_published_changed_pickle_with_valid_crc_is_harmless(small, tmp_path):
    """What no checksum can notice: a flipped bit of the pickle in a zip that is made anew."""
    archive = zipfile.ZipFile(small)
    entries = {info.filename: archive.read(info) for info in archive.infolist()}
    program = entries["small/data.pkl"]
    generator = torch.Generator().manual_seed(1)
    for bit in torch.randint(0, 8 * len(program), (150,), generator=generator).tolist():
        damaged = bytearray(program)
        damaged[bit // 8] ^= 1 << bit % 8
        with zipfile.ZipFile(tmp_path / "changed.bin", "w") as changed:
            for name, content in entries.items():
                changed.writestr(name, bytes(damaged) if name == "small/data.pkl" else content)
        try:
            read_published(tmp_path / "changed.bin")
        except ValueError as error:
            assert "\n" not in str(error)


# Other files


def test_files_of_another_kind_are_refused_by_what_they_are(tmp_path):
    def wrong(content: bytes) -> str:
        (tmp_path / "pytorch_model.bin").write_bytes(content)
        return refusal(tmp_path / "pytorch_model.bin")

    legacy, zipped = io.BytesIO(), io.BytesIO()
    torch.save({"a": torch.ones(3)}, legacy, _use_new_zipfile_serialization=False)
    zipfile.ZipFile(zipped, "w").writestr("a/b", "c")
    assert "a file of torch before 1.6" in wrong(legacy.getvalue())
    assert "a bare pickle" in wrong(pickle.dumps({"a": 1}))
    assert "is a safetensors file" in wrong(b'\x10\x00\x00\x00\x00\x00\x00\x00{"a":{"dtype":"F32"}}')
    assert "is a Git LFS pointer" in wrong(b"version https://git-lfs.github.com/spec/v1\noid sha256:00")
    assert "is empty" in wrong(b"")
    assert "is not a zip file" in wrong(b"<!DOCTYPE html>")
    torch.save([1, 2], tmp_path / "list.bin")
    assert "does not hold a dict of tensors" in refusal(tmp_path / "list.bin")
    assert "not one that torch.save wrote" in wrong(zipped.getvalue())
    assert "there is no such folder" in refusal(tmp_path / "nothing.bin")
