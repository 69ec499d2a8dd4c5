"""Asker: questions answered from a memory by one of its tiers, several users' in one pass; what each memory did to it.

asker = Asker(store, retriever, bank, ledger)
(answer,) = asker.ask([MemoryQuestion("Who taught Fenda Elfax?", Filters(user_id="alice"))], tier="auto")
answer.text, answer.tier, answer.memories
asker.explain(answer)            # log p(answer) with each memory and without it

token      the memories that a search finds, in the prompt
adapter    the memories' adapters, chosen by the question, of many among what a search finds; nothing in the prompt
none       the base model alone
"""

import statistics
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from hypernet.memory.bank import AdapterBank, Choice, Held
from hypernet.memory.ledger import TIERS, CostLedger, Measured
from hypernet.memory.retriever import Retriever
from hypernet.memory.store.records import Filters, MemoryVersion, whole_number
from hypernet.memory.store.times import Instant, now, to_micros, to_text
from hypernet.memory.store.token_store import TokenStore
from hypernet.text.matching import exact_match

_BATCH, _SHARED_BATCH = 64, 4  # questions that go through the model at once; where others wait for it
_T = TypeVar("_T")
_WEIGHTS_ARE_ELSEWHERE = "Of weights and weights+adapter, hypernet memory ask and Consolidation.ask answer."
_NUM_TIMED = 16  # questions that are asked by themselves for their seconds


class MemoryQuestion(NamedTuple):
    """A question and whose memories may answer it.

    as_of, known_at: as of `search`. hidden: id@version of memories that it does not see.
    """

    text: str
    filters: Filters
    as_of: Instant | None = None
    known_at: Instant | None = None
    hidden: frozenset[str] = frozenset()


class Case(NamedTuple):
    """A question with its right answers, any of which counts; memory: id@version that holds them, where it is known."""

    question: str
    answers: tuple[str, ...]
    memory: str | None = None


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What was answered and from what.

    Attributes:
        tier: that answered. reason: why this one.
        memories: id@version of those in the prompt, or whose adapters were used; the best first.
        as_of: the instant it was asked about, ISO 8601. known_at: None: all that is known.
        prompt_tokens: that the memories added to the prompt.
    """

    question: str
    text: str
    tier: str
    reason: str
    memories: tuple[str, ...]
    user_id: str | None
    agent_id: str | None
    run_id: str | None
    as_of: str
    known_at: str | None
    prompt_tokens: int

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class Effect:
    """What one memory did to an answer.

    Attributes:
        used: id@version; text, valid_at, invalid_at: as stored.
        log_p, log_p_without: of the answer in nats, with all memories and as if this one had never been there.
        rank: its place among those used. entry: of the library that holds its adapter; None: it has none.
    """

    memory: str
    text: str
    valid_at: str
    invalid_at: str | None
    rank: int
    entry: str | None
    log_p: float
    log_p_without: float

    @property
    def effect(self) -> float:
        """log p(answer) that the memory adds; above 0: it speaks for the answer."""
        return self.log_p - self.log_p_without

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "effect": self.effect}


class Unwritten(ValueError):
    """Memories that hold have no adapter, or another model's: work is left to be done."""


class _Given(NamedTuple):
    """What the base model is asked with."""

    document: str | None = None
    adapter: Any = None
    refs: tuple[str, ...] = ()


class PreparedQuestion(NamedTuple):
    """A question with what the base model is to be asked with: document in the prompt, adapter.

    prompt_tokens: of the document.
    """

    question: MemoryQuestion
    tier: str
    reason: str
    document: str | None
    adapter: Any
    memories: tuple[str, ...]
    prompt_tokens: int

    def answered(self, text: str) -> Answer:
        asked = self.question
        return Answer(
            question=asked.text,
            text=text,
            tier=self.tier,
            reason=self.reason,
            memories=self.memories,
            **asked.filters._asdict(),
            as_of=str(asked.as_of),
            known_at=None if asked.known_at is None else str(asked.known_at),
            prompt_tokens=self.prompt_tokens,
        )


class Asker:
    """Asks one memory.

    Args:
        limit: memories that go into the prompt at most.
        max_new_tokens: of an answer.
        search_above: of more memories than these, a question chooses among the adapters of the
            `num_adapter_candidates` that a search finds first. The search reads texts; what the base model is given
            stays the adapters alone. None: it chooses among all, and no text is read.
    """

    def __init__(
        self,
        store: TokenStore,
        retriever: Retriever,
        bank: AdapterBank,
        ledger: CostLedger,
        *,
        limit: int = 5,
        max_new_tokens: int = 32,
        search_above: int | None = 100,
        num_adapter_candidates: int = 20,
    ) -> None:
        if limit < 1 or max_new_tokens < 1:
            raise ValueError(f"limit is {limit} and max_new_tokens {max_new_tokens}. Give at least 1.")
        self.search_above = None if search_above is None else whole_number(search_above, "search_above")
        self.num_adapter_candidates = whole_number(num_adapter_candidates, "num_adapter_candidates")
        self.store, self.retriever, self.bank, self.ledger = store, retriever, bank, ledger
        self.limit, self.max_new_tokens = limit, max_new_tokens

    def ask(self, questions: Sequence[MemoryQuestion], *, tier: str = "auto", accuracy: float = 0.9) -> list[Answer]:
        """Answers all of them, each from its own memories; those of all users and tiers go through the model together.

        Args:
            tier: "token", "adapter", "none", or "auto": the cheapest that has measured `accuracy` for these filters.

        Raises:
            ValueError: an unknown tier, a blank filter, an impossible date, or a prompt that does not fit.
            Unwritten: adapters are asked for and some are missing.
        """
        answers: list[Answer] = []
        for part in self._parts(questions):
            prepared = self.prepare(part, tier=tier, accuracy=accuracy)
            texts = self._model().generate(
                [one.question.text for one in prepared],
                [one.adapter for one in prepared],
                documents=[one.document for one in prepared],
                max_new_tokens=self.max_new_tokens,
                **self.bank.joined,
            )
            answers += [one.answered(text) for one, text in zip(prepared, texts, strict=True)]
        return answers

    def prepare(
        self, questions: Sequence[MemoryQuestion], *, tier: str = "auto", accuracy: float = 0.9
    ) -> list[PreparedQuestion]:
        """What `ask` asks the base model with; arguments and errors as there."""
        if tier not in (*TIERS, "auto"):
            raise ValueError(
                f"Unknown tier {tier!r}: choose one of auto, token, adapter, none. {_WEIGHTS_ARE_ELSEWHERE}"
            )
        if not 0 <= accuracy <= 1:
            raise ValueError(f"accuracy is {accuracy}. Give a part of the answers, from 0 to 1.")
        questions = [_dated(question) for question in questions]
        tiers = {filters: self._tier(filters, tier, accuracy) for filters in {one.filters for one in questions}}
        chosen = [tiers[question.filters] for question in questions]
        given = self._given(questions, [name for name, _ in chosen])
        return [
            PreparedQuestion(
                *(question, *decided, one.document, one.adapter, one.refs),
                prompt_tokens=0 if one.document is None else self._tokens(one.document),
            )
            for question, decided, one in zip(questions, chosen, given, strict=True)
        ]

    def explain(self, answer: Answer) -> list[Effect]:
        """For each memory behind an answer log p(answer) with it and as if it had never been there.

        Without it, another may take its place in the prompt or among the adapters: the difference is what the memory
        itself did.

        Raises:
            ValueError: as `ask`; or a memory was deleted since.
        """
        question = MemoryQuestion(answer.question, _filters(answer), answer.as_of, answer.known_at)
        asked = [question, *(question._replace(hidden=frozenset({ref})) for ref in answer.memories)]
        values = self.log_likelihoods(asked, [answer.text] * len(asked), tier=answer.tier)
        entries = self.bank.entries_of(answer.memories)
        found = []
        for rank, (ref, without) in enumerate(zip(answer.memories, values[1:], strict=True), 1):
            memory = self.store.get(ref)
            found.append(
                Effect(
                    memory=ref,
                    text=str(memory.text),
                    valid_at=memory.valid_at,
                    invalid_at=memory.invalid_at,
                    rank=rank,
                    entry=entries.get(ref),
                    log_p=values[0],
                    log_p_without=without,
                )
            )
        return found

    def log_likelihoods(self, questions: Sequence[MemoryQuestion], answers: Sequence[str], *, tier: str) -> list[float]:
        """log p of each answer when its question is asked of a tier, in nats."""
        pairs = [(_dated(question), answer) for question, answer in zip(questions, answers, strict=True)]
        values: list[float] = []
        for part in self._parts(pairs):
            given = self._given([question for question, _ in part], [tier] * len(part))
            values += self._model().log_likelihoods(
                [question.text for question, _ in part],
                [answer for _, answer in part],
                [one.adapter for one in given],
                documents=[one.document for one in given],
                **self.bank.joined,
            )
        return values

    def choose(self, questions: Sequence[MemoryQuestion]) -> list[Choice]:
        """The adapters that each question is asked with; all have the same filters.

        Raises:
            Unwritten: some are missing; or as `ask`.
        """
        filters = questions[0].filters
        held = self.bank.held(filters)
        visible = []
        for question in map(_dated, questions):
            when = to_micros(str(question.as_of), "as_of")
            if question.known_at is None:
                shown, missing = held.holding(when), held.missing_at(when)
            else:
                valid = self.store.valid(filters, as_of=question.as_of, known_at=question.known_at)
                refs = [memory.ref for memory in valid]
                shown = np.isin(np.array(held.refs, object), np.array(refs, object))
                missing = [ref for ref in refs if ref in held.missing]
            if missing := [ref for ref in missing if ref not in question.hidden]:
                total = len(missing) + int(shown.sum())
                raise Unwritten(
                    f"{len(missing)} of {total} memories have no adapter by this model, such as {missing[0]}. Write "
                    "the adapters, or ask the tier token."
                )
            for ref in question.hidden & held.place.keys():
                shown[held.place[ref]] = False
            if self.search_above is not None and shown.sum() > self.search_above:
                shown &= self._found_first(question, held)
            visible.append(shown)
        return self.bank.choose([question.text for question in questions], held, visible)

    # --- Measuring --------------------------------------------------------------------------------------------------

    def measure(
        self, filters: Filters, cases: Sequence[Case] | None = None, *, tiers: Sequence[str] = TIERS
    ) -> list[Measured]:
        """Asks held questions of each tier and keeps what came of it in the ledger.

        Args:
            cases: questions with their right answers. None: one for each keyed memory that holds, "What is the
                <relation> of <subject>?", whose right answer is the base model's with that memory alone in its prompt.

        Raises:
            ValueError: there are no questions, or as `ask`.
        """
        filters = filters.checked()
        model, reference = self._model(), "given" if cases is not None else "oracle"
        cases = self.made_cases(filters) if cases is None else list(cases)
        if not cases:
            raise ValueError(
                "There are no questions to measure with: no memory that holds has a subject and a relation. Give "
                "questions with their answers."
            )
        unknown = [tier for tier in tiers if tier not in TIERS]
        if unknown:
            raise ValueError(f"Unknown tier {unknown[0]!r}: choose one of {', '.join(TIERS)}.")
        memories = self.store.counts(filters)["valid_now"]
        oracle = self._oracle_accuracy(cases)
        questions = [MemoryQuestion(case.question, filters) for case in cases]
        found = []
        for tier in tiers:
            answers = self.ask(questions, tier=tier)
            right = [exact_match(a.text, case.answers) for a, case in zip(answers, cases, strict=True)]
            seconds = []
            for question in questions[:_NUM_TIMED]:
                started, paused = time.perf_counter(), model.paused_s
                self.ask([question], tier=tier)
                seconds.append(time.perf_counter() - started - (model.paused_s - paused))
            generator = self.bank.generator if tier == "adapter" else None
            measured = Measured(
                tier=tier,
                generator=generator,
                base_model=model.base_model_fingerprint,
                reference=reference,
                memories=memories,
                questions=len(cases),
                oracle=oracle,
                accuracy=float(np.mean(right)),
                question_tokens=float(np.mean([answer.prompt_tokens for answer in answers])),
                question_s=statistics.median(seconds),
                prepare_s=0.0 if generator is None else self.bank.seconds(filters, generator),
            )
            found.append(self.ledger.add(measured, filters))
        return found

    def made_cases(self, filters: Filters) -> list[Case]:
        """A question for each keyed memory that holds, and what the base model answers with it alone in the prompt."""
        return self.cases_of(self.store.valid(filters))

    def cases_of(self, versions: Iterable[MemoryVersion]) -> list[Case]:
        """As `made_cases`, of these versions."""
        keyed = [memory for memory in versions if memory.subject is not None and memory.relation is not None]
        asked = [f"What is the {memory.relation} of {memory.subject}?" for memory in keyed]
        answers = self._with_documents(asked, [str(memory.text) for memory in keyed])
        triples = zip(asked, answers, keyed, strict=True)
        return [Case(question, (answer,), memory.ref) for question, answer, memory in triples if answer]

    def _oracle_accuracy(self, cases: Sequence[Case]) -> float | None:
        if any(case.memory is None for case in cases):
            return None
        documents = [str(self.store.get(str(case.memory)).text) for case in cases]
        answers = self._with_documents([case.question for case in cases], documents)
        return float(np.mean([exact_match(a, case.answers) for a, case in zip(answers, cases, strict=True)]))

    def _with_documents(self, questions: Sequence[str], documents: Sequence[str]) -> list[str]:
        answers: list[str] = []
        for part in self._parts(list(zip(questions, documents, strict=True))):
            asked, given = map(list, zip(*part, strict=True))
            answers += self._model().generate(asked, documents=given, max_new_tokens=self.max_new_tokens)
        return answers

    # --- Inside -----------------------------------------------------------------------------------------------------

    def let_others(self) -> None:
        """A place where others may use the model, see `DocToLoRA.pause`."""
        if self.bank.can_write:
            self._model().between_passes()

    def _parts(self, items: Sequence[_T]) -> Iterator[Sequence[_T]]:
        """So many as go through the model at once; others may use it in between."""
        model = self._model()
        size = _BATCH if model.pause is None else _SHARED_BATCH
        for start in range(0, len(items), size):
            model.between_passes()
            yield items[start : start + size]

    def _model(self) -> Any:
        if self.bank.model is None:
            raise ValueError("Answers need a checkpoint: open the memory with model=..., such as assets/tiny.")
        return self.bank.model.doc_to_lora()

    def _tier(self, filters: Filters, tier: str, accuracy: float) -> tuple[str, str]:
        if tier != "auto":
            return tier, "asked for"
        generator, base_model = self.bank.generator, self._model().base_model_fingerprint
        found = self.ledger.latest(filters, generator=generator, base_model=base_model)
        ready = not self.bank.counts(filters, generator).missing
        memories = self.store.counts(filters)["valid_now"]
        return self.ledger.choose(found, accuracy=accuracy, memories=memories, ready=ready)

    def _given(self, questions: Sequence[MemoryQuestion], tiers: Sequence[str]) -> list[_Given]:
        given = [_Given()] * len(questions)
        by_filters: dict[Filters, list[int]] = {}
        for place, (question, tier) in enumerate(zip(questions, tiers, strict=True)):
            if tier == "token":
                given[place] = self._found(question)
            elif tier == "adapter":
                by_filters.setdefault(question.filters, []).append(place)
        for places in by_filters.values():
            choices = self.choose([questions[place] for place in places])
            for place, (adapter, refs) in zip(places, choices, strict=True):
                given[place] = _Given(adapter=adapter, refs=refs)
        return given

    def _found(self, question: MemoryQuestion) -> _Given:
        """What a search finds, as far as it fits into the prompt.

        Raises:
            ValueError: something was found, and nothing of it fits.
        """
        from hypernet.base.generation import context_window

        hits = self.retriever.search(
            question.text,
            question.filters,
            limit=self.limit + len(question.hidden),
            as_of=question.as_of,
            known_at=question.known_at,
        )
        hits = [hit for hit in hits if hit.ref not in question.hidden][: self.limit]
        room = context_window(self._model().base_model) - self.max_new_tokens - self._tokens(question.text) - 32
        fitting: list[MemoryVersion] = []
        for hit in hits:
            if self._tokens(as_document([*fitting, hit])) <= room:
                fitting.append(hit)
        if fitting:
            return _Given(as_document(fitting), None, tuple(hit.ref for hit in fitting))
        if hits:
            raise ValueError(
                f"The memory {hits[0].ref} has {self._tokens(str(hits[0].text))} tokens, the prompt has room for "
                f"{max(room, 0)}. Ask the tier adapter, or store it in parts."
            )
        return _Given()

    def _found_first(self, question: MemoryQuestion, held: Held) -> npt.NDArray[np.bool_]:
        """[N] of `held`, the candidates that a search finds first."""
        hits = self.retriever.search(
            question.text,
            question.filters,
            limit=self.num_adapter_candidates + len(question.hidden),
            as_of=question.as_of,
            known_at=question.known_at,
        )
        refs = [hit.ref for hit in hits if hit.ref not in question.hidden][: self.num_adapter_candidates]
        found = np.zeros(len(held.refs), bool)
        found[[held.place[ref] for ref in refs if ref in held.place]] = True
        return found

    def _tokens(self, content: str) -> int:
        return len(self._model().tokenizer(content, add_special_tokens=False, verbose=False)["input_ids"])


def as_document(hits: Sequence[MemoryVersion]) -> str:
    """Memories as they stand in a prompt: one paragraph, the best one last, next to the question.

    Of 200 questions on 25 memories each (validation split), the tiny model answers .97 so; with the best one first .93,
    as lines .91, as lines with the best one last .49.
    """
    return " ".join(str(hit.text) for hit in reversed(hits))


def _dated(question: MemoryQuestion) -> MemoryQuestion:
    """With checked filters and an instant, so that what is asked later is asked about the same one."""
    when = now() if question.as_of is None else to_micros(question.as_of, "as_of")
    known = None if question.known_at is None else to_text(to_micros(question.known_at, "known_at"))
    return question._replace(filters=question.filters.checked(), as_of=to_text(when), known_at=known)


def _filters(answer: Answer) -> Filters:
    return Filters(answer.user_id, answer.agent_id, answer.run_id)
