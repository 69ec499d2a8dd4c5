"""What the base model writes: greedy batches, where an answer ends, settings of the model that change nothing.

Variants of a base model are copies of its folder with one file edited.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from benchmarks.measuring.decoding import greedy as benchmark_greedy
from hypernet.base.base_model import build_base_model, load_base_model
from hypernet.base.generation import check_fits, decode_answer, end_ids, generate_ids, generate_text
from hypernet.data.self_study.engines import TransformersEngine
from hypernet.doc_to_lora import DocToLoRA

TINY = Path(__file__).parents[2] / "assets/tiny"
DOCUMENT = (TINY.parents[1] / "examples/fenda_elfax.txt").read_text(encoding="utf-8")
QUESTIONS = ["Who taught Fenda Elfax?", "Where was Fenda Elfax born?"]
END, PAD, USER, ASSISTANT = 3, 0, 1, 2


@pytest.fixture
def variant(tmp_path, tiny_base_model_folder):
    """variant(source=..., file={key: value}): a copy of a base model with keys of its JSON files set, None removes."""

    def make(source=tiny_base_model_folder, **files):
        folder = tmp_path / f"variant{len(list(tmp_path.iterdir()))}"
        shutil.copytree(source, folder)
        for name, changes in files.items():
            path = folder / f"{name}.json"
            values = {**json.loads(path.read_text()), **changes}
            path.write_text(json.dumps({key: value for key, value in values.items() if value is not None}))
        return folder

    return make


# Greedy batches


@torch.no_grad()
def greedy(base_model, tokenizer, prompt, max_new_tokens):
    """Independent reference: one prompt, no cache, argmax by hand."""
    ids = tokenizer(prompt)["input_ids"]
    answer = []
    while len(answer) < max_new_tokens:
        answer.append(int(base_model(torch.tensor([ids + answer])).logits[0, -1].argmax()))
        if answer[-1] == tokenizer.eos_token_id:
            break
    return tokenizer.decode(answer, skip_special_tokens=True).strip()


def test_generation_in_a_ragged_batch_equals_each_prompt_alone(tiny_base_model, tiny_tokenizer):
    prompts = ["A", "Who founded Norbach Works and when, in which town?", "Norbach\n\nWhere?", "<|user|>Hm<|end|>"]
    answers = generate_text(tiny_base_model, tiny_tokenizer, tiny_tokenizer(prompts)["input_ids"], max_new_tokens=9)
    assert answers == [greedy(tiny_base_model, tiny_tokenizer, prompt, 9) for prompt in prompts]
    assert len(set(answers)) > 1


def test_last_states_reach_the_output_embeddings_contiguous(tiny_base_model, tiny_tokenizer):
    """Of a slice torch would multiply a batch by as many copies of the output embeddings."""
    head, entered = tiny_base_model.get_output_embeddings(), []
    hook = head.register_forward_hook(lambda module, args, output: entered.append(args[0]))
    prompts = tiny_tokenizer(["A", "Who founded Norbach Works?", "Where?"])["input_ids"]
    generate_text(tiny_base_model, tiny_tokenizer, prompts, max_new_tokens=2)
    hook.remove()
    assert [tuple(states.shape[:2]) for states in entered] == [(3, 1)] * 2
    assert all(states.is_contiguous() for states in entered)
    assert not head._forward_pre_hooks


def test_generation_stops_at_end_token(tiny_base_model, tiny_tokenizer):
    """The end token is made the best one after a step, by turning the answer's first token into it."""
    prompts = tiny_tokenizer(["Where is Norbach?", "When?"])["input_ids"]
    first = int(tiny_base_model(torch.tensor(prompts[:1])).logits[0, -1].argmax())
    tiny_base_model.generation_config.eos_token_id = first
    stopped, other = generate_text(tiny_base_model, tiny_tokenizer, prompts, max_new_tokens=6)
    assert stopped == "" and len(tiny_tokenizer(other)["input_ids"]) > 1


# Where an answer ends


@pytest.mark.parametrize(
    ("generation", "config", "tokenizer", "expected"),
    [
        ({}, {}, {}, {END}),
        ({"eos_token_id": None}, {}, {}, {END}),
        ({"eos_token_id": None}, {"eos_token_id": None}, {"eos_token": None}, {END}),
        ({"eos_token_id": 7}, {"eos_token_id": 7}, {}, {7, END}),
        ({"eos_token_id": [7, 8]}, {}, {}, {7, 8, END}),
        ({"eos_token_id": -1}, {}, {}, {END}),
        ({}, {}, {"eos_token": "<|pad|>"}, {PAD, END}),
    ],
    ids=["as it is", "no generation's", "none at all", "another", "several", "minus one", "another of the tokenizer"],
)
def test_end_ids_are_the_union_of_all_that_name_one(variant, generation, config, tokenizer, expected):
    folder = variant(generation_config=generation, config=config, tokenizer_config=tokenizer)
    assert set(end_ids(*load_base_model(folder))) == expected


@pytest.mark.parametrize(
    "files",
    [
        {"generation_config": {"eos_token_id": None}, "config": {"eos_token_id": None}},
        {"generation_config": {"eos_token_id": 7}, "config": {"eos_token_id": 7}},
        {"generation_config": {"eos_token_id": [900]}, "tokenizer_config": {"eos_token": "<|pad|>"}},
    ],
    ids=["none", "another", "another of the tokenizer too"],
)
def test_answers_end_without_the_configs_end_token(variant, files):
    expected = answers_everywhere(TINY / "base_model")
    assert all(len(answer) < 20 for answers in expected for answer in answers)
    assert answers_everywhere(variant(TINY / "base_model", **files)) == expected


def answers_everywhere(folder):
    """With an adapter, with the document in the prompt, in benchmarks and in self-study."""
    model = DocToLoRA.from_pretrained(TINY, base_model=folder)
    prompts = [model.layout.prompt(question, DOCUMENT) for question in QUESTIONS]
    ids = model.tokenizer(prompts, add_special_tokens=False)["input_ids"]
    engine = TransformersEngine(model.base_model, model.tokenizer)
    return [
        model.generate(QUESTIONS, model.internalize(DOCUMENT)),
        model.generate(QUESTIONS, documents=[DOCUMENT] * len(QUESTIONS)),
        benchmark_greedy(model.base_model, model.tokenizer, ids, max_new_tokens=32).texts,
        [engine.text(row) for row in engine.write(ids, max_new_tokens=32, temperature=0, seed=0)],
    ]


def test_end_token_that_is_not_special_is_not_in_the_answer(tiny_tokenizer):
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tiny_tokenizer.backend_tokenizer, chat_template=tiny_tokenizer.chat_template
    )
    ids = tokenizer("Norbach")["input_ids"]
    assert decode_answer(tokenizer, [*ids, 9, 9, 9], {9}) == "Norbach"


# Settings of the model's own


@pytest.mark.parametrize(
    "settings",
    [
        {"repetition_penalty": 3.0},
        {"no_repeat_ngram_size": 2},
        {"min_new_tokens": 20},
        {"suppress_tokens": list(range(4, 300))},
        {"num_beams": 3, "num_return_sequences": 2},
        {"return_dict_in_generate": True, "output_scores": True},
        {"do_sample": True, "temperature": 2.5, "top_p": 0.5},
        {"forced_eos_token_id": 9, "begin_suppress_tokens": [9]},
        {"max_length": 20},
        {"use_cache": False, "cache_implementation": "static"},
        {"bad_words_ids": [[token] for token in range(4, 200)]},
        {"max_time": 0.0},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_settings_of_the_base_model_change_no_answer(variant, tiny_base_model_folder, settings):
    prompts = ["<|user|>Who founded Norbach Works?<|end|><|assistant|>", "<|user|>Who? Who? Who?<|end|><|assistant|>"]
    base_model, tokenizer = load_base_model(variant(generation_config=settings))
    prompts = tokenizer(prompts)["input_ids"]
    expected = generate_ids(*load_base_model(tiny_base_model_folder), prompts, max_new_tokens=12)
    assert generate_ids(base_model, tokenizer, prompts, max_new_tokens=12) == expected


def test_drawn_continuations_ignore_the_models_settings(variant, tiny_base_model_folder):
    def drawn(folder):
        engine = TransformersEngine(*load_base_model(folder))
        return engine.write(
            engine.layout.prompt_ids(engine.tokenizer, ["Who?"]), max_new_tokens=12, temperature=1.0, seed=3
        )

    changed = variant(generation_config={"do_sample": True, "top_k": 1, "repetition_penalty": 3.0})
    assert drawn(changed) == drawn(tiny_base_model_folder)


def test_generation_config_is_the_models_own_again_afterwards(tiny_base_model, tiny_tokenizer):
    own = tiny_base_model.generation_config
    generate_text(tiny_base_model, tiny_tokenizer, [[USER, END]], max_new_tokens=1)
    assert tiny_base_model.generation_config is own


# The window


@pytest.mark.parametrize("max_new_tokens", [1, 9, 600])
def test_prompt_beyond_the_window_is_refused_with_its_length(tiny_base_model, tiny_tokenizer, max_new_tokens):
    room = 512 - max_new_tokens
    prompts = [[USER], [USER] * (room + 1)]
    message = (
        rf"Prompt \d does not fit: \d+ tokens and {max_new_tokens} for the answer, the base model takes 512. Shorten"
    )
    with pytest.raises(ValueError, match=message):
        generate_ids(tiny_base_model, tiny_tokenizer, prompts, max_new_tokens=max_new_tokens)


def test_prompt_that_just_fits_the_window_is_answered(tiny_base_model, tiny_tokenizer):
    (row,) = generate_ids(tiny_base_model, tiny_tokenizer, [[USER] * 509], max_new_tokens=3)
    assert 1 <= len(row) <= 3


def test_model_without_a_window_takes_any_length():
    bloom = {"model_type": "bloom", "hidden_size": 16, "n_layer": 1, "n_head": 2, "vocab_size": 50}
    check_fits(build_base_model(bloom), [10**6], max_new_tokens=10**6)
