"""Models that the published format can express, and files of them."""

from pathlib import Path

import pytest

from hypernet.doc_to_lora import DocToLoRA
from hypernet.interop.checkpoints import PUBLISHED_MAX_CHUNK_TOKENS
from tests.interop.published.published_files import published_content, save

AGGREGATOR = {
    **{"name": "perceiver", "latent_dim": 16, "num_latents": 3, "num_blocks": 2},
    **{"num_heads": 2, "num_kv_heads": 1, "head_dim": 128, "mlp_multiple": 2, "projection_multiple": 3},
}


@pytest.fixture
def make(make_doc_to_lora):
    """A model with random weights that the format can express; changes as those of DocToLoRA.build's hypernetwork."""

    def make(*, target_modules=("down_proj",), context_encoder=None, aggregator=None, **hypernetwork) -> DocToLoRA:
        return make_doc_to_lora(
            target_modules=list(target_modules),
            context_encoder=context_encoder or {"kind": "per_layer_activations"},
            hypernetwork={"rank": 4, "aggregator": {**AGGREGATOR, **(aggregator or {})}, **hypernetwork},
            max_chunk_tokens=PUBLISHED_MAX_CHUNK_TOKENS,
        )

    return make


@pytest.fixture
def file(make, tmp_path) -> Path:
    return save(published_content(make()), tmp_path / "pytorch_model.bin")
