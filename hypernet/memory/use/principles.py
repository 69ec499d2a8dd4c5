"""Principles: what worked in an agent's runs, kept as memories with a score and with the runs that they come from.

principles = Principles(store)
principles.record(Trajectory("At the gate ...", (Try("Corbaford", "key", "tin spoons", True),), 1.0), filters)
principles.distill(filters)                       # "The key of Corbaford is tin spoons.", 1 of 1 uses, score .67
retriever.search(question, principles.where(filters))       # what an agent reads while it acts

A trajectory is a memory, and every principle contains those with a try on its subject and relation. So the deletion of
a run takes its principles along, and the next `distill` makes them anew of the runs that are left: those of a memory
that never had it. Of several actions on one subject and relation the one with the best score is the principle.

Source: EvolveR, https://arxiv.org/abs/2510.16079; it distils by a language model, and this by counting.
"""

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from hypernet.memory.store.records import Draft, Filters, MemoryRef, MemoryVersion
from hypernet.memory.store.token_store import TokenStore

TRAJECTORIES, PRINCIPLES = "trajectories", "principles"  # run_id of each


class Try(NamedTuple):
    """An action on something, and whether it did what it was to do: the key of Corbaford: tin spoons."""

    subject: str
    relation: str
    action: str
    succeeded: bool


class Trajectory(NamedTuple):
    """text: what happened, for people. total: the return of the run."""

    text: str
    tries: tuple[Try, ...]
    total: float


class Principle(NamedTuple):
    """An action, how often it was tried and did succeed."""

    subject: str
    relation: str
    action: str
    uses: int
    successes: int

    @property
    def text(self) -> str:
        return f"The {self.relation} of {self.subject} is {self.action}."

    @property
    def score(self) -> float:
        """(successes + 1) / (uses + 2): of an untried one .5, and of few uses nearer to that than of many."""
        return (self.successes + 1) / (self.uses + 2)


def distilled(tries: Iterable[Try], *, least: float = 0.5) -> list[Principle]:
    """The best action on each subject and relation, where its score is above `least`; equal names are one.

    Names are equal but for letter case and blanks. Of equal scores the one with more uses counts, then the first tried.
    """
    counts: dict[tuple[str, str], dict[str, list[Try]]] = defaultdict(lambda: defaultdict(list))
    for one in tries:
        counts[_key(one.subject, one.relation)][_plain(one.action)].append(one)
    found = []
    for of_action in counts.values():
        made = [
            Principle(*own[0][:3], uses=len(own), successes=sum(one.succeeded for one in own))
            for own in of_action.values()
        ]
        best = max(made, key=lambda one: (one.score, one.uses))
        if best.score > least:
            found.append(best)
    return found


class Principles:
    """The runs of an agent and what was distilled of them, in one store.

    Args:
        store: of the memory.
        least: score above which an action is a principle.
    """

    def __init__(self, store: TokenStore, *, least: float = 0.5) -> None:
        self.store, self.least = store, least

    def where(self, filters: Filters) -> Filters:
        """What a search among principles alone is restricted to."""
        return filters._replace(run_id=PRINCIPLES)

    def record(self, trajectory: Trajectory, filters: Filters) -> MemoryRef:
        """Remembers a run.

        Raises:
            ValueError: it has no text.
        """
        told = {"tries": json.dumps(trajectory.tries, ensure_ascii=False), "total": trajectory.total}
        own = filters._replace(run_id=TRAJECTORIES)
        return self.store.add([Draft(text=trajectory.text, filters=own, source="trajectory", metadata=told)])[0]

    def distill(self, filters: Filters) -> list[MemoryVersion]:
        """Brings the principles up to what the runs that are left say, and returns them; twice does no more."""
        runs = self.store.valid(filters._replace(run_id=TRAJECTORIES))
        members: dict[tuple[str, str], list[str]] = defaultdict(list)
        tries = []
        for run in runs:
            own = [Try(*fields) for fields in json.loads(run.metadata["tries"])]
            tries += own
            for key in dict.fromkeys(_key(one.subject, one.relation) for one in own):
                members[key].append(run.ref)
        held = {_key(str(one.subject), str(one.relation)): one for one in self.stored(filters)}
        drafts = []
        for principle in distilled(tries, least=self.least):
            key = _key(principle.subject, principle.relation)
            told = {"uses": principle.uses, "successes": principle.successes, "runs": len(members[key])}
            there = held.pop(key, None)
            if there is None or (there.text, there.metadata) != (principle.text, told):
                drafts.append(self._draft(principle, told, members[key], filters))
        if drafts:
            self.store.add(drafts)
        if held:  # nothing that is left says so
            self.store.delete_versions([one.ref for one in held.values()], reason="no run says so any more")
        return self.stored(filters)

    def stored(self, filters: Filters) -> list[MemoryVersion]:
        """Principles that hold, with "uses" and "successes" in their metadata."""
        return self.store.valid(self.where(filters))

    def _draft(self, principle: Principle, told: Mapping[str, int], members: Sequence[str], filters: Filters) -> Draft:
        return Draft(
            text=principle.text,
            filters=self.where(filters),
            subject=principle.subject,
            relation=principle.relation,
            source="principle",
            metadata=dict(told),
            conflict="latest",
            derived_from=tuple(members),
        )


def _key(subject: str, relation: str) -> tuple[str, str]:
    return _plain(subject), _plain(relation)


def _plain(name: str) -> str:
    return " ".join(name.casefold().split())
