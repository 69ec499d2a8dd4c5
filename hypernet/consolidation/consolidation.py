"""Consolidation: one memory's third tier. Its valid memories become weights, which answer an empty prompt.

consolidation = Consolidation(Memory.open("outputs/memory", model="assets/tiny"))
candidate = consolidation.consolidate(Filters(user_id="alice"))       # trained and judged, never live by itself
consolidation.promote(candidate.name, Filters(user_id="alice"))       # refused unless it passed the gate
consolidation.ask("Who taught Fenda Elfax?", Filters(user_id="alice")).text
consolidation.rollback("base", Filters(user_id="alice"))
consolidation.forget(ref, Filters(user_id="alice"))                   # and rebuilt from the rest
"""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from hypernet.consolidation.consolidator import Consolidator
from hypernet.consolidation.documents import add_documents
from hypernet.consolidation.gate import Asked, Exam, PromotionGate, answered
from hypernet.consolidation.rehearsal import SelfSynthesised, written_names
from hypernet.consolidation.weights import MovedWeights, installed
from hypernet.doc_to_lora import DocToLoRA
from hypernet.io.files import replaced
from hypernet.memory.ask import Answer, MemoryQuestion
from hypernet.memory.memory import Memory
from hypernet.memory.store.records import Filters, MemoryVersion
from hypernet.memory.store.times import now, to_text
from hypernet.memory.weights.versions import Manifest, Version, Versions

STARTS = ("adapters", "nothing")
WEIGHT_TIERS = ("weights", "weights+adapter")
_CHECKPOINT, _TRAINING, _HANDED_OVER = "state.safetensors", "training.json", "handed_over.json"
_PURGED = "A memory was purged while it was trained on. Consolidate again."
_DECOYS = 16  # names that a deleted answer is compared with
_MOST_OTHERS = 64  # of other users' memories and of deleted ones in an exam


class Rebuilt(NamedTuple):
    """What forgetting a consolidated memory took.

    version: that is live now, or "base". gone: that answer no more. failed: why the gate refused the rest, if it did.
    """

    version: str
    gone: tuple[str, ...]
    seconds: float
    failed: tuple[str, ...] = ()


class Consolidation:
    """Trains, judges and serves the weights of a memory.

    Args:
        memory: opened with a checkpoint.
        consolidator, gate: how it is trained and what it must show.
        start: where training starts from: the "adapters" that the hypernetwork generated, or "nothing".
        anew: every version is trained from there on all of its memories, so that nothing adds up over the nights;
            False: from the version that is live, two thirds on what is new.
        background: questions without a memory that must stay answered as they are; None: the base model writes some.
        texts: unrelated ones on which the weights should change nothing.

    Raises:
        ValueError: an unknown start.
    """

    def __init__(
        self,
        memory: Memory,
        *,
        consolidator: Consolidator | None = None,
        gate: PromotionGate | None = None,
        start: str = "nothing",
        anew: bool = True,
        background: Sequence[str] | None = None,
        texts: Sequence[str] = (),
    ) -> None:
        if start not in STARTS:
            raise ValueError(f"start is {start!r}. Versions start from {' or '.join(STARTS)}.")
        self.memory, self.start, self.anew = memory, start, anew
        self.consolidator, self.gate = consolidator or Consolidator(), gate or PromotionGate()
        self.background, self.texts = background, tuple(texts)
        self._loaded: tuple[str, MovedWeights] | None = None

    @property
    def model(self) -> DocToLoRA:
        """ValueError if the memory was opened without a checkpoint."""
        if self.memory.bank.model is None:
            raise ValueError("Consolidation needs a checkpoint: open the memory with model=..., such as assets/tiny.")
        return self.memory.bank.model.doc_to_lora()

    def versions(self, filters: Filters) -> Versions:
        return Versions.of(self.memory.store.folder, filters)

    def live(self, filters: Filters) -> Version | None:
        """What answers now; None: the base model."""
        valid = {memory.ref for memory in self.memory.store.valid(filters)}
        return self.versions(filters).live(lambda ref: ref in valid)

    def waiting(self, filters: Filters, *, retry: bool = False) -> list[MemoryVersion]:
        """What holds and is not in the weights, without what a refused candidate brought in or a rollback took out
        (`retry`: with it)."""
        live = self.live(filters)
        inside = set(live.manifest.contains) if live else set()
        held_back = set() if retry else self._refused(filters) | self.versions(filters).rolled_back()
        return [
            memory
            for memory in self.memory.store.valid(filters)
            if memory.ref not in inside | held_back and self.consolidator.questions.is_approved(memory)
        ]

    # --- Making -----------------------------------------------------------------------------------------------------

    def consolidate(
        self,
        filters: Filters,
        *,
        documents: str | Path | None = None,
        retry: bool = False,
        progress: Callable[[int, int], None] | None = None,
    ) -> Version:
        """A candidate with what is live and what waits, trained and judged. What was done before is not done again.

        Args:
            documents: a file or folder, whose passages are added to the memory first, see `add_documents`.
            retry: also memories that a refused candidate brought in or a rollback took out.

        Raises:
            ValueError: nothing waits, or nothing can be asked about it; or a document cannot be read.
        """
        if documents is not None:
            add_documents(self.memory, self.model, documents, filters, seed=self.consolidator.seed)
        versions = self.versions(filters)
        with versions.alone():
            manifest, memories = self.planned(filters, retry=retry)
            version = versions.made_of(manifest)
            if version is None:
                unfinished = versions.unfinished(manifest)
                weights = self._start(filters, manifest)
                try:
                    trained = self.consolidator.train(
                        self.model,
                        memories,
                        num_new=None if self.anew else len(manifest.new),
                        start=weights,
                        checkpoint=unfinished / _CHECKPOINT,
                        progress=progress,
                    )
                except OSError as error:  # of the checkpoint
                    if unfinished.is_dir():
                        raise
                    raise ValueError(_PURGED) from error
                if not unfinished.is_dir():
                    raise ValueError(_PURGED)
                with versions.written(manifest) as folder:
                    trained.weights.save(folder, self.model)
                    numbers = {"seconds": trained.seconds, "flops": trained.flops, "losses": trained.losses}
                    (folder / _TRAINING).write_text(json.dumps(numbers) + "\n", encoding="utf-8")
                version = versions.made_of(manifest)
                assert version is not None
            versions.finish(manifest)
            return version if version.gate is not None else self._judged(versions, version, memories, filters)

    def planned(self, filters: Filters, *, retry: bool = False) -> tuple[Manifest, list[MemoryVersion]]:
        """What `consolidate` would train, without training it.

        Raises:
            ValueError: nothing waits.
        """
        live, new = self.live(filters), self.waiting(filters, retry=retry)
        inside = set(live.manifest.contains) if live else set()
        if not new:
            raise ValueError(
                "Nothing waits to be consolidated: what holds is in the weights, was refused or rolled back, or is not "
                "approved."
            )
        memories = [*(m for m in self.memory.store.valid(filters) if m.ref in inside), *new]
        first = self.anew or live is None
        generator = self.memory.bank.generator if first and self.start == "adapters" else None
        manifest = Manifest(
            parent=live.name if live else None,
            contains=tuple(memory.ref for memory in memories),
            new=tuple(memory.ref for memory in new),
            base_model=self.model.base_model_fingerprint,
            generator=generator if self.consolidator.moves.takes_adapters else None,
            recipe={**self.consolidator.recipe, "anew": self.anew},
        )
        return manifest, memories

    def _start(self, filters: Filters, manifest: Manifest) -> MovedWeights | None:
        if manifest.parent is not None and not self.anew:
            return MovedWeights.load(self.versions(filters).get(manifest.parent).folder, self.model)
        if manifest.generator is None:
            return None
        self.memory.bank.write(filters)
        held = self.memory.bank.held(filters)
        wanted = {held.place[ref] for ref in manifest.contains if ref in held.place}
        if held.adapter is None or not wanted:
            return None
        chunks = np.flatnonzero(np.isin(held.owner, sorted(wanted))).tolist()
        return MovedWeights.of_adapter(self.model.base_model, held.adapter.of_chunks(chunks).fused())

    def _judged(
        self, versions: Versions, version: Version, memories: Sequence[MemoryVersion], filters: Filters
    ) -> Version:
        live = self.live(filters)
        candidate = MovedWeights.load(version.folder, self.model)
        training = self.training(version)
        exam = self.exam(version.manifest, memories, filters, seconds=training["seconds"])
        report = self.gate.judge(
            self.model, candidate, MovedWeights.load(live.folder, self.model) if live else None, exam
        )
        return versions.judge(version, {**report.as_dict(), "at": to_text(now()), "gate": type(self.gate).__name__})

    @staticmethod
    def training(version: Version) -> dict[str, Any]:
        """seconds, flops and losses of the process that finished a version."""
        found: dict[str, Any] = json.loads((version.folder / _TRAINING).read_bytes())
        return found

    def exam(self, manifest: Manifest, memories: Sequence[MemoryVersion], filters: Filters, *, seconds: float) -> Exam:
        """What the gate asks: held-out wordings alone."""
        new = [memory for memory in memories if memory.ref in manifest.new]
        valid = self.memory.store.valid(Filters())
        own = {memory.ref for memory in self.memory.store.valid(filters)}
        deleted = self._asked(self.memory.store.deleted(filters))[:_MOST_OTHERS]
        decoys = written_names(self.model, seed=self.consolidator.seed + 7919)[:_DECOYS] if deleted else []
        return Exam(
            new=self._asked(new),
            kept=self._asked([memory for memory in memories if memory.ref not in manifest.new]),
            background=[Asked(text) for text in self._background(memories)],
            others=self._asked([memory for memory in valid if memory.ref not in own])[:_MOST_OTHERS],
            deleted=deleted,
            decoys=decoys,
            texts=self.texts,
            unasked=[memory.ref for memory in new if not self.consolidator.questions.held_out(memory)],
            seconds=seconds,
        )

    def _asked(self, memories: Sequence[MemoryVersion]) -> list[Asked]:
        writer = self.consolidator.questions
        return [
            Asked(text, str(memory.text), writer.right_answers(memory).get(text) or writer.right_answer(memory))
            for memory in memories
            for text in writer.held_out(memory)
        ]

    def _background(self, memories: Sequence[MemoryVersion]) -> list[str]:
        if self.background is not None:
            return list(self.background)
        # Of another seed than what is rehearsed, and none of those.
        seed = self.consolidator.seed
        rehearsed = set(self.consolidator.rehearsed(self.model, memories))
        written = SelfSynthesised(number=64).questions(self.model, seed=seed + 7919)
        return [text for text in written if text not in rehearsed]

    def _refused(self, filters: Filters) -> set[str]:
        versions = self.versions(filters)
        lived = {entry["version"] for entry in versions.promotions()}
        judged = [version for version in versions.all() if version.gate is not None and version.name not in lived]
        return {ref for version in judged if not version.passed for ref in version.manifest.new}

    # --- Living -----------------------------------------------------------------------------------------------------

    def promote(self, name: str, filters: Filters, *, force: bool = False) -> Version:
        """Makes a candidate live and hands over what it answers.

        Raises:
            GateRefused: it did not pass the gate, and `force` is not given.
            ValueError: there is none of that name, or it was changed.
        """
        versions = self.versions(filters)
        versions.promote(versions.get(name), force=force)
        self.hand_over(filters)
        return versions.get(name)

    def rollback(self, name: str, filters: Filters) -> None:
        """Makes a version that was live before live again, or "base"."""
        self.versions(filters).rollback(name)

    def hand_over(self, filters: Filters) -> list[str]:
        """id@version of the memories that leave their adapter: the live weights answer their held-out wordings."""
        live = self.live(filters)
        if live is None:
            return []
        memories = [m for m in self.memory.store.valid(filters) if m.ref in live.manifest.contains]
        refs = [memory.ref for memory in memories for _ in self.consolidator.questions.held_out(memory)]
        right = answered(self.model, self._weights(live), self._asked(memories))
        wrong = {ref for ref, is_right in zip(refs, right, strict=True) if not is_right}
        found = [ref for ref in dict.fromkeys(refs) if ref not in wrong]
        with replaced(live.folder / _HANDED_OVER) as temporary:
            temporary.write_text(json.dumps(found) + "\n", encoding="utf-8")
        return found

    def handed_over(self, filters: Filters) -> list[str]:
        """id@version of the memories that the live weights answer in their adapters' place."""
        live = self.live(filters)
        path = live.folder / _HANDED_OVER if live else None
        return json.loads(path.read_bytes()) if path is not None and path.is_file() else []

    def ask(self, questions: Sequence[str], filters: Filters, *, tier: str = "weights") -> list[Answer]:
        """Answers from the live weights.

        Args:
            tier: "weights": with an empty prompt and no adapter; or "weights+adapter": with the adapters of what was
                not handed over.

        Raises:
            ValueError: an unknown tier; or as `Memory.ask`.
        """
        if tier not in WEIGHT_TIERS:
            raise ValueError(f"Unknown tier {tier!r}: choose {' or '.join(WEIGHT_TIERS)}.")
        live = self.live(filters)
        hidden = frozenset(self.handed_over(filters))
        asked = [MemoryQuestion(text, filters, hidden=hidden) for text in questions]
        waiting = any(memory.ref not in hidden for memory in self.memory.store.valid(filters))
        with installed(self.model.base_model, self._weights(live).tensors if live else {}):
            answers = self.memory.asker.ask(asked, tier="adapter" if tier != "weights" and waiting else "none")
        return [replace(answer, tier=tier, reason=live.name if live else "base") for answer in answers]

    def _weights(self, version: Version) -> MovedWeights:
        if self._loaded is None or self._loaded[0] != version.name:
            self._loaded = version.name, MovedWeights.load(version.folder, self.model)
        return self._loaded[1]

    # --- Forgetting -------------------------------------------------------------------------------------------------

    def forget(self, key: str, filters: Filters, *, reason: str | None = None) -> Rebuilt:
        """Deletes a memory; versions with it answer nothing from then on, and one without it is made of the rest.

        It becomes live if it passes the gate; until then what was live before the memory came in answers.
        """
        started = time.perf_counter()
        before = {version.name for version in self.versions(filters).all()}
        gone = set(self.memory.forget(key, verify=False, reason=reason).memories)
        versions = self.versions(filters)
        lost = tuple(version.name for version in versions.all() if gone & set(version.manifest.contains))
        failed: tuple[str, ...] = ()
        if lost and self.waiting(filters):
            candidate = self.consolidate(filters)
            failed = tuple(candidate.gate["failed"]) if candidate.gate else ()
            if candidate.passed and candidate.name not in before & set(lost):
                self.promote(candidate.name, filters)
        live = self.live(filters)
        return Rebuilt(live.name if live else "base", lost, time.perf_counter() - started, failed)
