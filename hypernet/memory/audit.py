"""DeletionAudit: a memory is deleted, and what is left is compared with a twin that never had it.

audit = DeletionAudit(asker)
report = audit.forget("4f1c9a3be2d07788")
report.passed, report.as_dict()

The twin is a fresh memory in a folder inside this one (with PostgreSQL in a schema beside this one's), with everything
that is left and nothing of what was deleted. Writing it takes as long as the user's adapters did; it is removed
afterwards, or by `verify` where a process was killed. The deletion holds if the adapters left are the twin's to the
bit, if searches and answers are the twin's, and if the deleted memory's answer is no more likely than to the twin
(membership). Nothing of a content goes into the report.
"""

import fcntl
import json
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hypernet.memory.ask import Asker, Case, MemoryQuestion
from hypernet.memory.bank import ADAPTERS_FOLDER, AdapterBank, Held
from hypernet.memory.exchange import read_drafts, write_memories
from hypernet.memory.ledger import CostLedger
from hypernet.memory.retriever import Retriever
from hypernet.memory.store.records import Filters, MemoryVersion, split_ref
from hypernet.memory.store.times import now, to_text
from hypernet.memory.store.token_store import TokenStore

_TWIN_PREFIX, _LOCK_FILE = ".twin-", ".lock"
_MAX_QUESTIONS = 50  # about what is left, spread over it
# Largest difference of two log-likelihoods that counts as none: the batches have the same shape, but an adapter may lie
# at another place in the twin's.
_TOLERANCE = 1e-3


@dataclass(frozen=True, kw_only=True)
class ForgetReport:
    """What was deleted and how it compares with a memory that never had it; id@version and figures, never a content.

    Attributes:
        memories: deleted. num_derived: of them, only because they were derived from what was asked for.
        batch: takes it back until `purge`.
        unreachable: whether lists, searches and adapter files name none of them.
        slots, slots_equal: adapters that are left, and those of them that are the twin's to the bit.
        searches, searches_equal: questions whose hits were compared, and those with the twin's hits and scores.
        answers, answers_equal: by tier, as searches.
        membership: tier → log p of the deleted memory's answer in nats, the mean: before, after, and of the twin.
        audited: False where `verify` was not asked for.
    """

    memories: tuple[str, ...]
    num_derived: int
    batch: str
    at: str
    audited: bool
    unreachable: bool = True
    slots: int = 0
    slots_equal: int = 0
    searches: int = 0
    searches_equal: int = 0
    answers: dict[str, int]
    answers_equal: dict[str, int]
    membership: dict[str, dict[str, float]]
    seconds: float = 0.0

    @property
    def passed(self) -> bool:
        """Whether nothing tells what is left from the twin."""
        return (
            self.unreachable
            and (self.slots, self.searches, self.answers) == (self.slots_equal, self.searches_equal, self.answers_equal)
            and all(abs(values["after"] - values["twin"]) <= _TOLERANCE for values in self.membership.values())
        )

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "passed": self.passed}


class DeletionAudit:
    """Forgets memories of the store that `asker` asks."""

    def __init__(self, asker: Asker) -> None:
        self.asker, self.store, self.bank = asker, asker.store, asker.bank

    def forget(
        self, key: str, *, reason: str | None = None, verify: bool = True, cases: Sequence[Case] | None = None
    ) -> ForgetReport:
        """Deletes a memory or one version of it, with what was derived from it, and its adapters; writes what is left
        anew where it is needed, and compares it with the twin.

        Args:
            verify: False deletes and compares nothing.
            cases: questions that the deleted memory answers, with their answers, for the membership test. None: what
                can be made of the memory itself.

        Raises:
            ValueError: there is no such memory, or as `TokenStore.delete`.
        """
        started = time.perf_counter()
        versions = self._versions(key)
        filters = Filters(versions[0].user_id)
        generator = self.bank.generator if self.bank.can_write else None
        if verify and generator is None and self.bank.counts(filters).slots:
            raise ValueError("This memory has adapters. Give the checkpoint that wrote them, to compare them too.")
        has_adapters = generator is not None and self.bank.counts(filters, generator).slots > 0
        tiers = [] if generator is None or not verify else ["token", *(["adapter"] if has_adapters else [])]
        probes = self._probes(versions, cases) if tiers else []
        if verify and has_adapters:
            self.bank.write(filters)
        before = {tier: self._likelihood(self.asker, filters, probes, tier) for tier in tiers}
        batch = self.store.delete(key, reason=reason)
        self.bank.drop(batch.memories)
        if has_adapters:
            self.bank.write(filters)
        common: dict[str, Any] = {
            **{"memories": batch.memories, "num_derived": batch.num_derived, "batch": batch.version},
            **{"at": str(to_text(now())), "audited": verify},
        }
        if not verify:
            report = ForgetReport(**common, answers={}, answers_equal={}, membership={})
        else:
            figures = self._compared(batch.memories, filters, tiers, probes, before)
            report = ForgetReport(**common, **figures, seconds=time.perf_counter() - started)
        self.store.log.append_audit(report.as_dict())
        return report

    def _compared(
        self,
        deleted: Sequence[str],
        filters: Filters,
        tiers: Sequence[str],
        probes: Sequence[Case],
        before: dict[str, float],
    ) -> dict[str, Any]:
        left = self.store.valid(filters)
        step = max(1, len(left) // _MAX_QUESTIONS)
        about = [_first_half(str(memory.text)) for memory in left[::step]]
        about += [f"What is the {m.relation} of {m.subject}?" for m in left[::step] if m.subject is not None]
        asked = [
            MemoryQuestion(text, filters, as_of=to_text(now())) for text in [*about, *(p.question for p in probes)]
        ]
        with _twin_folder(self.store) as folder:
            twin = self._twin(folder, filters, adapters="adapter" in tiers)
            try:
                slots = self._slots_equal(twin.bank, filters) if "adapter" in tiers else (0, 0)
                hits = [
                    [[(hit.ref, hit.text, hit.score) for hit in self._search(asker, one)] for one in asked]
                    for asker in (self.asker, twin)
                ]
                answers = {
                    tier: [[answer.text for answer in asker.ask(asked, tier=tier)] for asker in (self.asker, twin)]
                    for tier in tiers
                }
                membership = {
                    tier: {
                        "before": before[tier],
                        "after": self._likelihood(self.asker, filters, probes, tier),
                        "twin": self._likelihood(twin, filters, probes, tier),
                    }
                    for tier in tiers
                    if probes
                }
            finally:
                twin.store.close()
        return {
            **{"unreachable": self._unreachable(deleted, hits[0]), "slots": slots[0], "slots_equal": slots[1]},
            **{"searches": len(asked), "searches_equal": _num_equal(*hits)},
            "answers": {tier: len(asked) for tier in tiers},
            "answers_equal": {tier: _num_equal(*pair) for tier, pair in answers.items()},
            "membership": membership,
        }

    def _twin(self, folder: Path, filters: Filters, *, adapters: bool) -> Asker:
        """A memory that was only ever told what is left."""
        write_memories(self.store.statements(), folder / "left.jsonl")
        settings: dict[str, Any] = {
            "conflict": self.store.conflict,
            "source_priority": self.store.source_priority,
            "database": self.store.database.make_twin(folder.name),
        }
        store = TokenStore(folder / "memory", **settings)
        store.add(read_drafts(folder / "left.jsonl"), operation="import")
        mine = self.asker.retriever
        settings = {"num_candidates": mine.num_candidates, "dense_weight": mine.dense_weight}
        retriever = Retriever(store, embedder=mine.embedder, **settings)
        bank = self.bank.beside(store)
        if adapters:
            bank.write(filters)
        names = ("limit", "max_new_tokens", "search_above", "num_adapter_candidates")
        numbers = {name: getattr(self.asker, name) for name in names}
        return Asker(store, retriever, bank, CostLedger(store), **numbers)

    def _slots_equal(self, twin: AdapterBank, filters: Filters) -> tuple[int, int]:
        mine, theirs = (_by_ref(bank.held(filters)) for bank in (self.bank, twin))
        return len(mine.keys() | theirs.keys()), sum(
            ref in theirs and _same(one, theirs[ref]) for ref, one in mine.items()
        )

    def _unreachable(self, deleted: Sequence[str], hits: Sequence[Sequence[tuple[str, str, float]]]) -> bool:
        gone = set(deleted)
        named = {memory.ref for memory in self.store.statements()} | set(self.bank.entries_of(deleted))
        for path in (self.store.folder / ADAPTERS_FOLDER).glob("*/provenance.json"):
            named |= {document["name"] for document in json.loads(path.read_bytes())["documents"]}
        return not gone & (named | {ref for found in hits for ref, *_ in found})

    def _likelihood(self, asker: Asker, filters: Filters, probes: Sequence[Case], tier: str) -> float:
        if not probes:
            return 0.0
        questions = [MemoryQuestion(probe.question, filters) for probe in probes]
        values = asker.log_likelihoods(questions, [probe.answers[0] for probe in probes], tier=tier)
        return sum(values) / len(values)

    def _search(self, asker: Asker, question: MemoryQuestion) -> Any:
        asker.let_others()
        return asker.retriever.search(question.text, question.filters, limit=asker.limit, as_of=question.as_of)

    def _probes(self, versions: Sequence[MemoryVersion], cases: Sequence[Case] | None) -> list[Case]:
        if cases is not None:
            return list(cases)
        made = self.asker.cases_of(versions)
        keyed = {case.memory for case in made}
        halves = [(m.ref, _first_half(str(m.text)), str(m.text)) for m in versions if m.ref not in keyed]
        return made + [Case(half, (text[len(half) :].strip() or text,), ref) for ref, half, text in halves]

    def _versions(self, key: str) -> list[MemoryVersion]:
        identity, version = split_ref(key)
        whose = Filters(self.store.get(key).user_id)
        found = [memory for memory in self.store.statements(whose) if memory.id == identity and memory.text is not None]
        return [memory for memory in found if version in (None, memory.version)]


def left_twins(folder: Path) -> list[Path]:
    """Folders of twins whose audit was killed."""
    found = []
    for path in folder.glob(f"{_TWIN_PREFIX}*"):
        with (path / _LOCK_FILE).open("a") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:  # being audited
                continue
            found.append(path)
    return found


def remove_twins(store: TokenStore) -> int:
    """Removes what killed audits left; returns how many."""
    left = left_twins(store.folder)
    for path in left:
        store.database.drop_twin(path.name)
        shutil.rmtree(path)
    return len(left)


@contextmanager
def _twin_folder(store: TokenStore) -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(prefix=_TWIN_PREFIX, dir=store.folder))
    with (path / _LOCK_FILE).open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            yield path
        finally:
            store.database.drop_twin(path.name)
            shutil.rmtree(path)


def _first_half(text: str) -> str:
    """Of the words, at least one."""
    words = text.split()
    return " ".join(words[: max(1, len(words) // 2)])


def _num_equal(mine: Sequence[Any], theirs: Sequence[Any]) -> int:
    return sum(one == other for one, other in zip(mine, theirs, strict=True))


def _by_ref(held: Held) -> dict[str, dict[str, Any]]:
    """id@version → its chunks, by field and target."""
    if held.adapter is None:
        return {}
    adapter = held.adapter
    spans = zip(held.refs, adapter.chunk_spans(), strict=True)
    return {
        ref: {
            **{f"A {name}": rows[start:end] for name, rows in adapter.A.items()},
            **{f"B {name}": rows[start:end] for name, rows in adapter.B.items()},
        }
        for ref, (start, end) in spans
    }


def _same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    import torch

    return all(torch.equal(rows, other[name]) for name, rows in one.items())
