"""Edit, Edited, Editor: what is to be answered otherwise, the weights that do, and what makes them.

An editor changes the down projections W of some feed-forward layers: a layer maps a key k, the activations between its
projections, to W k. Keys are those at the last token of the subject.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from hypernet.base.packed_rows import PackedRows, Segment, pack_row, pad_rows
from hypernet.base.targets import find_blocks, find_targets
from hypernet.consolidation.weights import MovedWeights
from hypernet.doc_to_lora import DocToLoRA
from hypernet.text.chat import user_text
from hypernet.text.tokens import framed_ids

DOWN = "down_proj"
# A norm between a down projection and the residual stream: there W k is not what the layer adds.
_NORMS = ("post_feedforward_layernorm", "post_mlp_layernorm", "post_feedforward_norm")


class Edit(NamedTuple):
    """subject: as the question writes it. answer: the new one."""

    subject: str
    question: str
    answer: str


@dataclass(frozen=True)
class Edited:
    """weights: that answer the edits made so far. past: name of a weight → Σ kkᵀ of their keys, [d_in, d_in], for an
    editor that leaves earlier edits alone."""

    weights: MovedWeights
    past: Mapping[str, Tensor] = field(default_factory=dict)


class Editor(ABC):
    """Edits are undone by taking the weights out (`installed`), or by going back to the `Edited` before."""

    @abstractmethod
    def edit(self, model: DocToLoRA, edits: Sequence[Edit], *, start: Edited | None = None) -> Edited:
        """The weights after these edits, made at once; the base model stays as it is.

        Args:
            start: the edits before; None: the base model's own weights.

        Raises:
            ValueError: there is no edit, a subject does not stand in its question, or the base model has no such layer.
        """


class EditRows(NamedTuple):
    """Rows of prompts, with their answers behind them or without.

    rows: [R, S]. places: of the last token of each row's subject, [R]. starts: of its first token, [R]. owners: number
    of each row's edit, [R].
    """

    rows: PackedRows
    places: Tensor
    starts: Tensor
    owners: Tensor


def edit_rows(model: DocToLoRA, edits: Sequence[Edit], prefixes: Sequence[str] = ()) -> EditRows:
    """The edits' questions alone and behind each prefix, as a document in the prompt, with the new answers.

    Raises:
        ValueError: there is no edit, or a subject does not stand in its question.
    """
    if not edits:
        raise ValueError("There is nothing to edit. Give at least one edit.")
    layout, tokenizer = model.layout, model.tokenizer
    texts = [(edit, prefix) for edit in edits for prefix in (None, *prefixes)]
    prompts = layout.prompt_ids(tokenizer, [edit.question for edit, _ in texts], [prefix for _, prefix in texts])
    answers = framed_ids(tokenizer, [(layout.before_answer, edit.answer, layout.after_answer) for edit, _ in texts])
    spans = [_span(model, edit, prefix, prompt) for (edit, prefix), prompt in zip(texts, prompts, strict=True)]
    packed = [
        pack_row((), [Segment(prompt + answer, len(prompt), False, 0)])
        for prompt, answer in zip(prompts, answers, strict=True)
    ]
    rows = pad_rows(packed, pad_id=tokenizer.pad_token_id or 0).to(model.device)
    starts, places = torch.tensor(spans, device=model.device).T
    owners = torch.arange(len(edits), device=model.device).repeat_interleave(1 + len(prefixes))
    return EditRows(rows, places, starts, owners)


def _span(model: DocToLoRA, edit: Edit, prefix: str | None, prompt: Sequence[int]) -> tuple[int, int]:
    """First and last token of the subject in a prompt."""
    within = edit.question.rfind(edit.subject)
    if within < 0 or not edit.subject:
        raise ValueError(
            f"The subject {edit.subject!r} does not stand in the question {edit.question!r}. Write it as there."
        )
    asked = len(user_text(edit.question, prefix)) - len(edit.question)
    start = len(model.layout.before_user) + asked + within
    end = start + len(edit.subject)
    encoding = model.tokenizer(
        model.layout.prompt(edit.question, prefix), add_special_tokens=False, return_offsets_mapping=True, verbose=False
    )
    if list(encoding["input_ids"]) != list(prompt):
        raise ValueError(f"The question {edit.question!r} spells a control token. Take it out.")
    held = [i for i, (first, last) in enumerate(encoding["offset_mapping"]) if first < end and last > start]
    return held[0], held[-1]


def editable(model: DocToLoRA, layers: Sequence[int]) -> list[str]:
    """Module paths of the down projections of these blocks, ascending.

    Raises:
        ValueError: there is no such block or layer, it is the last, or a norm stands behind it.
    """
    every = down_paths(model)
    if not layers or len(set(layers)) < len(layers):
        raise ValueError(f"layers are {list(layers)}. Give different ones, at least one.")
    if wrong := [layer for layer in layers if not 0 <= layer < len(every) - 1]:
        raise ValueError(
            f"Block {wrong[0]} cannot be edited: the base model has {len(every)}, from 0, and what the last one gives "
            "at a subject reaches no answer. Choose others."
        )
    return [every[layer] for layer in sorted(layers)]


def down_paths(model: DocToLoRA) -> list[str]:
    """Module path of every block's down projection.

    Raises:
        ValueError: a block has none, or a norm stands behind it.
    """
    (target,) = find_targets(model.base_model, [DOWN])
    decoder, name = find_blocks(model.base_model)
    kind = type(model.base_model).__name__
    for norm in _NORMS:
        if hasattr(getattr(decoder, name)[0], norm):
            raise ValueError(
                f"The blocks of {kind} have a {norm} behind {DOWN}, which edits in closed form cannot see through. "
                "Take a Llama-like base model."
            )
    paths = [path for path in target.paths if path is not None]
    if len(paths) < len(target.paths):
        raise ValueError(f"Some blocks of {kind} have no {DOWN}. Take a Llama-like base model.")
    return paths


@torch.no_grad()
def at_subjects(model: DocToLoRA, rows: EditRows, paths: Sequence[str]) -> dict[str, tuple[Tensor, Tensor]]:
    """Module path → what enters and what leaves the module at each row's last subject token, [R, d_in], [R, d_out]."""
    found: dict[str, tuple[Tensor, Tensor]] = {}
    index = torch.arange(len(rows.places), device=rows.places.device)
    model.injector.clear()
    with ExitStack() as undo:
        for path in paths:

            def keep(_module: nn.Module, args: Any, output: Any, *, path: str = path) -> None:
                found[path] = args[0][index, rows.places], first_of(output)[index, rows.places]

            undo.callback(model.base_model.get_submodule(path).register_forward_hook(keep).remove)
        model.base_model(input_ids=rows.rows.ids, use_cache=False)
    return found


def first_of(output: Any) -> Tensor:
    """A module's output; blocks of some architectures return a tuple with their hidden states first."""
    found: Tensor = output[0] if isinstance(output, tuple) else output
    return found


def mean_by_owner(values: Tensor, owners: Tensor) -> Tensor:
    """[R, ...] → the mean of each edit's rows, [E, ...]."""
    num_edits = int(owners.max()) + 1
    sums = values.new_zeros(num_edits, *values.shape[1:]).index_add(0, owners, values)
    counts = torch.bincount(owners, minlength=num_edits).to(values)
    return sums / counts.view(-1, *[1] * (values.ndim - 1))
