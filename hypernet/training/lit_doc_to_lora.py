"""The training of a hypernetwork by context distillation, as a Lightning module.

The frozen base model stays as it is and out of the checkpoints. Losses are in `hypernet.training.losses`.
"""

import logging
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hypernet.adapters.joining import first_inputs
from hypernet.base.packed_rows import PackedRows, question_places
from hypernet.base.targets import LayerTarget
from hypernet.data.batches import DistillationBatch
from hypernet.data.self_study.engines import TransformersEngine
from hypernet.data.self_study.messages import written_messages
from hypernet.data.splitting import StepPart
from hypernet.doc_to_lora import DocToLoRA
from hypernet.model.checkpoint import check_ours
from hypernet.model.closeness import FoundByStep, bound_of, fit_closeness
from hypernet.training.lit_module import LitModule, beginnings, check_same_sizes
from hypernet.training.losses import (
    AnswerTokens,
    ChunkMatch,
    LossTerm,
    QuestionInputs,
    Step,
    answers_right_by_kind,
    trained_terms,
)
from hypernet.training.losses.terms import ModuleInputs
from hypernet.training.optimizers import make_optimizer

log = logging.getLogger(__name__)

_TRAINED = "model.hypernetwork."
_DTYPES = ("float32", "bfloat16", "float16")
NUM_CALIBRATION_STEPS = 16  # some thousand tokens at the tiny scale
NUM_CLOSENESS_STEPS = 40  # of twelve documents, 2 to 3 minutes: 2,400 questions
# Written, and of these asked in a step; 624 for 52 steps, 90 s of a core.
_NEW_MESSAGES, _MESSAGES_A_STEP, _WRITTEN_AT_ONCE = 12, 32, 52
_PIECES = (8, 16, 32, 48, 64)  # tokens of a piece of a document that is asked about another one


class LitDocToLoRA(LitModule):
    """Trains the hypernetwork of a `DocToLoRA`.

    Args:
        model: with the hypernetwork to train.
        objective: name → term of the loss, logged as train/<name>; the keys of conf/objective/.
        optimizer: the keys of conf/optimizer/adamw.yaml.
        output_dir: where the trained checkpoint is written when training ends.
        include_base_model: put the base model into it, so that the folder needs nothing else.
        checkpoint_dtype: of its weights, "bfloat16" for half the bytes; None: as they are trained.
        checkpoint_shard_mb: megabytes of a file of them, at most; None: one file.
        closeness_steps: what `Closeness` is fitted to when training ends; None: steps of the training.

    Raises:
        ValueError: no term has a weight.
    """

    def __init__(
        self,
        *,
        model: DocToLoRA,
        objective: Mapping[str, LossTerm],
        optimizer: dict[str, Any],
        output_dir: str | None = None,
        include_base_model: bool = False,
        checkpoint_dtype: str | None = None,
        checkpoint_shard_mb: float | None = None,
        closeness_steps: Sequence[DistillationBatch] | None = None,
    ) -> None:
        super().__init__(output_dir=output_dir)
        if checkpoint_dtype not in (None, *_DTYPES):
            raise ValueError(f"checkpoint_dtype should be one of {', '.join(_DTYPES)}, got {checkpoint_dtype!r}.")
        if checkpoint_shard_mb is not None and not checkpoint_shard_mb > 0:
            raise ValueError(f"checkpoint_shard_mb should be above 0, got {checkpoint_shard_mb}.")
        self.checkpoint_dtype, self.checkpoint_shard_mb = checkpoint_dtype, checkpoint_shard_mb
        if output_dir:
            check_ours(output_dir)
        self.model = model
        self.objective = trained_terms(objective)
        self.steps_alone = max(term.steps_alone for term in self.objective.values())
        self.optimizer_settings = optimizer
        self.include_base_model = include_base_model
        self.closeness_steps = closeness_steps
        # The base model is read from its own files; a checkpoint may lack its keys, and only these (see
        # on_load_checkpoint).
        self.strict_loading = False

    def training_step(self, batch: DistillationBatch | StepPart, batch_idx: int) -> Tensor:
        part = StepPart.of(batch)
        terms = self._terms_now()
        needs = frozenset().union(*(term.needs for term in terms.values()))
        with self.phases("encode"):
            keys_only = all(term.needs == {"questions"} for term in terms.values())
            A, B = self.model.adapt(part.batch.chunk_ids, part.batch.chunk_mask, keys_only=keys_only)
        step = Step(part, A, B)
        self._compute(step, needs)
        losses = {name: term(step) for name, term in terms.items()}
        together = max(self.global_step - self.steps_alone, 0)
        loss = sum(term.weight_at(together) * losses[name] for name, term in terms.items())
        return self._finish(part, {"loss": loss, **losses})

    def _terms_now(self) -> dict[str, LossTerm]:
        alone = {name: term for name, term in self.objective.items() if self.global_step < term.steps_alone}
        return alone or self.objective

    def _compute(self, step: Step, needs: frozenset[str]) -> None:
        """Runs the models for these fields of the step. The adapters stay active, until after backward."""
        batch = step.batch
        with self.phases("teacher"), torch.no_grad():
            # Where every answer's probabilities were stored, there may be nothing to ask.
            if "teacher" in needs and (batch.teacher.target_kind >= 0).any():
                step.teacher = self.model(batch.teacher)
            if "plain_inputs" in needs:
                with self._module_inputs(step.answers) as step.plain_inputs:
                    self.model(batch.student)
        if "questions" in needs:
            with self.phases("questions"):
                step.questions = self._questions(batch)
        if not needs & {"student", "student_inputs"}:
            return
        self.model.activate(step.A, step.B, batch.chunk_counts, members=batch.members)
        with self.phases("student"), ExitStack() as undo:
            if "student_inputs" in needs:
                step.student_inputs = undo.enter_context(self._module_inputs(step.answers))
            step.student = self.model(batch.student)

    @torch.no_grad()
    def _questions(self, batch: DistillationBatch) -> QuestionInputs:
        model, recitation = self.model, self.model.hypernetwork.recitation
        if recitation is None:
            raise ValueError("Questions find their chunk in a recitation alone. Leave objective.match out.")
        rows = batch.student
        before, after = model.around_question
        answered = AnswerTokens.of(batch)
        chunk_of = {
            (row, column): chunk
            for row, column, owner, chunk in zip(*(field.tolist() for field in answered), strict=True)
            if owner >= 0
        }
        places = [place for place in question_places(rows, before=before, after=after) if place[::2] in chunk_of]
        with first_inputs(model.base_model, recitation.targets, layers=recitation.num_key_layers) as found:
            model(rows)
        width = max((len(columns) for _, columns, _ in places), default=1)
        row = torch.tensor([row for row, _, _ in places], dtype=torch.int64, device=self.device)
        columns = torch.tensor([own + [0] * (width - len(own)) for _, own, _ in places], device=self.device)
        columns = columns.view(len(places), width)
        lengths = torch.tensor([len(own) for _, own, _ in places], device=self.device)
        return QuestionInputs(
            by_layer={layer: x[row[:, None], columns] for layer, x in found.items()},
            asked=torch.arange(width, device=self.device) < lengths[:, None],
            row=row,
            chunk=torch.tensor([chunk_of[place[::2]] for place in places], dtype=torch.int64, device=self.device),
            best_cosines=recitation.best_cosines,
        )

    @contextmanager
    def _module_inputs(self, answers: AnswerTokens) -> Iterator[ModuleInputs]:
        """Collects what enters the adapted modules at these tokens, of what runs inside."""
        inputs: ModuleInputs = {}

        def read(key: tuple[str, LayerTarget], _: nn.Module, args: tuple[Tensor, ...]) -> None:
            inputs[key] = args[0].detach()[answers.row, answers.column]

        with ExitStack() as undo:
            for target in self.model.hypernetwork.targets:
                for place in target.modules():
                    module = self.model.base_model.get_submodule(place.path)
                    hook = module.register_forward_pre_hook(partial(read, (target.name, place)))
                    undo.callback(hook.remove)
            yield inputs

    def on_after_backward(self) -> None:
        super().on_after_backward()
        # Not before: checkpointed layers run their forward again during backward.
        self.model.injector.clear()

    def describe(self, batch: DistillationBatch | StepPart) -> list[str]:
        """How each of a batch's documents begins, for messages."""
        whole = StepPart.of(batch).batch
        firsts = [sum(whole.chunk_counts[:i]) for i in range(whole.num_own_rows)]
        return beginnings(self.model.tokenizer, [whole.chunk_ids[i][whole.chunk_mask[i]] for i in firsts])

    def count_tokens(self, batch: DistillationBatch | StepPart) -> dict[str, Tensor]:
        """Tokens of the documents ("context") and of the answers ("answer")."""
        whole = StepPart.of(batch).batch
        return {"context": whole.chunk_mask.sum(), "answer": (whole.student.target_kind >= 0).sum()}

    def validation_step(self, batch: DistillationBatch, batch_idx: int) -> None:
        injector = self.model.injector
        A, B = self.model.adapt(batch.chunk_ids, batch.chunk_mask)
        scores = {"no_context": self._exact(batch.student), "in_prompt": self._exact(batch.teacher)}
        for name, shift in (("adapter", 0), ("wrong_document", 1)):
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
        named = self.model.hypernetwork.named_parameters()
        return make_optimizer(named, num_steps=self.trainer.max_steps, **self.optimizer_settings)

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
        check_same_sizes(checkpoint["state_dict"], expected, "hypernetwork")
        if checkpoint["base_model_fingerprint"] != self.model.base_model_fingerprint:
            raise ValueError("The checkpoint was made with another base model. Resume with the one it was made with.")

    @torch.no_grad()
    def _found(self, batch: DistillationBatch) -> tuple[FoundByStep, QuestionInputs, Tensor]:
        """What a step's questions find in all of its chunks, of those whose answer stands in one of them."""
        recitation = self.model.hypernetwork.recitation
        assert recitation is not None
        (A,) = self.model.adapt(batch.chunk_ids, batch.chunk_mask, keys_only=True)[0].values()
        questions = self._questions(batch)
        known = questions.chunk >= 0
        inputs = {layer: x[known] for layer, x in questions.by_layer.items()}
        questions = questions._replace(
            by_layer=inputs, asked=questions.asked[known], row=questions.row[known], chunk=questions.chunk[known]
        )
        best, weight, unit = recitation.compared(inputs, questions.asked, A)
        return FoundByStep(best, weight, unit.to(torch.bfloat16), questions.row, batch.chunk_counts), questions, A

    @torch.no_grad()
    def _found_by(self, messages: Sequence[str], A: Tensor, chunk_counts: list[int]) -> FoundByStep:
        """What messages about none of a step's documents find in its chunks."""
        recitation = self.model.hypernetwork.recitation
        assert recitation is not None
        prompts = self.model.layout.prompt_ids(self.model.tokenizer, messages)
        best, weight, unit = recitation.compared(*self.model.read_questions(prompts), A)
        row = torch.full((len(messages),), -1, device=self.device)
        return FoundByStep(best, weight, unit.to(torch.bfloat16), row, chunk_counts)

    def _asked(self, train: Sequence[DistillationBatch]) -> list[FoundByStep]:
        """Questions of these steps, and what is about none of a step's documents: messages that the base model writes
        in a user's place, and pieces of the step before's documents."""
        engine = TransformersEngine(self.model.base_model, self.model.tokenizer, batch_size=_WRITTEN_AT_ONCE)
        messages = written_messages(engine, _NEW_MESSAGES * len(train))
        asked, before = [], list[str]()
        for step, batch in enumerate(train):
            rng = random.Random(step)
            found, _, A = self._found(batch.to(self.device))
            asked.append(found)
            some = rng.sample(messages, min(_MESSAGES_A_STEP, len(messages)))
            if some := [*some, *before]:
                asked.append(self._found_by(some, A, batch.chunk_counts))
            before = self._pieces(batch, rng)
        return asked

    def _pieces(self, batch: DistillationBatch, rng: random.Random) -> list[str]:
        """A piece of each document, as long as a question or longer."""
        chunks = [ids[own][1:-1].tolist() for ids, own in zip(batch.chunk_ids, batch.chunk_mask.bool(), strict=True)]
        pieces, start = [], 0
        for count in batch.chunk_counts:
            ids = sum(chunks[start : start + count], [])
            start += count
            length = min(len(ids), rng.choice(_PIECES))
            first = rng.randint(0, len(ids) - length)
            pieces.append(str(self.model.tokenizer.decode(ids[first : first + length])))
        return pieces

    def fit_closeness(self, train: Sequence[DistillationBatch], validation: Sequence[DistillationBatch]) -> None:
        """Fits what tells a question about a document from any other, and sets from where on a question uses a chunk.

        The bound is of validation: `MOST_TAKEN` of its questions reach it with a document of a batch half the
        validation away; where there are two sources, one of the other kind, since a question about a memo may well fit
        another memo.
        """
        recitation = self.model.hypernetwork.recitation
        assert recitation is not None
        self.model.hypernetwork.eval()
        if recitation.closeness is not None:
            fit_closeness(recitation.closeness, self._asked(train))
        found = [self._found(batch.to(self.device)) for batch in validation]
        near: list[Tensor] = []
        far: list[Tensor] = []
        with torch.no_grad():
            for step, (own, questions, _) in enumerate(found):
                other, _, A = found[(step + len(found) // 2) % len(found)]
                best, weight, unit = recitation.compared(questions.by_layer, questions.asked, A)
                for name, of, chunks in (("own", own.best, own.documents()), ("other", best, other.documents())):
                    for document, place in enumerate(chunks):
                        close = recitation.close(of[..., place], weight, unit)
                        if name == "own":
                            near.append(close[questions.row == document])
                        else:
                            far.append(close if len(found) > 1 else close[questions.row != document])
            if found:
                recitation.min_match.copy_(bound_of(torch.cat(near), torch.cat(far)))
                kept = (torch.cat(near) >= recitation.min_match).float().mean()
                log.info("A question uses a chunk from %.3f on: %.2f of the own do", recitation.min_match, kept)

    def on_fit_end(self) -> None:
        if any(isinstance(term, ChunkMatch) for term in self.objective.values()):
            data = self.trainer.datamodule
            steps, some = self.closeness_steps, range(len(self.closeness_steps or ()))
            if steps is None:
                steps = data.train
                some = torch.linspace(0, len(steps) - 1, NUM_CLOSENESS_STEPS).long().unique().tolist()
            validation = [data.validation[step] for step in range(len(data.validation))]
            self.fit_closeness([steps[step] for step in some], validation)
        if self.writes_result:
            dtype = self.checkpoint_dtype and getattr(torch, self.checkpoint_dtype)
            self.model.save_pretrained(
                self.output_dir,
                include_base_model=self.include_base_model,
                dtype=dtype or None,
                max_shard_mb=self.checkpoint_shard_mb,
            )
            log.info("Checkpoint written to %s", self.output_dir)
