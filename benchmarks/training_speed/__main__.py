"""Speed and memory of one optimizer step and of a padded one, in one run: `python -m benchmarks.training_speed`

Three ways to take the same step on the same documents, questions and weights; runs take turns, batch by batch:
  ours                 LitDocToLoRA: packed rows, adapters joined by address
  padded_per_token     as the reference implementation: a row per question with a copy of the document for the
                       teacher, ranks zero-padded to the longest adapter, A and B repeated for every token
  padded_per_question  the same rows, A and B once per question: what that repetition costs
They share the context encoder and the hypernetwork, and all compute logits of answer tokens alone. Their loss and
gradients are compared before anything is timed. Rows hold tokens/s, seconds and their ratio to ours run by run (p20,
p50, p80), and the peak of memory beyond weights and optimizer states, gradients included.
"""

import logging
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

import hydra
import torch
from pydantic import field_validator
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from benchmarks.measuring.peak import peak_bytes
from hypernet.cli.scripts import Script
from hypernet.cli.settings import (
    Count,
    Device,
    Number,
    OutputFile,
    Settings,
    Text,
    arguments_of,
    checked,
    choose_device,
)

if TYPE_CHECKING:
    from hypernet.base.packed_rows import PackedRows
    from hypernet.data.batches import DistillationBatch
    from hypernet.doc_to_lora import DocToLoRA

log = logging.getLogger(__name__)
ROOT = Path(__file__).parents[2]
WEIGHTS = {"kl": 1.0, "locality_kl": 0.5, "nll": 0.5}  # of the terms of the loss, the same for all methods
# Of loss and gradients, relative to their size. In bfloat16 the two orders of adding up differ by its rounding.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.1}
CHECKED_DOCUMENTS = 5  # two sets of gradients are held while methods are compared, so not on a whole batch


class Prompts(NamedTuple):
    """Questions with their answers, each a row of its own, right-padded.

    ids: [Q, S]. mask: [Q, S] bool, False at the padding. predicts: [Q, S] bool, where the next token is an answer's.
    kinds: [number of answer tokens], index into `QUESTION_KINDS`. targets: [number of answer tokens].
    document: [Q], the row's number in the batch.
    """

    ids: Tensor
    mask: Tensor
    predicts: Tensor
    kinds: Tensor
    targets: Tensor
    document: Tensor

    @classmethod
    def of(cls, rows: "PackedRows") -> "Prompts":
        """Packed rows taken apart: what a segment sees comes before it, the order stays."""
        ids, predicts, kinds, document = [], [], [], []
        for number in range(len(rows.ids)):
            prefix = rows.segments[number] == 0
            for segment in range(1, int(rows.segments[number].max()) + 1):
                own = rows.segments[number] == segment
                seen = own | prefix if rows.sees_prefix[number][own].all() else own
                ids.append(rows.ids[number][seen])
                kind = rows.target_kind[number][seen]
                predicts.append(kind >= 0)
                kinds.append(kind[kind >= 0])
                document.append(number)
        padded, predicts = (pad_sequence(tensors, batch_first=True) for tensors in (ids, predicts))
        mask = pad_sequence([torch.ones_like(row, dtype=torch.bool) for row in ids], batch_first=True)
        targets = padded.roll(-1, dims=1)[predicts]
        return cls(padded, mask, predicts, torch.cat(kinds), targets, torch.tensor(document))

    def to(self, device: str) -> "Prompts":
        return Prompts(*(tensor.to(device) for tensor in self))


class PaddedBatch(NamedTuple):
    """A `DistillationBatch` with a row per question."""

    chunk_ids: Tensor
    chunk_mask: Tensor
    chunk_counts: list[int]
    members: list[list[int]]
    student: Prompts
    teacher: Prompts


# The methods. Each lays a batch out once, which data workers do in training, and computes the loss of a step.


class Method(Protocol):
    def prepare(self, batch: "DistillationBatch") -> Any: ...

    def loss(self, prepared: Any) -> Tensor: ...

    def after_backward(self) -> None: ...


class Ours:
    """The step that train.py takes."""

    def __init__(self, model: "DocToLoRA") -> None:
        from hypernet.training.lit_doc_to_lora import LitDocToLoRA
        from hypernet.training.losses import AnswerNLL, ContextDistillation, Locality

        terms = {"kl": ContextDistillation, "locality_kl": Locality, "nll": AnswerNLL}
        objective = {name: term(weight=WEIGHTS[name]) for name, term in terms.items()}
        self.module = LitDocToLoRA(model=model, objective=objective, optimizer={})
        self.module.log = lambda *_, **__: None  # there is no trainer to log to

    def prepare(self, batch: "DistillationBatch") -> "DistillationBatch":
        return batch.to(self.module.model.device)

    def loss(self, prepared: "DistillationBatch") -> Tensor:
        return self.module.training_step(prepared, 0)

    def after_backward(self) -> None:
        self.module.on_after_backward()
        self.module.phases.take()


class Padded:
    """Context distillation in plain torch: a row per question, adapters of all documents padded to one rank.

    Args:
        per_token: A and B are repeated for every token, as the reference implementation does; else once per question.
    """

    def __init__(self, model: "DocToLoRA", *, per_token: bool) -> None:
        self.model = model
        self.per_token = per_token
        self._adapters: tuple[dict[str, Tensor], dict[str, Tensor]] | None = None
        self._document: Tensor | None = None
        for target in model.hypernetwork.targets:
            for place in target.modules():
                module = model.base_model.get_submodule(place.path)
                module.register_forward_hook(partial(self._add_delta, target.name, place.layer))

    def prepare(self, batch: "DistillationBatch") -> PaddedBatch:
        device = self.model.device
        return PaddedBatch(
            batch.chunk_ids.to(device),
            batch.chunk_mask.to(device),
            batch.chunk_counts,
            batch.members,
            Prompts.of(batch.student).to(device),
            Prompts.of(batch.teacher).to(device),
        )

    def loss(self, prepared: PaddedBatch) -> Tensor:
        from hypernet.base.packed_rows import QUESTION_KINDS

        A, B = self.model.adapt(prepared.chunk_ids, prepared.chunk_mask)
        with torch.no_grad():
            teacher = self._logits(prepared.teacher)
        network = self.model.hypernetwork
        shared, ridge = network.bias_rank, self.model.trained_joining.ridge
        self._adapters = (
            {
                name: self._joined(pool, network.bias_A[name][:, :shared], prepared, ridge=ridge)
                for name, pool in A.items()
            },
            {name: self._joined(pool, network.bias_B[name][:, :shared], prepared) for name, pool in B.items()},
        )
        self._document = prepared.student.document
        student = self._logits(prepared.student)

        log_p, log_q = (logits.float().log_softmax(-1) for logits in (teacher, student))
        kl = (log_p.exp() * (log_p - log_q)).sum(-1)
        nll = -log_q.gather(1, prepared.student.targets[:, None])[:, 0]
        kinds = prepared.student.kinds
        about = (kinds == QUESTION_KINDS.index("document")) | (kinds == QUESTION_KINDS.index("unanswerable"))
        of_token = self._document[prepared.student.predicts.nonzero()[:, 0]]
        terms = {"kl": (kl, about), "locality_kl": (kl, ~about), "nll": (nll, about)}
        return sum(WEIGHTS[name] * self._mean(values, of_token, where) for name, (values, where) in terms.items())

    def after_backward(self) -> None:
        self._adapters = self._document = None

    def _logits(self, prompts: Prompts) -> Tensor:
        from hypernet.base.base_model import logits_at

        return logits_at(
            self.model.base_model, prompts.predicts, input_ids=prompts.ids, attention_mask=prompts.mask.long()
        )

    @staticmethod
    def _joined(pool: Tensor, bias: Tensor, prepared: PaddedBatch, ridge: float | None = None) -> Tensor:
        """[C, L, R, d] of all chunks → [N, L, rank of the longest, d], zeros behind the shorter ones."""
        from hypernet.adapters.joining import decorrelated

        chunks = pool.split(prepared.chunk_counts)
        rows = []
        for documents in prepared.members:
            blocks = [chunks[i] for i in documents]
            if ridge is not None:
                blocks = [decorrelated(own.transpose(0, 1), ridge=ridge).transpose(0, 1) for own in blocks]
            blocks = torch.cat(blocks)
            if ridge is not None:
                of = torch.tensor([i for i in documents for _ in chunks[i]], device=pool.device)
                blocks = decorrelated(blocks.transpose(0, 1), of, ridge=ridge).transpose(0, 1)
            rows.append(torch.cat([*blocks, bias], dim=1))  # [L, rank, d]
        longest = max(row.shape[1] for row in rows)
        return torch.stack([nn.functional.pad(row, (0, 0, 0, longest - row.shape[1])) for row in rows])

    @staticmethod
    def _mean(values: Tensor, document: Tensor, where: Tensor) -> Tensor:
        """Mean over documents of their tokens' means, of the tokens chosen by `where`."""
        means = [values[where & (document == i)].mean() for i in document[where].unique()]
        return torch.stack(means).mean() if means else values.new_zeros(())

    def _add_delta(self, name: str, layer: int, module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Any:
        if self._adapters is None:
            return None
        (x,) = inputs  # [Q, S, d_in]
        A, B = (pools[name][:, layer].to(x.dtype) for pools in self._adapters)  # [N, rank, d]
        scaling = self.model.hypernetwork.scaling
        A, B = A[self._document], B[self._document]  # [Q, rank, d]
        if not self.per_token:
            return output + scaling * torch.bmm(torch.bmm(x, A.mT), B)
        A, B = (pool.repeat_interleave(x.shape[1], dim=0) for pool in (A, B))  # [Q * S, rank, d]
        S = torch.einsum("td,trd->tr", x.flatten(0, 1), A)
        return output + scaling * torch.einsum("tr,trd->td", S, B).view(output.shape)


METHODS: dict[str, Callable[["DocToLoRA"], Method]] = {
    "ours": Ours,
    "padded_per_token": partial(Padded, per_token=True),
    "padded_per_question": partial(Padded, per_token=False),
}


# What is measured with


def build_model(name: str, *, device: str, seed: int = 0) -> "DocToLoRA":
    """The shipped tiny model, or gemma-2-2b's shape with random weights in bfloat16 and the paper's hypernetwork."""
    from benchmarks import internalize_cost

    torch.manual_seed(seed)
    model = internalize_cost.build_model(name, device=device, max_chunk_tokens=None)
    model.hypernetwork.float()
    if name != "tiny":
        with torch.no_grad():  # B starts at zero, and then most gradients are
            head = model.hypernetwork.lora_head.head.weight
            head += 0.1 * head.std() * torch.randn_like(head)
    network = model.hypernetwork.train().requires_grad_(True)
    if not network.bias_rank:
        nn.ModuleList([network.bias_A, network.bias_B]).requires_grad_(False)
    return model


def make_batches(model: "DocToLoRA", stage: dict, *, number: int, seed: int) -> list["DistillationBatch"]:
    """The first batches of a stage (`hypernet.data.curriculum.Stage`) over the encyclopedia."""
    from hypernet.data.batches import DistillationBatches
    from hypernet.data.curriculum import Curriculum
    from hypernet.data.encyclopedia import Encyclopedia

    curriculum = Curriculum(Encyclopedia("train", seed=seed), [{"steps": number, **stage}])
    # A chunk is as long as its piece of the document: chunk_weights alone say how many there are.
    batches = DistillationBatches(curriculum, model.tokenizer, max_chunk_tokens=10**4)
    return [batches[i] for i in range(number)]


def autocast(device: str, dtype: torch.dtype) -> AbstractContextManager:
    """What the trainer's precision is: 32-true, or bf16-mixed."""
    return torch.autocast(device, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16)


def loss_and_gradients(
    method: Method, prepared: Any, parameters: Sequence[nn.Parameter], *, device: str, dtype: torch.dtype
) -> tuple[Tensor, list[Tensor]]:
    """The loss, and the gradient of each parameter."""
    for parameter in parameters:
        parameter.grad = None
    with autocast(device, dtype):
        loss = method.loss(prepared)
    loss.backward()
    method.after_backward()
    return loss.detach(), [parameter.grad for parameter in parameters]


def difference(
    methods: Sequence[Method], batch: "DistillationBatch", model: "DocToLoRA", *, device: str, dtype: torch.dtype
) -> float:
    """Largest difference of two methods' losses and gradients, each relative to the first one's size."""
    parameters = [p for p in model.hypernetwork.parameters() if p.requires_grad]
    (loss, own), (other_loss, other) = (
        loss_and_gradients(method, method.prepare(batch), parameters, device=device, dtype=dtype) for method in methods
    )
    size = torch.nn.utils.get_total_norm(own)
    distance = torch.nn.utils.get_total_norm([a - b for a, b in zip(own, other, strict=True)])
    return max(float((loss - other_loss).abs() / loss.abs()), float(distance / size))


def measure(cfg: "SpeedSettings", model: "DocToLoRA", *, device: str, dtype: torch.dtype) -> Iterator[dict]:
    """Rows of all methods, stage by stage.

    Raises:
        ValueError: a method's loss or gradients are not ours.
    """
    parameters = [p for p in model.hypernetwork.parameters() if p.requires_grad]
    # A step must cost what it does in training; the weights may as well stay what they are.
    optimizer = torch.optim.AdamW(parameters, lr=1e-8)
    methods = {name: METHODS[name](model) for name in cfg.methods}

    def step(name: str, prepared: Any) -> None:
        optimizer.zero_grad(set_to_none=True)
        loss_and_gradients(methods[name], prepared, parameters, device=device, dtype=dtype)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()

    for stage, settings in cfg.stages.items():
        few_documents = {**settings, "batch_size": min(CHECKED_DOCUMENTS, settings["batch_size"])}
        (few,) = make_batches(model, few_documents, number=1, seed=cfg.seed)
        differences = {
            name: difference([methods["ours"], method], few, model, device=device, dtype=dtype)
            for name, method in methods.items()
        }
        for name, found in differences.items():
            if not found <= TOLERANCE[dtype]:
                raise ValueError(
                    f"{name} does not take our step in {stage}: loss or gradients differ by {found:.2g}, more than "
                    f"{TOLERANCE[dtype]:.2g} of their size. Nothing is timed."
                )
        batches = make_batches(model, settings, number=cfg.batches, seed=cfg.seed)
        tokens = [_count_tokens(batch) for batch in batches]
        times: dict[str, list[float]] = {name: [] for name in methods}
        peaks: dict[str, float] = {}
        for name, method in list(methods.items()):
            largest = method.prepare(max(batches, key=lambda batch: batch.chunk_ids.numel()))
            try:
                for batch in batches:  # warms up: on a GPU kernels are compiled and chosen for new shapes
                    step(name, method.prepare(batch))
                optimizer.zero_grad(set_to_none=True)
                peaks[name] = peak_bytes(partial(step, name, largest), device=device) / 2**20
            except torch.OutOfMemoryError:
                method.after_backward()
            del largest
        for run in range(cfg.runs):
            # Another one begins every time: the first of a batch finds colder caches.
            for name in [*peaks][run % len(peaks) :] + [*peaks][: run % len(peaks)]:
                prepared = methods[name].prepare(batches[run % len(batches)])
                times[name].append(_seconds(partial(step, name, prepared), device=device))
                del prepared
        for name in methods:
            row = {"kind": "step", "stage": stage, "method": name, "out_of_memory": name not in peaks}
            row |= {"documents": settings["batch_size"], "difference": differences[name]}
            row |= {"chunks": [len(batch.chunk_ids) for batch in batches]}
            row |= {f"{kind}_tokens": [count[kind] for count in tokens] for kind in ("context", "answer", "prompt")}
            if name in peaks:
                of_run = [tokens[run % len(tokens)] for run in range(cfg.runs)]
                row |= quantiles(times[name], "s") | {"runs": cfg.runs, "peak_mib": peaks[name]}
                for kind in ("context", "answer"):
                    rates = [count[kind] / s for count, s in zip(of_run, times[name], strict=True)]
                    row |= quantiles(rates, f"{kind}_tokens_per_s")
                ratios = [other / own for other, own in zip(times[name], times["ours"], strict=True)]
                row |= quantiles(ratios, "times_ours") | {"peak_times_ours": peaks[name] / peaks["ours"]}
            yield row


def quantiles(values: Sequence[float], unit: str) -> dict[str, float]:
    ordered = sorted(values)
    pick = lambda share: ordered[min(int(len(ordered) * share), len(ordered) - 1)]  # noqa: E731
    return {f"p20_{unit}": pick(0.2), f"p50_{unit}": statistics.median(ordered), f"p80_{unit}": pick(0.8)}


def _count_tokens(batch: "DistillationBatch") -> dict[str, int]:
    rows = batch.student
    return {
        "context": int(batch.chunk_mask.sum()),
        "answer": int((rows.target_kind >= 0).sum()),
        "prompt": int((rows.segments > 0).sum()),  # questions with their answers
    }


def _seconds(run: Callable[[], Any], *, device: str) -> float:
    synchronize = torch.cuda.synchronize if device == "cuda" else lambda: None
    synchronize()
    before = time.perf_counter()
    run()
    synchronize()
    return time.perf_counter() - before


# What people see


def markdown(rows: Sequence[dict]) -> str:
    """A line per stage and method; the rows have the time's spread and the memory as multiples of ours as well."""
    lines = [
        "| stage | method | context tokens/s | answer tokens/s | step, s | time / ours | peak, MiB |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        start = f"| {row['stage'].replace('_', ' ')} | {row['method'].replace('_', ' ')} | "
        if row["out_of_memory"]:
            lines.append(start + "out of memory | | | | |")
            continue
        lines.append(
            f"{start}{row['p50_context_tokens_per_s']:,.0f} | {row['p50_answer_tokens_per_s']:,.0f} | "
            f"{row['p50_s']:.3g} | {row['p50_times_ours']:.2f} | {row['peak_mib']:,.0f} |"
        )
    return "\n".join(lines)


class SpeedSettings(Settings):
    model: Literal["tiny", "gemma-2-2b"]
    methods: list[Literal[tuple(METHODS)]]
    stages: dict[str, dict[str, Any]]
    batches: Count
    runs: Count
    device: Device
    dtype: Literal["float32", "bfloat16"] | None
    compile: Text | None
    threads: Count | None
    seed: Number
    output: OutputFile | None

    @field_validator("methods")
    @classmethod
    def _ours_is_among_them(cls, methods: list[str]) -> list[str]:
        if "ours" not in methods:
            raise ValueError("methods lacks ours, which the others are compared with. Add it.")
        return methods


SCRIPT = Script("benchmarks.training_speed", SpeedSettings)


@hydra.main(config_path="../../conf", config_name="training_speed", version_base="1.3")
@SCRIPT
def main(cfg: SpeedSettings) -> None:
    from benchmarks.measuring.rows import describe_run, write_rows
    from hypernet.data.curriculum import Stage
    from hypernet.training.callbacks import check_backend, compile_hypernetwork

    for name, stage in cfg.stages.items():
        checked(arguments_of(Stage), stage, place=f"stages.{name}")
    device = choose_device(cfg.device)
    dtype = getattr(torch, cfg.dtype or ("float32" if device == "cpu" else "bfloat16"))
    if cfg.compile:
        check_backend(cfg.compile)
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    model = build_model(cfg.model, device=device, seed=cfg.seed)
    if cfg.compile:
        compile_hypernetwork(model.hypernetwork, cfg.compile)
    rows: list[dict] = []
    run = describe_run(cfg.model_dump())
    for row in measure(cfg, model, device=device, dtype=dtype):
        rows.append({**row, "model": cfg.model, "device": device, "dtype": str(dtype).removeprefix("torch.")})
        if cfg.output:  # after every row: a run cut short keeps what it has
            write_rows(cfg.output, rows, run=run)
    print(markdown(rows))


if __name__ == "__main__":
    SCRIPT.run(main, ROOT / "conf/training_speed.yaml")
