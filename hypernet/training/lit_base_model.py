"""The training of every weight of a small causal LM, as a Lightning module."""

import logging
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from hypernet.base.packed_attention import packed_logits
from hypernet.base.packed_rows import PackedRows
from hypernet.data.splitting import StepPart, document_targets
from hypernet.io.logs import without_weight_bars
from hypernet.training.lit_module import LitModule, beginnings, check_same_sizes
from hypernet.training.losses import answer_nll, answers_right_by_kind
from hypernet.training.optimizers import make_optimizer

log = logging.getLogger(__name__)


class LitBaseModel(LitModule):
    """Trains a causal LM to answer questions from the article in its prompt, and background questions from its weights.

    Args:
        base_model, tokenizer: what is trained and how it reads.
        optimizer: the keys of conf/optimizer/adamw.yaml.
        document_weight: of the next-token loss on the article itself; that on answers has 1.
        output_dir: where the model is written in transformers' format when training ends.
    """

    def __init__(
        self,
        *,
        base_model: nn.Module,
        tokenizer: Any,
        optimizer: dict,
        document_weight: float = 0.1,
        output_dir: str | None = None,
    ) -> None:
        super().__init__(output_dir=output_dir)
        self.base_model = base_model
        self.tokenizer = tokenizer
        self.optimizer_settings = optimizer
        self.document_weight = document_weight

    def training_step(self, batch: PackedRows | StepPart, batch_idx: int) -> Tensor:
        part = StepPart.of(batch)
        batch = part.batch
        targets, answer, document = batch.targets(), batch.target_kind >= 0, document_targets(batch)
        with self.phases("student"):
            logits = packed_logits(self.base_model, batch, answer | document)
        losses = answer_nll(logits, targets[answer | document])
        is_answer = answer[answer | document]
        weight = batch.target_weight[answer]
        answer_loss = (losses[is_answer] * weight).sum() / weight.sum() * part.share["answer_weight"]
        loss = answer_loss + self.document_weight * (losses[~is_answer].mean() * part.share["document_tokens"])
        return self._finish(part, {"loss": loss, "answer_nll": answer_loss})

    def validation_step(self, batch: PackedRows, batch_idx: int) -> None:
        predicted = packed_logits(self.base_model, batch, batch.target_kind >= 0).argmax(-1)
        for kind, right in answers_right_by_kind(batch, predicted).items():
            if kind != "reordering":
                self.log(
                    f"val/{kind}_exact_match", right.float().mean(), batch_size=len(right), prog_bar=kind == "document"
                )

    def configure_optimizers(self) -> dict[str, Any]:
        named = self.base_model.named_parameters()
        return make_optimizer(named, num_steps=self.trainer.max_steps, **self.optimizer_settings)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        check_same_sizes(checkpoint["state_dict"], self.state_dict(), "base model")

    def on_fit_start(self) -> None:
        self.base_model.train()

    def on_fit_end(self) -> None:
        if self.writes_result:
            save_base_model(self.base_model, self.tokenizer, self.output_dir)
            log.info("Base model written to %s", self.output_dir)

    def describe(self, batch: PackedRows | StepPart) -> list[str]:
        """How each of a batch's documents begins, for messages."""
        rows = StepPart.of(batch).batch
        prefixes = [ids[place == 0] for ids, place in zip(rows.ids, rows.segments, strict=True)]
        return beginnings(self.tokenizer, prefixes)

    def count_tokens(self, batch: PackedRows | StepPart) -> dict[str, Tensor]:
        """Tokens of the documents ("context") and of the answers ("answer")."""
        rows = StepPart.of(batch).batch
        return {"context": (rows.segments == 0).sum(), "answer": (rows.target_kind >= 0).sum()}


def save_base_model(base_model: nn.Module, tokenizer: Any, output_dir: str | Path) -> None:
    """transformers' format: config.json, model.safetensors, the tokenizer."""
    with without_weight_bars():
        base_model.save_pretrained(output_dir)
    tokenizer.save_pretrained(output_dir)
