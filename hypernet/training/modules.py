"""The two trainings as Lightning modules: the base model, and the hypernetwork by context distillation.

`LitBaseModel` trains every weight of a small causal LM; `LitDocToLoRA` trains the hypernetwork alone and keeps the
frozen base model out of its checkpoints. Both take one whole batch per step from `hypernet.data.curriculum`, or with
several processes or accumulated gradients a part of it (`hypernet.data.splitting`): the parts' losses add up to the
step's.
"""

import logging
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from hypernet.base.packed_attention import packed_logits
from hypernet.base.packed_rows import QUESTION_KINDS, PackedRows
from hypernet.base.targets import find_blocks
from hypernet.data.batches import DistillationBatch
from hypernet.data.splitting import StepPart, document_targets
from hypernet.doc_to_lora import DocToLoRA
from hypernet.training.losses import (
    answer_nll,
    answers_right,
    context_distillation_kl,
    context_distillation_kl_topk,
    energy_share,
    hidden_state_distance,
    key_contrast,
    key_energies,
    mean_absolute_weight,
    mean_per_document,
    silence,
)
from hypernet.training.optimizers import MuonAdamW, parameter_groups
from hypernet.training.timing import PhaseTimes

log = logging.getLogger(__name__)


def _optimizer(
    module: L.LightningModule, named: Iterable[tuple[str, nn.Parameter]], settings: dict[str, Any]
) -> dict[str, Any]:
    """AdamW, or Muon for the matrices; linear warm-up, constant, then half a cosine to min_lr_ratio at the end."""
    groups = parameter_groups(named, weight_decay=settings["weight_decay"], muon_scale=settings.get("muon_scale"))
    optimizer = MuonAdamW(groups, lr=settings["lr"], betas=tuple(settings["betas"]))
    last, warmup, floor = max(module.trainer.max_steps, 1), settings["warmup_steps"], settings["min_lr_ratio"]
    start = max(warmup, last * (1 - settings["decay_ratio"]))

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        progress = min(max(step - start, 0) / max(last - start, 1), 1.0)
        return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class _Trained(L.LightningModule):
    """What both trainings share: losses that are logged for the whole step, and what callbacks ask a module."""

    def __init__(self) -> None:
        super().__init__()
        self.phases = PhaseTimes()
        self._logged: dict[str, Tensor] = {}

    def _finish(self, part: StepPart, losses: dict[str, Tensor]) -> Tensor:
        """Logs the step's losses once its last part is done; returns what to call backward on.

        Args:
            losses: name → this part's portion of it; "loss" is what is minimised.
        """
        for name, value in losses.items():
            self._logged[name] = self._logged[name] + value.detach() if name in self._logged else value.detach()
        if part.is_last:
            logged, self._logged = self._logged, {}
            for name, value in logged.items():
                if part.num_parts > 1:
                    value = self.trainer.strategy.reduce(value, reduce_op="sum")
                self.log(f"train/{name}", value, prog_bar=name == "loss")
        self.phases.begin("backward")
        # Lightning takes the mean of the parts' gradients, over processes and accumulated batches.
        return losses["loss"] * part.num_parts

    def on_after_backward(self) -> None:
        self.phases.end("backward")

    def count_flops(self, batch: Any) -> int:
        """Floating-point operations of a training step on this batch, forward and backward. Leaves everything as is."""
        # Counted in the step itself, they would change its rounding.
        logged, self._logged, self.log = self._logged, {}, lambda *_, **__: None
        trained = [p for p in self.parameters() if p.requires_grad]
        try:
            with torch.random.fork_rng(), torch.enable_grad(), FlopCounterMode(display=False) as counter:
                # Not backward(): several processes would exchange these gradients.
                torch.autograd.grad(self.training_step(batch, 0), trained, allow_unused=True)
        finally:
            self._logged = logged
            del self.log
        self.on_after_backward()
        self.phases.take()
        return counter.get_total_flops()


class LitBaseModel(_Trained):
    """Trains a causal LM to answer questions from the article in its prompt, and background questions from its weights.

    Args:
        base_model, tokenizer: what is trained and how it reads.
        optimizer: the keys of conf/optimizer/adamw.yaml.
        document_weight: of the next-token loss on the article itself, beside 1 on answers.
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
        super().__init__()
        self.base_model = base_model
        self.tokenizer = tokenizer
        self.optimizer_settings = optimizer
        self.document_weight = document_weight
        self.output_dir = output_dir

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
        return _optimizer(self, self.base_model.named_parameters(), self.optimizer_settings)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        _check_same_sizes(checkpoint["state_dict"], self.state_dict(), "base model")

    def on_fit_start(self) -> None:
        self.base_model.train()

    def on_fit_end(self) -> None:
        if _is_complete(self):
            save_base_model(self.base_model, self.tokenizer, self.output_dir)
            log.info("Base model written to %s", self.output_dir)

    def describe(self, batch: PackedRows | StepPart) -> list[str]:
        """How each of a batch's documents begins, for messages."""
        rows = StepPart.of(batch).batch
        prefixes = [ids[place == 0] for ids, place in zip(rows.ids, rows.segments, strict=True)]
        return _beginnings(self.tokenizer, prefixes)

    def count_tokens(self, batch: PackedRows | StepPart) -> dict[str, Tensor]:
        """Tokens of the documents ("context") and of the answers ("answer")."""
        rows = StepPart.of(batch).batch
        return {"context": (rows.segments == 0).sum(), "answer": (rows.target_kind >= 0).sum()}


class LitDocToLoRA(_Trained):
    """Trains the hypernetwork by context distillation; the base model stays as it is and out of the checkpoints.

    Args:
        model: with the hypernetwork to train.
        optimizer: the keys of conf/optimizer/adamw.yaml.
        kl_weight: of KL(base model with the document in its prompt || base model with the adapter) on the document's
            questions.
        nll_weight: of the next-token loss on the true answers to the same questions.
        locality_weight: of KL(plain base model || base model with the adapter) on background and
            cross-document questions, and on those about another document in the prompt.
        hidden_weight: of deep context distillation, the distance between the hidden states of the two models of
            kl_weight after every block, where they predict an answer token; the mean over blocks.
        l1_weight: of the mean absolute entry of a document's generated A and B.
        key_weight: of how well the rows of A tell their own document's questions from all others by what enters their
            modules in the plain base model (`key_contrast` and both `key_energies`), over all layers and answer
            tokens. It compares the documents that are computed together, so with accumulated parts or several processes
            there are fewer to compare.
        key_steps: optimizer steps at the beginning in which the keys alone are trained, without teacher and student.
        share_weight: of the same for what is added to the model, with the adapters in force (see `energy_share`).
        contrast_half_life: optimizer steps after key_steps in which key_weight and share_weight fall to half, again
            and again: they shape the keys, and late in training would outweigh a KL that has become small. None: they
            stay.
        contrast_chunks: take as a question's own not its whole document but the one chunk that holds the answer word
            for word, where there is one: then the chunks of a document are told apart too.
        silence_weight: of what each document's weights do to the inputs of questions about others, whose own adapters
            are in force (see `silence`), over all layers and the same documents as the contrast.
        output_dir: where the trained checkpoint is written when training ends.
        include_base_model: put the base model into it, so that the folder needs nothing else.
    """

    def __init__(
        self,
        *,
        model: DocToLoRA,
        optimizer: dict,
        kl_weight: float = 1.0,
        nll_weight: float = 0.0,
        locality_weight: float = 0.5,
        hidden_weight: float = 0.0,
        l1_weight: float = 0.0,
        key_weight: float = 0.0,
        key_steps: int = 0,
        share_weight: float = 0.0,
        contrast_half_life: int | None = None,
        contrast_chunks: bool = False,
        silence_weight: float = 0.0,
        output_dir: str | None = None,
        include_base_model: bool = False,
    ) -> None:
        super().__init__()
        self.model = model
        self.optimizer_settings = optimizer
        self.kl_weight = kl_weight
        self.nll_weight = nll_weight
        self.locality_weight = locality_weight
        self.hidden_weight = hidden_weight
        self.l1_weight = l1_weight
        if key_steps and not key_weight:
            raise ValueError(f"key_steps={key_steps} train the keys alone, but key_weight is 0. Set it, e.g. 0.5.")
        self.key_weight = key_weight
        self.key_steps = key_steps
        self.share_weight = share_weight
        if contrast_half_life is not None and contrast_half_life <= 0:
            raise ValueError(
                f"Expected contrast_half_life to be a number of steps, or null for weights that stay, got "
                f"{contrast_half_life}."
            )
        self.contrast_half_life = contrast_half_life
        self.contrast_chunks = contrast_chunks
        self.silence_weight = silence_weight
        self.output_dir = output_dir
        self.include_base_model = include_base_model
        # The base model is read from its own files; a checkpoint may lack its keys, and only these (see
        # on_load_checkpoint).
        self.strict_loading = False

    def training_step(self, batch: DistillationBatch | StepPart, batch_idx: int) -> Tensor:
        part = StepPart.of(batch)
        batch = part.batch
        student_rows, teacher_rows = batch.student, batch.teacher
        with self.phases("encode"):
            A, B = self.model.adapt(batch.chunk_ids, batch.chunk_mask)
        if self.key_steps and self.global_step < self.key_steps:
            loss = self._key_loss(A, batch, _Answers.of(batch)) * part.share["document"]
            return self._finish(part, {"loss": self.key_weight * loss, "key": loss})
        with self.phases("teacher"), torch.no_grad(), self._hidden_states() as teacher_states:
            # Where every answer's probabilities were stored, there may be nothing to ask.
            teacher = self.model(teacher_rows) if (teacher_rows.target_kind >= 0).any() else None
        answers = _Answers.of(batch)
        key_loss = self._key_loss(A, batch, answers) * part.share["document"] if self.key_weight else None
        self.model.activate(A, B, batch.chunk_counts, members=batch.members)
        is_answer = student_rows.target_kind >= 0
        hidden = self._hidden_states()
        calls = self._module_calls(answers, wanted=bool(self.silence_weight or self.share_weight))
        with self.phases("student"), hidden as student_states, calls as student_calls:
            student = self.model(student_rows)
        kind = student_rows.target_kind[is_answer]
        document = is_answer.nonzero()[:, 0]
        kl = self._kl(student, teacher, batch, is_answer)
        about_document = (kind == QUESTION_KINDS.index("document")) | (kind == QUESTION_KINDS.index("unanswerable"))
        num_documents = len(student_rows.ids)
        about, other = part.share["document"], part.share["background"]
        loss_kl = mean_per_document(kl[about_document], document[about_document], num_documents) * about
        loss_locality = mean_per_document(kl[~about_document], document[~about_document], num_documents) * other
        loss = self.kl_weight * loss_kl + self.locality_weight * loss_locality
        if self.nll_weight:
            nll = answer_nll(student[about_document], student_rows.targets()[is_answer][about_document])
            loss_nll = mean_per_document(nll, document[about_document], num_documents) * about
            loss = loss + self.nll_weight * loss_nll
        losses = {"kl": loss_kl, "locality_kl": loss_locality}
        if self.hidden_weight:
            in_teacher = teacher_rows.target_kind >= 0
            distance = torch.stack(
                [
                    hidden_state_distance(mine[is_answer][about_document], theirs[in_teacher][about_document])
                    for mine, theirs in zip(student_states, teacher_states, strict=True)
                ]
            ).mean(0)
            losses["hidden"] = mean_per_document(distance, document[about_document], num_documents) * about
            loss = loss + self.hidden_weight * losses["hidden"]
        if self.l1_weight:
            sizes = mean_absolute_weight([*A.values(), *B.values()], batch.chunk_counts)
            # Companions from another part of the step come last, and count there.
            num_own = batch.num_own_rows  # 0 in a part that only has rows with a document in the prompt
            losses["l1"] = sizes[:num_own].sum() / max(num_own, 1) * part.share["rows"]
            loss = loss + self.l1_weight * losses["l1"]
        if key_loss is not None:
            losses["key"] = key_loss
            loss = loss + self._contrast_left() * self.key_weight * key_loss
        if self.share_weight:
            losses["share"] = self._share_loss(A, B, batch, answers, student_calls) * about
            loss = loss + self._contrast_left() * self.share_weight * losses["share"]
        if self.silence_weight:
            losses["silence"] = self._silence_loss(A, B, batch, answers, student_calls) * part.share["rows"]
            loss = loss + self.silence_weight * losses["silence"]
        return self._finish(part, {"loss": loss, **losses})

    def _contrast_left(self) -> float:
        if self.contrast_half_life is None:
            return 1.0
        return 0.5 ** (max(self.global_step - self.key_steps, 0) / self.contrast_half_life)

    def _kl(self, student: Tensor, teacher: Tensor | None, batch: DistillationBatch, is_answer: Tensor) -> Tensor:
        """KL of each answer token, [P]: from stored probabilities where there are any, else from the logits."""
        if batch.stored is None:
            return context_distillation_kl(student, teacher)
        where, indices, log_probs = (tensor[is_answer] for tensor in batch.stored)
        stored = context_distillation_kl_topk(student[where], indices[where], log_probs[where])
        kl = stored.new_zeros(len(student)).masked_scatter(where, stored)
        if teacher is None:
            return kl
        # The teacher's rows may hold the questions whose probabilities were stored, or lack them.
        teacher = teacher[~where] if len(teacher) == len(student) else teacher
        return kl.masked_scatter(~where, context_distillation_kl(student[~where], teacher))

    def _key_loss(self, A: dict[str, Tensor], batch: DistillationBatch, answers: "_Answers") -> Tensor:
        """`key_contrast` plus both `key_energies`, means over layers, targets, both directions, and documents."""
        with self.phases("teacher"), torch.no_grad(), self._module_calls(answers) as calls:
            self.model(batch.student)
        num_documents = len(batch.student.ids)
        owned = answers.owner[answers.owner >= 0]
        losses = []
        for (name, layer), (x, _) in calls.items():
            keys = A[name][:, layer, :, : x.shape[-1]]
            contrasted = {"keys": keys, "inputs": x, "owner": answers.owner, "chunk_counts": batch.chunk_counts}
            by_document, by_question = key_contrast(**contrasted, chunk=self._own_chunk(answers))
            of_questions, of_rows = key_energies(**contrasted, chunk=self._own_chunk(answers))
            per_token = (by_document + by_question) / 2 + of_questions
            losses.append(mean_per_document(per_token, owned, num_documents) + of_rows[owned.unique()].mean())
        return torch.stack(losses).mean()

    def _share_loss(
        self,
        A: dict[str, Tensor],
        B: dict[str, Tensor],
        batch: DistillationBatch,
        answers: "_Answers",
        calls: dict[tuple[str, int], tuple[Tensor, Tensor]],
    ) -> Tensor:
        """Mean over layers and targets of `energy_share`, and over documents that have questions."""
        values = [
            energy_share(
                A[name][:, layer, :, : x.shape[-1]],
                B[name][:, layer, :, : y.shape[-1]],
                *(x, answers.owner, batch.chunk_counts),
                chunk=self._own_chunk(answers),
            )
            for (name, layer), (x, y) in calls.items()
        ]
        owned = answers.owner[answers.owner >= 0]
        return mean_per_document(torch.stack(values).mean(0), owned, len(batch.student.ids))

    def _own_chunk(self, answers: "_Answers") -> Tensor | None:
        return answers.chunk if self.contrast_chunks else None

    def _silence_loss(
        self,
        A: dict[str, Tensor],
        B: dict[str, Tensor],
        batch: DistillationBatch,
        answers: "_Answers",
        calls: dict[tuple[str, int], tuple[Tensor, Tensor]],
    ) -> Tensor:
        """Mean over layers and targets of `silence`, and over documents."""
        scaling = self.model.hypernetwork.scaling
        values = [
            silence(
                *(A[name][:, layer, :, : x.shape[-1]], B[name][:, layer, :, : y.shape[-1]], x, y),
                *(answers.owner, batch.chunk_counts),
                scaling=scaling,
            )
            for (name, layer), (x, y) in calls.items()
        ]
        return mean_per_document(torch.stack(values).mean(0), answers.row, len(batch.student.ids))

    @contextmanager
    def _module_calls(
        self, answers: "_Answers", wanted: bool = True
    ) -> Iterator[dict[tuple[str, int], tuple[Tensor, Tensor]]]:
        """Collects what enters and leaves the adapted modules at the answers, [P, d] each, by target name and layer."""
        calls: dict[tuple[str, int], tuple[Tensor, Tensor]] = {}
        hooks = []
        for target in self.model.hypernetwork.targets if wanted else ():
            for layer, path in enumerate(target.paths):
                if path is not None:

                    def read(_, args, output, key=(target.name, layer)) -> None:
                        x, y = args[0].detach(), output.detach()
                        calls[key] = x[answers.row, answers.column], y[answers.row, answers.column]

                    hooks.append(self.model.base_model.get_submodule(path).register_forward_hook(read))
        try:
            yield calls
        finally:
            for hook in hooks:
                hook.remove()

    @contextmanager
    def _hidden_states(self) -> Iterator[list[Tensor]]:
        """Collects the states after every block, [N, S, D] each, of what runs inside; nothing without hidden_weight."""
        states: list[Tensor] = []
        if not self.hidden_weight:
            yield states
            return
        decoder, name = find_blocks(self.model.base_model)
        # The block's own output, not a slice of it: checkpointed blocks run again in backward, without these hooks, and
        # must then save as many tensors.
        hooks = [
            block.register_forward_hook(lambda _, __, out: states.append(out[0] if isinstance(out, tuple) else out))
            for block in getattr(decoder, name)
        ]
        try:
            yield states
        finally:
            for hook in hooks:
                hook.remove()

    def on_after_backward(self) -> None:
        super().on_after_backward()
        # Not before: checkpointed layers run their forward again during backward.
        self.model.injector.clear()

    def describe(self, batch: DistillationBatch | StepPart) -> list[str]:
        """How each of a batch's documents begins, for messages."""
        batch = StepPart.of(batch).batch
        firsts = [sum(batch.chunk_counts[:i]) for i in range(batch.num_own_rows)]
        return _beginnings(self.model.tokenizer, [batch.chunk_ids[i][batch.chunk_mask[i]] for i in firsts])

    def count_tokens(self, batch: DistillationBatch | StepPart) -> dict[str, Tensor]:
        """Tokens of the documents ("context") and of the answers ("answer")."""
        batch = StepPart.of(batch).batch
        return {"context": batch.chunk_mask.sum(), "answer": (batch.student.target_kind >= 0).sum()}

    def validation_step(self, batch: DistillationBatch, batch_idx: int) -> None:
        injector = self.model.injector
        A, B = self.model.adapt(batch.chunk_ids, batch.chunk_mask)
        scores = {"no_context": self._exact(batch.student), "in_prompt": self._exact(batch.teacher)}
        for name, shift in (("adapter", 0), ("wrong_adapter", 1)):
            self.model.activate(A, B, batch.chunk_counts, members=batch.members, shift=shift)
            scores[name] = self._exact(batch.student)
            injector.clear()
        for method, by_kind in scores.items():
            for kind, right in by_kind.items():
                self.log(
                    f"val/{kind}_{method}",
                    right.float().mean(),
                    batch_size=len(right),
                    prog_bar=(kind, method) == ("document", "adapter"),
                )

    def on_validation_epoch_end(self) -> None:
        own, floor, ceiling = (
            self.trainer.callback_metrics.get(f"val/document_{method}")
            for method in ("adapter", "no_context", "in_prompt")
        )
        if own is not None and ceiling > floor:
            self.log("val/gap_closed", (own - floor) / (ceiling - floor), prog_bar=True)

    def _exact(self, rows: PackedRows) -> dict[str, Tensor]:
        return answers_right_by_kind(rows, self.model(rows).argmax(-1))

    def configure_optimizers(self) -> dict[str, Any]:
        return _optimizer(self, self.model.hypernetwork.named_parameters(), self.optimizer_settings)

    def on_fit_start(self) -> None:
        self.model.hypernetwork.train()
        self.model.base_model.eval()
        if not self.model.hypernetwork.is_calibrated:
            self._calibrate()
        counts = self.model.hypernetwork.parameter_counts()
        log.info("Hypernetwork: %s parameters", ", ".join(f"{name} {count:,}" for name, count in counts.items()))

    def _calibrate(self) -> None:
        """Statistics of the features, from steps spread over the whole run; the same in every process."""
        train = self.trainer.datamodule.train

        def features() -> Iterator[tuple[Tensor, Tensor]]:
            for step in torch.linspace(0, len(train) - 1, NUM_CALIBRATION_STEPS).long().unique().tolist():
                batch = train[step].to(self.device)
                yield self.model.context_encoder(batch.chunk_ids, batch.chunk_mask), batch.chunk_mask

        self.model.hypernetwork.calibrate(features())

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        state = checkpoint["state_dict"]
        checkpoint["state_dict"] = {name: state[name] for name in state if name.startswith(_TRAINED)}
        checkpoint["base_model_fingerprint"] = self.model.base_model_fingerprint

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        # Loading is not strict, which would also pass over a renamed weight of the hypernetwork in silence.
        expected = {_TRAINED + name: tensor for name, tensor in self.model.hypernetwork.state_dict().items()}
        _check_same_sizes(checkpoint["state_dict"], expected, "hypernetwork")
        if checkpoint["base_model_fingerprint"] != self.model.base_model_fingerprint:
            raise ValueError("The checkpoint was made with another base model. Resume with the one it was made with.")

    def on_fit_end(self) -> None:
        if _is_complete(self):
            self.model.save_pretrained(self.output_dir, include_base_model=self.include_base_model)
            log.info("Checkpoint written to %s", self.output_dir)


class _Answers(NamedTuple):
    """Where a batch's own rows predict answer tokens, P of them: row, column, and the document asked about or -1.

    chunk: of all chunks the one that holds the answer, -1 where that is unknown.
    """

    row: Tensor
    column: Tensor
    owner: Tensor
    chunk: Tensor

    @classmethod
    def of(cls, batch: DistillationBatch) -> "_Answers":
        rows = batch.student
        is_answer = rows.target_kind >= 0
        is_answer[batch.num_own_rows :] = False  # with a document in the prompt
        row, column = is_answer.nonzero(as_tuple=True)
        kinds = rows.target_kind[row, column]
        about = (kinds == QUESTION_KINDS.index("document")) | (kinds == QUESTION_KINDS.index("unanswerable"))
        first = torch.tensor([0, *accumulate(batch.chunk_counts)], device=row.device)
        answer_chunk = batch.answer_chunk[row, column]
        chunk = torch.where(about & (answer_chunk >= 0), first[row] + answer_chunk, -1)
        return cls(row, column, torch.where(about, row, -1), chunk)


_TRAINED = "model.hypernetwork."
NUM_CALIBRATION_STEPS = 16  # some thousand tokens at the tiny scale


def _is_complete(module: LitBaseModel | LitDocToLoRA) -> bool:
    """Whether this process shall write the result now: also if the run was killed between its last step and this."""
    trainer = module.trainer
    return bool(module.output_dir) and trainer.is_global_zero and trainer.global_step >= trainer.max_steps


def _beginnings(tokenizer: Any, documents: list[Tensor]) -> list[str]:
    return [" ".join(tokenizer.decode(ids[:16], skip_special_tokens=True).split()) for ids in documents]


def _check_same_sizes(saved: dict[str, Tensor], expected: dict[str, Tensor], what: str) -> None:
    shapes = [{name: tensor.shape for name, tensor in state.items()} for state in (saved, expected)]
    differing = sorted(name for name in saved.keys() | expected.keys() if shapes[0].get(name) != shapes[1].get(name))
    if differing:
        raise ValueError(
            f"The checkpoint is of another {what}: {differing[0]} and {len(differing) - 1} more differ. "
            "Resume with the configuration it was made with."
        )


def save_base_model(base_model: nn.Module, tokenizer: Any, output_dir: str | Path) -> None:
    """transformers' format: config.json, model.safetensors, the tokenizer."""
    base_model.save_pretrained(output_dir)
    tokenizer.save_pretrained(output_dir)


def answers_right_by_kind(rows: PackedRows, predicted: Tensor) -> dict[str, Tensor]:
    """kind → whether each answer of that kind would be decoded exactly, [number of answers] bool.

    Args:
        predicted: the token chosen for each answer token, [number of answer tokens], in the rows' order.
    """
    result = {}
    is_answer = rows.target_kind >= 0
    kinds, targets = rows.target_kind[is_answer], rows.targets()[is_answer]
    row = torch.arange(len(rows.ids), device=rows.ids.device)[:, None]
    answer_id = (row * (int(rows.segments.max()) + 1) + rows.segments)[is_answer]
    for number, kind in enumerate(QUESTION_KINDS):
        of_kind = kinds == number
        if of_kind.any():
            result[kind] = answers_right(predicted[of_kind], targets[of_kind], answer_id[of_kind])
    return result
