"""Settings and fixtures of all tests: no network, one torch thread per process, Triton's interpreter without a GPU.

The environment is set before torch, transformers and triton are imported: they read it once. Mark a test that needs a
GPU, or bf16 in a Triton kernel, with `@pytest.mark.requires_gpu`; it is skipped elsewhere.
`TRITON_INTERPRET=1 make test` interprets the kernels on a GPU machine too.
"""

import gc
import logging
import os
import sys
from copy import deepcopy

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["WANDB_MODE"] = "offline"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["OMP_NUM_THREADS"] = "1"

import absl.logging
import pytest
import torch

from tests.quick_settings import compose_quickly

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    # Read by @triton.jit at decoration time, and torch does not import triton, so this is early enough.
    os.environ["TRITON_INTERPRET"] = "1"

torch.set_num_threads(1)
gc.disable()  # until the tests are imported, see pytest_collection_finish

# rouge-score imports absl, whose handler closes its stream when Hydra sets up logging, unless it is one of sys's: made
# within a test it would have pytest's, and every later test of that process would fail.
absl.logging.get_absl_handler().python_handler.setStream(sys.__stderr__)


@pytest.fixture(autouse=True)
def seed_of_torch() -> None:
    torch.manual_seed(0)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("requires_gpu") is None:
        return
    if not HAS_GPU:
        pytest.skip("needs a CUDA device, none found here")
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("needs compiled kernels, but TRITON_INTERPRET=1 is set")


# Processes take the files in this order (--no-loadscope-reorder): a long one at the end would leave the others idle.
LONGEST_FILES = (
    *("test_datamodule.py", "test_train.py", "test_logs.py", "test_survival.py", "test_docs.py", "test_configs.py"),
    *("test_lora_delta.py", "test_run.py", "test_token_store.py", "test_callbacks.py", "test_generate_adapter.py"),
    *("test_training_speed.py", "test_consolidation.py", "test_serve.py", "test_protocol.py", "test_vllm_engine.py"),
    *("test_memories.py", "test_tasks.py", "test_sharding.py", "test_app.py"),
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    order = {name: place for place, name in enumerate(LONGEST_FILES)}
    items.sort(key=lambda item: order.get(item.path.name, len(order)))
    for item in items if "HYPERNET_STORIES" not in os.environ else ():
        if story := item.get_closest_marker("story"):
            (seconds,) = story.args
            item.add_marker(pytest.mark.skip(reason=f"a story of {seconds} s: make test-all (HYPERNET_STORIES=1)"))


def pytest_collection_finish() -> None:
    """What is imported by now stays, and the collector need not go through it again and again."""
    gc.freeze()
    gc.enable()
    gc.set_threshold(10_000)  # for Python's 700: settings are small objects by the thousand, a tenth of their time


@pytest.fixture(autouse=True, scope="session")
def settings_composed_quickly():
    with pytest.MonkeyPatch.context() as patch:
        compose_quickly(patch)
        yield


@pytest.fixture(autouse=True, scope="module")
def memories_made_quickly(request):
    from tests.quick_memories import MAKING, make_quickly

    with pytest.MonkeyPatch.context() as patch:
        if request.path.name not in MAKING:
            make_quickly(patch)
        yield


@pytest.fixture(autouse=True)
def no_handlers_left():
    """Hydra's log handlers write to the streams of the test that started it, which are closed after it."""
    yield
    root = logging.getLogger()
    for handler in [handler for handler in root.handlers if type(handler) is logging.StreamHandler]:
        root.removeHandler(handler)


@pytest.fixture(scope="session")
def commands():
    """This project's commands, run without importing everything again (tests/forked_commands.py)."""
    from tests.forked_commands import Commands

    with Commands() as commands:
        yield commands


# --- Tiny tokenizer, base model and DocToLoRA. Imports are late, so that tests without them stay quick. ---


@pytest.fixture(scope="session")
def tiny_tokenizer():
    """A byte-level tokenizer of 600 tokens, trained on encyclopedia articles."""
    from hypernet.base.tokenizer import train_tokenizer
    from hypernet.data.encyclopedia import Encyclopedia

    articles = (Encyclopedia("train").record(i, num_facts=5) for i in range(150))
    texts = (text for record in articles for text in (record.document, *(q.text for q in record.questions)))
    return train_tokenizer(texts, vocab_size=600, model_max_length=512)


@pytest.fixture(scope="session")
def tiny_base_model_folder(tmp_path_factory, tiny_tokenizer):
    """A random Llama, hidden size 32, 2 layers, in transformers' format. Read it, do not write to it."""
    from hypernet.base.base_model import build_base_model

    config = {
        "model_type": "llama",
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "vocab_size": len(tiny_tokenizer),
        "pad_token_id": tiny_tokenizer.pad_token_id,
        "eos_token_id": tiny_tokenizer.eos_token_id,
        "bos_token_id": None,
    }
    base_model = build_base_model(config, seed=1)
    with torch.no_grad():
        for parameter in base_model.parameters():
            # The default weights are so small that every answer would be nearly the same.
            parameter.mul_(4 if parameter.ndim > 1 else 1)
    folder = tmp_path_factory.mktemp("tiny") / "base_model"
    base_model.save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def loaded_base_model(tiny_base_model_folder):
    """The tiny base model itself, of which tests take copies."""
    from hypernet.base.base_model import load_base_model

    return load_base_model(tiny_base_model_folder)[0]


@pytest.fixture
def tiny_base_model(loaded_base_model):
    """A fresh frozen copy of the tiny base model."""
    return deepcopy(loaded_base_model)


@pytest.fixture
def make_doc_to_lora(loaded_base_model, tiny_base_model_folder, tiny_tokenizer):
    """make_doc_to_lora(trained=True, seed=0, **changes): a DocToLoRA on a fresh copy of the tiny base model.

    trained: whether random numbers are added to the initial weights, so that adapters have an effect.
    bias_block: of the hypernetwork.
    """
    from hypernet.doc_to_lora import DocToLoRA

    def make(*, trained: bool = True, seed: int = 0, bias_block: bool = True, **changes) -> DocToLoRA:
        torch.manual_seed(seed)
        settings = {
            "base_model": deepcopy(loaded_base_model),  # 2 ms, loading takes 16
            "tokenizer": tiny_tokenizer,
            "target_modules": ["down_proj"],
            "hypernetwork": {
                "rank": 2,
                "bias_block": bias_block,
                "aggregator": {
                    **{"name": "perceiver", "latent_dim": 16, "num_latents": 3, "num_blocks": 2},
                    **{"num_heads": 2, "num_kv_heads": 1, "head_dim": 8},
                },
            },
            "context_encoder": {"kind": "per_layer_activations"},
            "max_chunk_tokens": 20,
            "base_model_source": str(tiny_base_model_folder),
        }
        model = DocToLoRA.build(**{**settings, **changes})
        if trained:
            with torch.no_grad():
                for parameter in model.hypernetwork.parameters():
                    parameter += 0.3 * torch.randn_like(parameter)
        return model

    return make
