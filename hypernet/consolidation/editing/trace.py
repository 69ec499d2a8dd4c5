"""causal_trace: which feed-forward layers hold a fact, by restoring each in a run that cannot read the subject."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from hypernet.consolidation.editing.edits import Edit, at_subjects, down_paths, edit_rows
from hypernet.consolidation.editing.values import answer_nll, at_places
from hypernet.doc_to_lora import DocToLoRA


@torch.no_grad()
def causal_trace(
    model: DocToLoRA, known: Sequence[Edit], *, noise: float = 3.0, window: int = 1, num_samples: int = 4, seed: int = 0
) -> Tensor:
    """Mean indirect effect of each block, [L]: by how much p(answer) rises when the outputs of its down projection, and
    of those around it, are restored at the subject's last token, after noise on the subject's embeddings.

    Args:
        known: questions with the answers that the base model gives.
        noise: standard deviation, in units of that of the embeddings.
        window: blocks restored together, centred.
        num_samples: draws of the noise.

    Source: Meng et al. 2022, section 2.1, https://arxiv.org/abs/2202.05262.
    """
    paths = down_paths(model)
    num_layers = len(paths)
    rows = edit_rows(model, known)
    own = {path: output for path, (_, output) in at_subjects(model, rows, paths).items()}
    embeddings = model.base_model.get_input_embeddings()
    (table,) = embeddings.parameters()
    deviation = noise * float(table.std())
    positions = torch.arange(rows.rows.ids.shape[1], device=rows.places.device)
    subject = (positions >= rows.starts[:, None]) & (positions <= rows.places[:, None])
    effects = torch.zeros(num_layers)
    for sample in range(num_samples):
        generator = torch.Generator().manual_seed(seed * 1_000_003 + sample)
        shape = *rows.rows.ids.shape, table.shape[1]
        drawn = deviation * torch.randn(shape, generator=generator).to(table) * subject[..., None]

        def corrupt(_module: nn.Module, _args: object, output: Tensor, *, drawn: Tensor = drawn) -> Tensor:
            return output + drawn

        handle = embeddings.register_forward_hook(corrupt)
        try:
            corrupted = answer_nll(model, rows, {}).neg().exp().mean()
            for layer in range(num_layers):
                near = paths[max(0, layer - window // 2) : layer + (window + 1) // 2]
                restored = (
                    answer_nll(model, rows, {path: at_places(rows, own[path]) for path in near}).neg().exp().mean()
                )
                effects[layer] += float(restored - corrupted) / num_samples
        finally:
            handle.remove()
    return effects
