"""A small checkpoint in the published Doc-to-LoRA format gives what its authors' code computed from it.

The file lies beside the repository, in shared/parity; without it this test is skipped.
"""

import io
import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from hypernet.adapter import find_targets
from hypernet.context_encoder import ContextEncoder
from hypernet.hypernetwork import HyperNetwork

CHECKPOINT = Path(__file__).parents[2] / "shared" / "parity" / "reference_tiny"
pytestmark = pytest.mark.skipif(not CHECKPOINT.is_dir(), reason=f"needs the reference tensors in {CHECKPOINT}")


class Record(dict):
    """Stands in for a pickled dataclass."""

    def __init__(self, *_):
        super().__init__()

    def __setstate__(self, state):
        self.update(state)


def read_published(path: Path) -> dict:
    """The checkpoint's dict; names outside a closed list are refused instead of imported."""
    archive = zipfile.ZipFile(path)
    root = archive.namelist()[0].split("/")[0]

    def rebuild_tensor(storage, offset, size, stride, *_):
        return storage.as_strided(size, stride, offset).clone()

    known = {
        **{("torch", "FloatStorage"): torch.float32, ("torch", "LongStorage"): torch.int64},
        ("torch._utils", "_rebuild_tensor_v2"): rebuild_tensor,
        ("collections", "OrderedDict"): OrderedDict,
        ("__builtin__", "set"): set,
        ("peft.utils.peft_types", "PeftType"): Record,
        ("peft.tuners.lora.config", "LoraConfig"): Record,
        ("peft.tuners.lora.config", "LoraRuntimeConfig"): Record,
        ("ctx_to_lora.configs", "CtxEncoderArguments"): Record,
        ("ctx_to_lora.modeling.aggregator", "AggregatorConfig"): Record,
        ("ctx_to_lora.modeling.hypernet", "HypernetConfig"): Record,
    }

    class Reader(pickle.Unpickler):
        def find_class(self, module, name):
            if (module, name) not in known:
                raise pickle.UnpicklingError(f"{module}.{name} is not allowed in a checkpoint")
            return known[module, name]

        def persistent_load(self, key):
            return torch.frombuffer(bytearray(archive.read(f"{root}/data/{key[2]}")), dtype=key[1])

    return Reader(io.BytesIO(archive.read(f"{root}/data.pkl"))).load()


def renamed(key: str) -> str:
    published = "aggregator.perceiver."
    return "aggregator." + key.removeprefix(published) if key.startswith(published) else "lora_head." + key


def test_the_matrices_of_every_chunk_and_document_equal_those_of_the_published_code():
    published = read_published(CHECKPOINT / "pytorch_model.bin")
    expected = load_file(CHECKPOINT / "expected.safetensors")
    base_model = AutoModelForCausalLM.from_pretrained(CHECKPOINT / "base_model", attn_implementation="eager")
    hypernetwork = HyperNetwork(
        targets=find_targets(base_model, ["down_proj"]),
        feature_dim=48,
        num_maps=3,
        aggregator={"name": "perceiver", "latent_dim": 64, "num_latents": 8, "num_blocks": 3},
    )
    assert hypernetwork.scaling == published["hypernet_config"]["lora_config"]["lora_alpha"]
    hypernetwork.load_state_dict({renamed(k): v for k, v in published.items() if isinstance(v, torch.Tensor)})

    with torch.no_grad():
        mask = expected["ctx_mask"]
        A, B = hypernetwork(ContextEncoder(base_model)(expected["ctx_ids"], mask), mask)
    for letter, matrices, bias in (("A", A, hypernetwork.bias_A), ("B", B, hypernetwork.bias_B)):
        chunks, bias = matrices["down_proj"], bias["down_proj"]
        # Entries are about 0.002, so the bound is far below the required 1e-5.
        torch.testing.assert_close(chunks, expected[f"chunk.down_proj.{letter}"], rtol=0, atol=1e-7)
        for combined, own in zip(
            expected[f"combined.down_proj.{letter}"], chunks.split(expected["n_chunks"].tolist()), strict=True
        ):
            wanted = torch.cat([*own, bias], dim=1)
            torch.testing.assert_close(wanted, combined[:, : wanted.shape[1]], rtol=0, atol=1e-7)
            assert not combined[:, wanted.shape[1] :].any()


def test_a_name_outside_the_closed_list_is_refused(tmp_path):
    path = tmp_path / "evil.bin"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("evil/data.pkl", pickle.dumps(Path))
    with pytest.raises(pickle.UnpicklingError, match="Path is not allowed"):
        read_published(path)
