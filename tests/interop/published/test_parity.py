"""A small checkpoint in the published Doc-to-LoRA format gives what its authors' code computed from it.

The file lies next to the repository, in shared/parity; without it these tests are skipped.
"""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from hypernet.adapters.adapter import LoRAAdapter, new_provenance
from hypernet.base.tokenizer import CHAT_TEMPLATE
from hypernet.doc_to_lora import DocToLoRA
from hypernet.interop.checkpoints import convert

FOLDER = Path(__file__).parents[4] / "shared" / "parity" / "reference_tiny"
pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason=f"needs the reference tensors in {FOLDER}")

# The entries of A and B are about 0.002, so their bound is far below the 1e-5 that is asked for.
MATRICES, LOGITS = {"rtol": 0, "atol": 1e-7}, {"rtol": 0, "atol": 1e-5}


@pytest.fixture(scope="module", params=["published", "converted"])
def model(request, tmp_path_factory) -> DocToLoRA:
    source, base_model = FOLDER, tmp_path_factory.mktemp("parity") / "base_model"
    shutil.copytree(FOLDER / "base_model", base_model)
    # Its tokenizer has no chat template, and questions need one; the reference's tensors do not depend on it.
    base_model.chmod(0o755)
    (base_model / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    if request.param == "converted":
        source = base_model.parent / "checkpoint"
        convert(source=str(FOLDER / "pytorch_model.bin"), output_dir=str(source), base_model=str(base_model))
        base_model = None
    return DocToLoRA.from_pretrained(source, base_model=base_model, attention="eager")


@pytest.fixture(scope="module")
def expected() -> dict[str, torch.Tensor]:
    return load_file(FOLDER / "expected.safetensors")


@pytest.fixture
def adapters(model, expected) -> list[LoRAAdapter]:
    """One adapter per document, of the reference's chunks."""
    with torch.no_grad():
        A, B = model.adapt(expected["ctx_ids"], expected["ctx_mask"])
    provenance = new_provenance(
        [], generator=None, base_model_name="tiny-gemma2", base_model_fingerprint=model.base_model_fingerprint
    )
    split = {"A": A["down_proj"], "B": B["down_proj"]}
    chunks = {letter: tensor.split(expected["n_chunks"].tolist()) for letter, tensor in split.items()}
    return [
        LoRAAdapter(
            targets=model.hypernetwork.targets,
            A={"down_proj": A},
            B={"down_proj": B},
            bias_A=dict(model.hypernetwork.bias_A.items()),
            bias_B=dict(model.hypernetwork.bias_B.items()),
            scaling=model.hypernetwork.scaling,
            provenance=provenance,
        )
        for A, B in zip(chunks["A"], chunks["B"], strict=True)
    ]


def test_parity_of_the_matrices_of_every_chunk(adapters, expected):
    for letter in "AB":
        chunks = torch.cat([getattr(adapter, letter)["down_proj"] for adapter in adapters])
        torch.testing.assert_close(chunks, expected[f"chunk.down_proj.{letter}"], **MATRICES)


def test_parity_of_document_adapters_with_bias_block(adapters, expected):
    for i, adapter in enumerate(adapters):
        for letter, ours in zip("AB", adapter.concatenated()["down_proj"], strict=True):
            theirs = expected[f"combined.down_proj.{letter}"][i]
            torch.testing.assert_close(ours, theirs[:, : ours.shape[1]], **MATRICES)
            assert not theirs[:, ours.shape[1] :].any()  # padding up to the longest document


def test_parity_of_adapted_base_model_logits(model, adapters, expected):
    with torch.no_grad(), model.injector.using(adapters):
        torch.testing.assert_close(model.base_model(expected["query_ids"]).logits, expected["logits_adapted"], **LOGITS)
    assert (expected["logits_adapted"] - expected["logits_base"]).abs().max() > 1e-3


def test_parity_of_base_model_logits(model, expected):
    with torch.no_grad():
        torch.testing.assert_close(model.base_model(expected["query_ids"]).logits, expected["logits_base"], **LOGITS)


def test_published_model_internalizes_and_answers(model):
    adapter = model.internalize("Norbach was founded by Ilda Renwick.")
    assert len(model.generate(["Who founded Norbach?"], adapter, max_new_tokens=2)) == 1
