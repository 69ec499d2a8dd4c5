"""The base model's training: its loss against single prompts, what it refuses, what it writes."""

import pytest
import torch

from hypernet.base.base_model import fingerprint, load_base_model
from hypernet.training.run_state import find_checkpoint
from tests.small_trainings import make_trainer, quietly

SMALL = {"vocab_size": 600, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}


def test_base_model_loss_is_that_of_single_prompts(make_module, make_data):
    module, batch = quietly(make_module("base_model", document_weight=0.25)), make_data("base_model").train[1]
    loss = module.training_step(batch, 0)
    answers, weights, documents = [], [], []
    for row in range(len(batch.ids)):
        segments, ids = batch.segments[row], batch.ids[row]
        prefix = ids[segments == 0]
        with torch.no_grad():
            log_p = module.base_model(prefix[None]).logits[0].double().log_softmax(-1)
        documents += [-float(log_p[i, prefix[i + 1]]) for i in range(len(prefix) - 1)]
        for number in range(1, int(segments.max()) + 1):
            own = segments == number
            before = prefix if batch.sees_prefix[row, own].all() else prefix[:0]
            prompt = torch.cat([before, ids[own]])
            with torch.no_grad():
                log_p = module.base_model(prompt[None]).logits[0].double().log_softmax(-1)
            for i, place in enumerate(own.nonzero()[:, 0].tolist()):
                if batch.target_kind[row, place] >= 0:
                    answers.append(-float(log_p[len(before) + i, ids[place + 1]]))
                    weights.append(float(batch.target_weight[row, place]))
    assert set(weights) == {0.5, 1.0}  # reorderings count half
    answer_loss = sum(a * w for a, w in zip(answers, weights, strict=True)) / sum(weights)
    assert loss.item() == pytest.approx(answer_loss + 0.25 * sum(documents) / len(documents), rel=1e-4)


def test_base_model_of_another_size_is_refused_in_one_line(tmp_path, make_module, make_data, tiny_base_model):
    make_trainer(tmp_path, max_steps=1).fit(make_module("base_model"), make_data("base_model"))
    module = make_module("base_model")
    module.base_model = type(tiny_base_model)(type(tiny_base_model.config)(**SMALL))
    with pytest.raises(ValueError, match="of another base model: .* more differ.") as error:
        path = find_checkpoint("last", tmp_path / "checkpoints")
        make_trainer(tmp_path, max_steps=2).fit(module, make_data("base_model"), ckpt_path=path)
    assert "\n" not in str(error.value)


def test_trained_base_model_can_be_loaded(tmp_path, make_module, make_data):
    module = make_module("base_model", output_dir=str(tmp_path / "base_model"))
    make_trainer(tmp_path, max_steps=1).fit(module, make_data("base_model"))
    base_model, tokenizer = load_base_model(tmp_path / "base_model")
    assert fingerprint(base_model) == fingerprint(module.base_model)
    assert tokenizer.get_vocab() == module.tokenizer.get_vocab() and tokenizer.chat_template
