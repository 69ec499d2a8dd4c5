"""ExpertPerTask: a LoRA for each task and one that all share; a router picks a task's by the question alone.

experts = ExpertPerTask(rank=8, shared_rank=8)
moves = experts.next(seed=0)                        # trained like other moves: what is shared so far, and a new LoRA
Consolidator(moves=moves).train(model, memories)
experts.add(model, "towns", moves, questions)       # of the task, by which the router knows it
experts.generate(model, ["Who is the mayor of Boham?"])
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from hypernet.base.targets import find_blocks
from hypernet.consolidation.moves import ATTENTION_AND_MLP, Examples, LowRank
from hypernet.consolidation.weights import MovedWeights, installed
from hypernet.doc_to_lora import DocToLoRA

_BATCH = 64


class SharedAndOwn:
    """Moves of one task: W + B_sᵀA_s + B_tᵀA_t, a LoRA s that goes on from the last task and a new one t."""

    takes_adapters = False

    def __init__(self, shared: LowRank, own: LowRank, begun: Mapping[str, Tensor], seed: int) -> None:
        self.rank, self.shared_rank = own.rank, shared.rank
        self._parts, self._begun, self._seed = {"shared": shared, "own": own}, begun, seed
        self.trained: dict[str, Tensor] = {}

    def start(
        self, model: DocToLoRA, weights: MovedWeights | None, *, seed: int, examples: Examples | None = None
    ) -> dict[str, Tensor]:
        parameters = {}
        for part, seed_of in (("shared", self._seed), ("own", self._seed + 1)):
            for name, leaf in self._parts[part].start(model, None, seed=seed_of).items():
                given = self._begun.get(f"{part}.{name}", leaf)
                parameters[f"{part}.{name}"] = given.detach().clone().requires_grad_()
        return parameters

    def tensors(self, model: DocToLoRA, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return lora_tensors(model, parameters)

    def result(self, model: DocToLoRA, parameters: Mapping[str, Tensor]) -> MovedWeights:
        self.trained = {name: parameter.detach().clone() for name, parameter in parameters.items()}
        return MovedWeights({name: tensor.detach() for name, tensor in self.tensors(model, parameters).items()})


def lora_tensors(model: DocToLoRA, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """W + Σ BᵀA over the parts of "part.path.A" and "part.path.B", by the weights' names."""
    deltas: dict[str, Tensor] = {}
    for name, A in parameters.items():
        if name.endswith(".A"):
            path = name.partition(".")[2].removesuffix(".A")
            delta = parameters[f"{name[:-2]}.B"].T @ A
            deltas[path] = deltas[path] + delta if path in deltas else delta
    weights = {path: model.base_model.get_parameter(f"{path}.weight") for path in deltas}
    return {f"{path}.weight": weights[path] + delta.to(weights[path].dtype) for path, delta in deltas.items()}


class _Seen(NamedTuple):
    """Of a task's questions: how many, the sum of their states and of their outer products, in float64."""

    number: int
    total: Tensor
    products: Tensor


class ExpertPerTask:
    """The router is a linear discriminant on x, the base model's last hidden state averaged over the prompt:

        task(x) = argmax_t μ_tᵀ S⁻¹ x - ½ μ_tᵀ S⁻¹ μ_t,     S = Σ_t Σ_{i in t} (x_i - μ_t)(x_i - μ_t)ᵀ / N + shrink · I

    It keeps sums, no question. At an answer it is not told the task.

    Args:
        rank, shared_rank: of each task's LoRA and of the shared one.
        target_modules: names of linear layers.
        shrink: of S, as a share of its mean variance; above 0, for fewer questions than dimensions.

    Raises:
        ValueError: a rank is below 1, or shrink not above 0.

    Source: a LoRA per task and a shared one as in MoE-CL, Kang et al. 2025, https://arxiv.org/abs/2509.18133, here
    summed, without its adversarial term and its learned gate.
    """

    def __init__(
        self,
        *,
        rank: int = 8,
        shared_rank: int = 8,
        target_modules: Sequence[str] = ATTENTION_AND_MLP,
        shrink: float = 0.1,
    ) -> None:
        if not shrink > 0:
            raise ValueError(f"shrink is {shrink}. Give a number above 0.")
        self._shared = LowRank(rank=shared_rank, target_modules=target_modules)
        self._own = LowRank(rank=rank, target_modules=target_modules)
        self.shrink = shrink
        self._experts: dict[str, dict[str, Tensor]] = {}
        self._common: dict[str, Tensor] = {}
        self._seen: dict[str, _Seen] = {}

    @property
    def tasks(self) -> tuple[str, ...]:
        return tuple(self._experts)

    def next(self, *, seed: int) -> SharedAndOwn:
        """What moves for the next task."""
        return SharedAndOwn(self._shared, self._own, self._common, seed + 2 * len(self._experts))

    def add(self, model: DocToLoRA, task: str, moves: SharedAndOwn, questions: Sequence[str]) -> None:
        """Takes over what was trained; `questions` teach the router.

        Raises:
            ValueError: the task is there already, nothing was trained, or there are no questions.
        """
        if task in self._experts or not moves.trained or not questions:
            raise ValueError(
                f"The task {task!r} needs a name of its own, moves that were trained, and questions; there are "
                f"{', '.join(self._experts) or 'no tasks'}, {len(moves.trained)} parameters and {len(questions)} "
                "questions."
            )
        self._common = {name: value for name, value in moves.trained.items() if name.startswith("shared.")}
        self._experts[task] = {name: value for name, value in moves.trained.items() if name.startswith("own.")}
        states = _prompt_states(model, questions)
        self._seen[task] = _Seen(len(states), states.sum(0), states.T @ states)

    def route(self, model: DocToLoRA, questions: Sequence[str]) -> list[str]:
        """The task that each question seems to be of.

        Raises:
            ValueError: there is no task yet.
        """
        if not self._seen:
            raise ValueError("There is no task to route to yet. Add one.")
        means = torch.stack([one.total / one.number for one in self._seen.values()])
        within = sum(
            (one.products - one.number * torch.outer(mean, mean))
            for one, mean in zip(self._seen.values(), means, strict=True)
        ) / sum(one.number for one in self._seen.values())
        assert isinstance(within, Tensor)
        spread = within + self.shrink * within.diagonal().mean().clamp_min(1e-12) * torch.eye(len(within))
        weights = torch.linalg.solve(spread, means.T)  # [D, tasks]
        scores = _prompt_states(model, questions) @ weights - 0.5 * (means.T * weights).sum(0)
        return [self.tasks[place] for place in scores.argmax(1).tolist()]

    def tensors(self, model: DocToLoRA, task: str) -> dict[str, Tensor]:
        """The weights that answer a task's questions."""
        return lora_tensors(model, {**self._common, **self._experts[task]})

    def generate(self, model: DocToLoRA, questions: Sequence[str], *, max_new_tokens: int = 32) -> list[str]:
        """Greedy answers, each by the expert that its question is routed to."""
        tasks, answers = self.route(model, questions), [""] * len(questions)
        for task in dict.fromkeys(tasks):
            places = [place for place, other in enumerate(tasks) if other == task]
            with installed(model.base_model, self.tensors(model, task)):
                found = model.generate([questions[place] for place in places], max_new_tokens=max_new_tokens)
            for place, answer in zip(places, found, strict=True):
                answers[place] = answer
        return answers


@torch.no_grad()
def _prompt_states(model: DocToLoRA, questions: Sequence[str]) -> Tensor:
    """The last block's output, averaged over each prompt's tokens, [Q, D], in float64 on the CPU."""
    prompts = model.layout.prompt_ids(model.tokenizer, list(questions), [None] * len(questions))
    decoder, name = find_blocks(model.base_model)
    found: list[Tensor] = []
    for start in range(0, len(prompts), _BATCH):
        part = [torch.tensor(ids, device=model.device) for ids in prompts[start : start + _BATCH]]
        rows = torch.nn.utils.rnn.pad_sequence(part, batch_first=True)
        kept: list[Tensor] = []

        def keep(
            _module: object, _args: object, output: Tensor | tuple[Tensor, ...], kept: list[Tensor] = kept
        ) -> None:
            kept.append(output[0] if isinstance(output, tuple) else output)

        hook = getattr(decoder, name)[-1].register_forward_hook(keep)
        model.injector.clear()
        try:
            model.base_model(input_ids=rows, use_cache=False)
        finally:
            hook.remove()
        found += [states[: len(ids)].double().mean(0).cpu() for states, ids in zip(kept[0], part, strict=True)]
    return torch.stack(found)
