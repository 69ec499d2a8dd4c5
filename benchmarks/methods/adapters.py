"""Methods that answer with an adapter from one forward pass, and their controls."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import replace

import torch
from torch import Tensor

from benchmarks.methods.base import Method
from benchmarks.tasks.base import Asked, Case
from hypernet.adapters.adapter import LoRAAdapter
from hypernet.adapters.composition import remove_document
from hypernet.doc_to_lora import DocToLoRA


class DocToLoRAMethod(Method):
    """The documents' adapter, the question alone in the prompt.

    A document that was replaced is internalized with the others and then removed from the adapter. Without any text,
    the adapter is the hypernetwork's bias block alone.

    Args:
        join: how the adapter's chunks are joined, with that way's settings: see `hypernet.adapters.joining.Joining`;
            None: as the hypernetwork was trained.
    """

    def __init__(
        self,
        *,
        model: DocToLoRA,
        join: str | None = None,
        ridge: float | None = None,
        gate_power: float | None = None,
        top_k: int | None = None,
        weight_power: float | None = None,
        max_new_tokens: int = 32,
    ) -> None:
        super().__init__(model=model, max_new_tokens=max_new_tokens)
        settings = {"ridge": ridge, "gate_power": gate_power, "top_k": top_k, "weight_power": weight_power}
        self.joining = model.joining(join, **settings)

    def build(self, case: Case) -> None:
        replaced = () if self.of_another_document else case.replaced
        self.adapter = internalized(self.model, [*replaced, *self.documents])
        for _ in replaced:
            self.adapter = remove_document(self.adapter, 0)
        if self.joining.is_plain_lora:
            self.adapter = self.adapter.fused(self.joining.way, ridge=self.joining.ridge)

    def stored_bytes(self) -> int:
        return self.adapter.num_bytes

    def active(self, prompts: Sequence[Sequence[int]]) -> AbstractContextManager:
        if self.joining.is_plain_lora:
            return self.model.injector.using(self.adapter)
        return self.model.using(self.adapter, self.joining, prompts=prompts)

    @property
    def active_rank(self) -> int:
        if self.joining.top_k is None:
            return super().active_rank
        chunks = min(self.joining.top_k, self.adapter.num_chunks)
        return chunks * self.adapter.rank_per_chunk + self.adapter.bias_rank


class SecondHypernetwork(DocToLoRAMethod):
    """The documents' adapter from another hypernetwork for the same base model, so that one sweep compares both.

    Args:
        checkpoint: its folder.

    Raises:
        ValueError: the checkpoint is missing or damaged, or was made for another base model.
    """

    def __init__(self, *, model: DocToLoRA, checkpoint: str, max_new_tokens: int = 32) -> None:
        second = DocToLoRA.from_pretrained(checkpoint, base_model=model.base_model_source, device=model.device)
        super().__init__(model=second.eval().requires_grad_(False), max_new_tokens=max_new_tokens)


class WrongDocument(DocToLoRAMethod):
    """Control: the adapter of another case's documents.

    Raises:
        ValueError: when preparing: there is no other case, so its documents would be the right ones.
    """

    of_another_document = True

    def build(self, case: Case) -> None:
        if set(case.others) == set(case.documents):
            raise ValueError(
                f"Set {case.set!r} has a single case, so there are no wrong documents. Set task.num_cases to 2 or more."
            )
        super().build(case)


class RandomAdapter(DocToLoRAMethod):
    """Control: Gaussian A and B; in every layer the delta's Frobenius norm is that of the documents' adapter."""

    def build(self, case: Case) -> None:
        super().build(case)
        self.adapter = random_like(self.adapter)


class DocToLoRAInPrompt(DocToLoRAMethod):
    """The documents' adapter, and the documents in the prompt as well."""

    def documents_for(self, question: Asked) -> Sequence[str]:
        return self.documents

    def stored_bytes(self) -> int:
        return super().stored_bytes() + sum(len(document.encode()) for document in self.documents)


def internalized(model: DocToLoRA, documents: Sequence[str]) -> LoRAAdapter:
    """The documents' adapter; without any, the hypernetwork's bias block alone."""
    if not documents:
        return remove_document(model.internalize("."), 0)
    return model.internalize(documents)


def delta_norms(adapter: LoRAAdapter) -> dict[str, Tensor]:
    """Frobenius norm of the whole delta, bias block included, by target: [L]."""
    return {
        # ||BᵀA||² is the sum of (A Aᵀ) * (B Bᵀ), both [rank, rank].
        name: adapter.scaling * ((A @ A.mT) * (B @ B.mT)).sum((-1, -2)).clamp(min=0).sqrt()
        for name, (A, B) in ((name, (A.double(), B.double())) for name, (A, B) in adapter.concatenated().items())
    }


def random_like(adapter: LoRAAdapter) -> LoRAAdapter:
    """An adapter of the same shape and, in every layer, the same norm of the delta; drawn from torch's generator."""
    parts = [adapter.A, adapter.B, adapter.bias_A, adapter.bias_B]
    A, B, bias_A, bias_B = ({name: torch.randn_like(rows) for name, rows in part.items()} for part in parts)
    drawn = replace(adapter, A=A, B=B, bias_A=bias_A, bias_B=bias_B)
    wanted, found = delta_norms(adapter), delta_norms(drawn)
    factors = {name: (wanted[name] / found[name])[:, None, None] for name in wanted}  # [L, 1, 1]
    scaled = [
        {name: (rows * factors[name].to(rows.dtype)).to(rows.dtype) for name, rows in part.items()}
        for part in (B, bias_B)
    ]
    return replace(drawn, B=scaled[0], bias_B=scaled[1])
