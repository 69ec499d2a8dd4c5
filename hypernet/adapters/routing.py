"""Which chunks of an adapter a question is about, by the adapter itself; the others are left out.

    energies = chunk_energies(base_model, adapter, prompts)      # [questions, C]
    adapters = routed(adapter, energies, num_chunks=2)           # for each question the chunks that it is about

Training teaches the rows of A to answer their own document's questions and no others (`key_weight`, `share_weight`), so
an adapter is an index of its documents as well. Joined, all chunks answer every question and each adds its murmur; with
a few of them in force there is no crowd, however many documents there are, and the delta's rank stays small. That it
takes a choice for every question is the price: what is routed is no one LoRA that another program could load.
Choosing whole LoRAs by embeddings of the input is LoraRetriever's idea, Zhao et al. 2024,
https://arxiv.org/abs/2402.09997
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from hypernet.adapters.adapter import LoRAAdapter
from hypernet.adapters.composition import take
from hypernet.base.targets import LoRATarget


@torch.no_grad()
def last_inputs(
    base_model: nn.Module, targets: Sequence[LoRATarget], prompts: Sequence[Sequence[int]]
) -> dict[tuple[str, int], Tensor]:
    """What enters the target modules at each prompt's last token, by target name and layer: [questions, d_in].

    Args:
        base_model: as it is: an adapter in force changes what enters.
        prompts: token ids, one list for each question.
    """
    device = next(base_model.parameters()).device
    rows = [torch.tensor(ids, device=device) for ids in prompts]
    last = torch.tensor([len(row) - 1 for row in rows], device=device)
    ids = pad_sequence(rows, batch_first=True)
    mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    found: dict[tuple[str, int], Tensor] = {}
    hooks = []
    for target in targets:
        for place in target.modules():

            def read(_: nn.Module, args: tuple[Tensor], key: tuple[str, int] = (target.name, place.layer)) -> None:
                found[key] = args[0][torch.arange(len(last), device=device), last]

            hooks.append(base_model.get_submodule(place.path).register_forward_pre_hook(read))
    try:
        base_model(input_ids=ids, attention_mask=mask, use_cache=False, logits_to_keep=1)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def chunk_energies(base_model: nn.Module, adapter: LoRAAdapter, prompts: Sequence[Sequence[int]]) -> Tensor:
    """How loudly each chunk's rows of A answer each prompt: the modules' geometric mean of ‖A_c x‖², [questions, C].

    x is what enters a module of the plain base model at the prompt's last token, where the answer begins. A chunk that
    one module knows nothing of is not the one, however loud the others are.

    Args:
        adapter: with its chunks as they were generated, not told apart (see `DocToLoRA.internalize`).
        prompts: token ids, one list for each question.

    Raises:
        ValueError: the adapter's chunks were told apart or made one block: their rows are no keys of theirs any more.
    """
    adapter.check_generated("routed")
    logs = []
    for (name, layer), x in last_inputs(base_model, adapter.targets, prompts).items():
        A = adapter.A[name][:, layer, :, : x.shape[1]].to(x.device)  # [C, R, d_in]
        answered = (x.to(A.dtype) @ A.flatten(0, 1).mT).float().square().view(len(x), *A.shape[:2]).sum(-1)
        logs.append(answered.clamp(min=torch.finfo(torch.float32).tiny).log())
    return torch.stack(logs).mean(0).exp()


def routed(
    adapter: LoRAAdapter, energies: Tensor, *, num_chunks: int = 2, sharpness: float = 1.0
) -> list[LoRAAdapter]:
    """For each question an adapter of the chunks that answer it loudest, in the document's order.

    Args:
        energies: [questions, C], as of `chunk_energies`.
        num_chunks: for each question; all, if the adapter has fewer.
        sharpness: a chunk's B is weighted by the power of its energy, in units of the loudest one's, so that one that
            is chosen for want of a better hardly speaks. 0: all that are chosen count alike.

    Raises:
        ValueError: num_chunks is below 1, or sharpness below 0.
    """
    if num_chunks < 1:
        raise ValueError(f"Expected num_chunks of at least 1, got {num_chunks}. Leave routing out for all chunks.")
    if not sharpness >= 0:
        raise ValueError(f"Expected a sharpness of at least 0, got {sharpness}.")
    if not adapter.num_chunks:
        return [adapter] * len(energies)
    chunks = energies.topk(min(num_chunks, adapter.num_chunks), dim=1).indices.sort(dim=1).values
    chosen = energies.gather(1, chunks)
    weights = (chosen / chosen.amax(dim=1, keepdim=True)) ** sharpness
    return [take(adapter, *pair) for pair in zip(chunks.tolist(), weights.tolist(), strict=True)]
