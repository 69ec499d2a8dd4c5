"""A small DocToLoRA with random weights."""

import pytest


@pytest.fixture(scope="package")
def random_model(tiny_base_model_folder, tiny_tokenizer):
    import torch

    from hypernet.base.base_model import load_base_model
    from hypernet.doc_to_lora import DocToLoRA

    torch.manual_seed(3)
    model = DocToLoRA.build(
        base_model=load_base_model(tiny_base_model_folder)[0],
        tokenizer=tiny_tokenizer,
        target_modules=["down_proj"],
        hypernetwork={
            "rank": 2,
            "aggregator": {
                **{"name": "perceiver", "latent_dim": 16, "num_latents": 3, "num_blocks": 2},
                **{"num_heads": 2, "num_kv_heads": 1, "head_dim": 8},
            },
        },
        context_encoder={"kind": "per_layer_activations"},
        max_chunk_tokens=20,
        ridge=0.1,
    )
    with torch.no_grad():
        for parameter in model.hypernetwork.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return model.eval().requires_grad_(False)
