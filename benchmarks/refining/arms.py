"""Other ways to keep a document, made from questions that the base model wrote about it.

    lessons = taught(model, text, questions, wording=" Answer in one sentence.")
    arm = FromZero(model, rank=8, lr=2e-3, seed=0)
    for seconds in trained(arm, lessons, budgets=[10, 30], spent=2.5, seed=0):
        arm.answers(asked, max_new_tokens=48)

Lessons are what the base model answers with the document in its prompt, and how likely it finds each token.
"""

import random
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from os.path import commonprefix
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache

from benchmarks.measuring.decoding import Prefix, greedy
from hypernet.adapters.injection import LoRAInjector
from hypernet.base.base_model import logits_at
from hypernet.base.generation import generate_ids
from hypernet.base.packed_rows import PackedRows, Segment, pack_row, pad_rows, shared_beginning
from hypernet.base.targets import find_blocks
from hypernet.consolidation.editing.memit import spread
from hypernet.consolidation.editing.moments import KeyMoments
from hypernet.consolidation.editing.rome import damped, solved
from hypernet.consolidation.weights import installed
from hypernet.doc_to_lora import DocToLoRA

_TOGETHER = 8  # questions of a step
_ANSWER_TOKENS = 32
_BYTES = 2  # of a number that is kept, in bfloat16


class Lesson(NamedTuple):
    """prompts: of some questions without the document. answers: token ids. log_probs: of every token after the
    document, [answer tokens, V]."""

    prompts: list[list[int]]
    answers: list[list[int]]
    log_probs: Tensor

    def rows(self, pad_id: int) -> PackedRows:
        return packed(self.prompts, self.answers, pad_id=pad_id)


def packed(prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]], *, pad_id: int) -> PackedRows:
    """One row, what all prompts begin with read once."""
    pairs = zip(prompts, answers, strict=True)
    row = pack_row(*shared_beginning([Segment([*p, *a], len(p), False, 0) for p, a in pairs]))
    return pad_rows([row], pad_id=pad_id)


@torch.no_grad()
def taught(model: DocToLoRA, text: str, questions: Sequence[str], *, wording: str = "") -> list[Lesson]:
    """Lessons of a few questions each; the wording stands behind each question where the document is in the prompt."""
    found, pad_id = [], model.tokenizer.pad_token_id or 0
    model.injector.clear()
    for start in range(0, len(questions), _TOGETHER):
        part = list(questions[start : start + _TOGETHER])
        full = model.layout.prompt_ids(model.tokenizer, [question + wording for question in part], [text] * len(part))
        answers = generate_ids(model.base_model, model.tokenizer, full, max_new_tokens=_ANSWER_TOKENS)
        log_probs = model(packed(full, answers, pad_id=pad_id).to(model.device)).float().log_softmax(-1)
        found.append(Lesson(model.layout.prompt_ids(model.tokenizer, part), answers, log_probs))
    return found


class Arm(ABC):
    """Something that is trained, answers, and has a size."""

    parameters: list[Tensor]
    lr: float

    def __init__(self, model: DocToLoRA) -> None:
        self.model = model

    @property
    @abstractmethod
    def num_bytes(self) -> int:
        """Kept in bfloat16."""

    @abstractmethod
    def logits(self, lesson: Lesson) -> Tensor:
        """Of the answers' tokens, [answer tokens, V]."""

    @abstractmethod
    def answers(self, questions: Sequence[str], *, max_new_tokens: int) -> list[str]: ...

    def loss(self, lesson: Lesson) -> Tensor:
        """KL of an answer's token from the base model with the document in its prompt, mean over tokens."""
        own = self.logits(lesson).float().log_softmax(-1)
        return F.kl_div(own, lesson.log_probs, reduction="batchmean", log_target=True)


def trained(
    arm: Arm, lessons: Sequence[Lesson], *, budgets: Sequence[float], spent: float, seed: int
) -> Iterator[tuple[float, float, int]]:
    """(budget, processor seconds since the document was known, steps done) at each budget, in which the arm is as it is
    then. No step begins beyond a budget; where the lessons took longer, none is done.

    Args:
        budgets: rising.
        spent: processor seconds until now.
    """
    optimizer = torch.optim.AdamW(arm.parameters, lr=arm.lr, weight_decay=0.0)
    rng = random.Random(f"arm {seed}")
    steps = 0
    for budget in budgets:
        while spent < budget:
            started = time.process_time()
            with torch.enable_grad():
                loss = arm.loss(rng.choice(lessons))
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
            optimizer.step()
            spent += time.process_time() - started
            steps += 1
        yield budget, spent, steps


class FromZero(Arm):
    """A LoRA of the hypernetwork's targets and rank, B = 0, that acts on all tokens."""

    def __init__(self, model: DocToLoRA, *, rank: int, lr: float, seed: int) -> None:
        super().__init__(model)
        self.lr = lr
        targets = model.hypernetwork.targets
        self.injector = LoRAInjector(model.base_model, targets)
        generator = torch.Generator().manual_seed(seed)
        self.A, self.B = {}, {}
        for target in targets:
            shape = 1, len(target.paths), rank
            A = torch.randn(*shape, target.d_in, generator=generator) * target.d_in**-0.5
            self.A[target.name] = A.to(model.device).requires_grad_()
            self.B[target.name] = torch.zeros(*shape, target.d_out, device=model.device, requires_grad=True)
        self.parameters = [*self.A.values(), *self.B.values()]

    @property
    def num_bytes(self) -> int:
        return _BYTES * sum(tensor.numel() for tensor in self.parameters)

    def logits(self, lesson: Lesson) -> Tensor:
        rows = lesson.rows(self.model.tokenizer.pad_token_id or 0).to(self.model.device)
        self.injector.set(self.A, self.B, [[0]], scaling=1.0)
        return self.model(rows)

    def answers(self, questions: Sequence[str], *, max_new_tokens: int) -> list[str]:
        model = self.model
        A, B = ({name: rows.detach() for name, rows in part.items()} for part in (self.A, self.B))
        self.injector.set(A, B, [[0]] * len(questions), scaling=1.0)
        prompts = model.layout.prompt_ids(model.tokenizer, questions)
        try:
            return greedy(model.base_model, model.tokenizer, prompts, max_new_tokens=max_new_tokens).texts
        finally:
            self.injector.clear()

    def remove(self) -> None:
        self.injector.remove()


class Cartridge(Arm):
    """Keys and values of a prompt's first tokens with the document in it, trained; the first token's stay, as it is
    where attention goes that is needed nowhere.

    Untrained and of all tokens it is the kept prefix: it answers as the document in the prompt.

    Args:
        tokens: how many of the document's prompt's first; None: all before the question.

    Source: Eyuboglu et al. 2025, Cartridges, https://arxiv.org/abs/2506.06266, section 3.
    """

    def __init__(self, model: DocToLoRA, text: str, *, tokens: int | None = None, lr: float = 0.02) -> None:
        super().__init__(model)
        self.lr = lr
        prompts = model.layout.prompt_ids(model.tokenizer, ["What is it?", "Who said so?"], [text] * 2)
        whole = commonprefix(prompts)
        self.text, self.num_whole = text, len(whole)
        with torch.no_grad():
            model.injector.clear()
            kept = Prefix.of(model.base_model, whole[:tokens])
        layers: list[Any] = list(kept.cache.layers)
        self.first = [(layer.keys[:, :, :1], layer.values[:, :, :1]) for layer in layers]
        self.rest = [
            tuple(part[:, :, 1:].float().clone().requires_grad_() for part in (layer.keys, layer.values))
            for layer in layers
        ]
        self.num_tokens = kept.length
        self.parameters = [part for pair in self.rest for part in pair]

    @property
    def num_bytes(self) -> int:
        return _BYTES * sum(part.numel() for pair in (*self.first, *self.rest) for part in pair)

    def prefix(self, number: int = 1) -> Prefix:
        cache = DynamicCache(config=self.model.base_model.config)
        for layer, pairs in enumerate(zip(self.first, self.rest, strict=True)):
            keys, values = (
                torch.cat([first, rest.to(first)], 2).expand(number, -1, -1, -1)
                for first, rest in zip(*pairs, strict=True)
            )
            cache.update(keys, values, layer)
        return Prefix(cache, self.num_tokens)

    def tails(self, questions: Sequence[str]) -> list[list[int]]:
        """What comes behind the document."""
        model = self.model
        prompts = model.layout.prompt_ids(model.tokenizer, questions, [self.text] * len(questions))
        return [prompt[self.num_whole :] for prompt in prompts]

    def logits(self, lesson: Lesson) -> Tensor:
        # A prompt without the document ends as one with it does, from the question on.
        device, before = self.model.device, self.num_tokens
        begin = len(self._without)
        rows = [[*p[begin:], *a] for p, a in zip(lesson.prompts, lesson.answers, strict=True)]
        width = max(map(len, rows))
        ids = torch.zeros(len(rows), width, dtype=torch.long)
        mask = torch.zeros(len(rows), before + width, dtype=torch.long)
        mask[:, :before] = 1
        where = torch.zeros(len(rows), width, dtype=torch.bool)
        for number, (row, answer) in enumerate(zip(rows, lesson.answers, strict=True)):
            ids[number, : len(row)] = torch.tensor(row)
            mask[number, before : before + len(row)] = 1
            where[number, len(row) - len(answer) - 1 : len(row) - 1] = True
        return logits_at(
            self.model.base_model,
            where.to(device),
            input_ids=ids.to(device),
            attention_mask=mask.to(device),
            position_ids=torch.arange(before, before + width, device=device).expand(len(rows), -1),
            past_key_values=self.prefix(len(rows)).cache,
        )

    @property
    def _without(self) -> list[int]:
        """What prompts without a document begin with."""
        model = self.model
        return list(commonprefix(model.layout.prompt_ids(model.tokenizer, ["What is it?", "Who said so?"])))

    @torch.no_grad()
    def answers(self, questions: Sequence[str], *, max_new_tokens: int) -> list[str]:
        model, prefix = self.model, self.prefix()
        return greedy(
            model.base_model, model.tokenizer, self.tails(questions), max_new_tokens=max_new_tokens, prefix=prefix
        ).texts


class LeastSquares:
    """Changes of some blocks' `down_proj`, from the lowest on: ΔW = Rᵀ K (λC + KᵀK)⁻¹, with K what enters it where a
    lesson's answer is said without the document, and R what the document in the prompt changes in the last block's
    output there, under the changes so far, divided by the number of blocks left.

    Args:
        moments: C, of other texts.
        paths: of the modules, from the lowest on.
        ridge: λ in units of the mean of kᵀ C⁻¹ k.

    Source: MEMIT's least squares, https://arxiv.org/abs/2210.07229; the prompt's difference as its target is ours.
    """

    def __init__(
        self,
        model: DocToLoRA,
        text: str,
        questions: Sequence[str],
        lessons: Sequence[Lesson],
        *,
        moments: KeyMoments,
        paths: Sequence[str],
        ridge: float,
        wording: str = "",
    ) -> None:
        self.model = model
        pad_id = model.tokenizer.pad_token_id or 0
        prompts = [prompt for lesson in lessons for prompt in lesson.prompts]
        answers = [answer for lesson in lessons for answer in lesson.answers]
        full = model.layout.prompt_ids(model.tokenizer, [q + wording for q in questions], [text] * len(questions))
        wanted = _states(model, packed(full, answers, pad_id=pad_id), paths[0])[1]
        rows = packed(prompts, answers, pad_id=pad_id)
        C = moments.of(model, paths)
        self.tensors: dict[str, Tensor] = {}
        for place, path in enumerate(paths):
            with installed(model.base_model, self.tensors):
                keys, state = _states(model, rows, path)
            moment = damped(C[path], 1e-2)
            weight = ridge * float((keys * solved(moment, keys.T).T).sum(1).mean())
            change = spread((wanted - state) / (len(paths) - place), keys, weight * moment)
            before = model.base_model.get_parameter(f"{path}.weight").detach()
            self.tensors[f"{path}.weight"] = (before.double() + change).to(before.dtype)
        d_out, d_in = before.shape
        self.num_bytes = _BYTES * len(paths) * min(d_out * d_in, len(wanted) * (d_out + d_in))

    def answers(self, questions: Sequence[str], *, max_new_tokens: int) -> list[str]:
        model = self.model
        prompts = model.layout.prompt_ids(model.tokenizer, questions)
        with installed(model.base_model, self.tensors):
            return greedy(model.base_model, model.tokenizer, prompts, max_new_tokens=max_new_tokens).texts


@torch.no_grad()
def _states(model: DocToLoRA, rows: PackedRows, path: str) -> tuple[Tensor, Tensor]:
    """Where answers are said: what enters the module, [tokens, d_in], and the last block's output, float64."""
    decoder, blocks = find_blocks(model.base_model)
    last = getattr(decoder, blocks)[-1]
    found: list[Tensor] = []
    rows = rows.to(model.device)
    where = rows.target_kind >= 0

    def entering(_module: object, args: tuple[Tensor, ...]) -> None:
        found.append(args[0][where].double())

    def left(_module: object, _args: object, output: Tensor | tuple[Tensor, ...]) -> None:
        found.append((output if isinstance(output, Tensor) else output[0])[where].double())

    hooks = [
        model.base_model.get_submodule(path).register_forward_pre_hook(entering),
        last.register_forward_hook(left),
    ]
    try:
        model(rows)
    finally:
        for hook in hooks:
            hook.remove()
    keys, state = found
    return keys, state
