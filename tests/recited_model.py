"""A tiny model that says the sentences of two documents, which it was trained on."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch.nn.utils.rnn import pad_sequence

from hypernet.base.base_model import load_base_model
from hypernet.base.packed_rows import Segment, pack_row, pad_rows
from hypernet.doc_to_lora import DocToLoRA
from hypernet.model.context_encoder import drop_context

DOCUMENT = "Velmar Tosk was born in Korvale. The capital of Norbach is Ilda. Her employer is the Orrin Institute."
OTHERS = "Mira Solen works for Tarn. The river Aske flows through Belmont. Jon Varga was born in 1921."
QUESTION = "What is the capital of Norbach?"


def calibrated_model(documents: Sequence[str], **aggregator) -> DocToLoRA:
    """With the statistics of these documents, and no step of training."""
    base_model, tokenizer = load_base_model(Path("assets/tiny/base_model"), dtype=torch.float32)
    torch.manual_seed(0)
    aggregator = {"name": "recitation", "num_key_layers": 2, **aggregator}
    result = DocToLoRA.build(
        base_model=base_model,
        tokenizer=tokenizer,
        target_modules=["down_proj"],
        hypernetwork={"rank": 16, "scaling": 1.0, "bias_block": False, "aggregator": aggregator},
        context_encoder={"kind": "recited", "min_chunk_tokens": 4},
        max_chunk_tokens=24,
    )
    pieces = [result.chunk(text) for text in documents]
    result.hypernetwork.calibrate(drop_context(result.context_encoder(p.ids, p.mask), p.mask) for p in pieces)
    return result


def recited_model() -> DocToLoRA:
    result = calibrated_model((DOCUMENT, OTHERS), key_dim=64)
    tokenizer = result.tokenizer
    # Trained on these very documents: what is tested is how a document is read and asked, not what carries over.
    pieces = [result.chunk(text) for text in (DOCUMENT, OTHERS)]
    rows = [(ids, mask) for piece in pieces for ids, mask in zip(piece.ids, piece.mask, strict=True)]
    ids, mask = (pad_sequence([row[part] for row in rows], batch_first=True) for part in (0, 1))
    texts = [text[a:b].strip() for text, piece in zip((DOCUMENT, OTHERS), pieces, strict=True) for a, b in piece.spans]
    optimizer = torch.optim.Adam(result.hypernetwork.parameters(), 0.01)
    layout = result.layout
    for step in range(40):
        question = ("Who is it?", QUESTION, "Where was Jon Varga born?")[step % 3]
        (prompt,) = layout.prompt_ids(tokenizer, [question])
        answers = [tokenizer(layout.answer(text), add_special_tokens=False)["input_ids"] for text in texts]
        packed = pad_rows(
            [pack_row((), [Segment(prompt + answer, len(prompt), False, 0)]) for answer in answers],
            pad_id=tokenizer.pad_token_id,
        )
        A, B = result.adapt(ids, mask)
        result.activate(A, B, [1] * len(texts))
        wanted = packed.targets()[packed.target_kind >= 0]
        loss = torch.nn.functional.cross_entropy(result(packed), wanted)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        result.injector.clear()
    return result.eval()
