"""Which tier is the cheapest, by length and by questions between updates? `python -m benchmarks.memory.break_even`

A document is so many facts of `benchmarks.memory.nights`, which the base model cannot know. What a method m costs in T
days is C = F (1 + u T) + Q T v, with F what a version of the document costs, v what a question costs, u updates and Q
questions a day; n* = (F - F_b) / (v_b - v) questions between updates, beyond which m is cheaper than b.

cost        F, v, bytes and accuracy of each method, at the lengths that the cost model is fitted to and at others
schedule    one day of updates and questions, really run, at lengths that nothing was fitted to, and as predicted
agreement   pairs of methods whose measured order is the predicted one
surface     what the cost model says of each length, and n* over full context

Seconds are those of the processor; FLOPs are counted by torch, and predicted from shapes. Accuracy is predicted by
interpolation between the fitted lengths. Weights are consolidated with their gate; whether it passed them does not
matter here, accuracy does. Controls: no context, and the adapter of another document.
"""

import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from itertools import combinations, groupby
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import hydra
import numpy as np
from hydra.utils import instantiate
from pydantic import Field

from benchmarks.measuring.cost import CostModel, Line, adapter_flops, flops_of
from benchmarks.measuring.rows import Row, Rows
from benchmarks.memory.nights import Told, Wordings, facts
from benchmarks.methods.adapters import DocToLoRAMethod, WrongDocument
from benchmarks.methods.base import Method
from benchmarks.methods.prompts import FullContext, NoContext, PrefixCache, Retrieval
from benchmarks.report.names import ADAPTER, CEILING, FLOOR, WRONG
from benchmarks.tasks.base import Asked, Case
from hypernet.adapters.break_even import Costs, break_even
from hypernet.cli.scripts import Script, plain
from hypernet.cli.settings import Count, Number, OutputFile, Settings, Text

WEIGHTS = "weights"
TIERS = (FLOOR, CEILING, "prefix_cache", "retrieval", ADAPTER, WEIGHTS)
NEAR = 1.1  # methods whose measured costs differ by less than this factor are counted apart
_OTHER = 5000  # seeds of other documents are this far away

Counts = Annotated[list[Count], Field(min_length=1, description="a list of whole numbers, at least one")]


class BreakEvenSettings(Settings):
    checkpoint: Text
    seeds: Annotated[list[Number], Field(min_length=1, description="a list of whole numbers, at least one")]
    fitted: Annotated[list[Count], Field(min_length=2, description="a list of at least two whole numbers")]
    held_out: Counts
    surface: Counts
    most_facts: Count
    updates: list[Number]
    questions: Counts
    num_documents: Annotated[int, Field(ge=2, description="a whole number, at least 2")]
    num_scored: Count
    num_timed: Count
    repeats: Count
    least_questions: Count
    max_new_tokens: Count
    retrieval: dict[str, Any]
    consolidator: dict[str, Any]
    least_steps: Count
    steps_per_fact: Number
    output: OutputFile | None
    threads: Count


SCRIPT = Script("benchmarks.memory.break_even", BreakEvenSettings)


class Made(NamedTuple):
    """Consolidated weights. seconds: of the processor, with the gate. flops: of training."""

    tensors: Mapping[str, Any]
    num_bytes: int
    seconds: float
    flops: float
    passed: bool


class ConsolidatedWeights(Method):
    """A document's facts in the weights, each told as a memory with its key; the question alone in the prompt.

    Documents that were consolidated before are not again: `made` says what they cost.

    Args:
        told: the facts of each document.
        make: number of facts → what trains them.
    """

    def __init__(
        self, *, model: Any, told: Mapping[str, Sequence[Told]], make: Callable[[int], Any], max_new_tokens: int = 32
    ) -> None:
        super().__init__(model=model, max_new_tokens=max_new_tokens)
        self.told, self.make = told, make
        self.made: dict[str, Made] = {}

    def build(self, case: Case) -> None:
        (document,) = self.documents
        if document not in self.made:
            self.made[document] = self._consolidated(self.told[document])

    def _consolidated(self, told: Sequence[Told]) -> Made:
        from hypernet.consolidation.consolidation import Consolidation
        from hypernet.consolidation.weights import MovedWeights
        from hypernet.memory.memory import Memory
        from hypernet.memory.store.records import Filters

        started, reader = time.process_time(), Filters("reader")
        with tempfile.TemporaryDirectory() as folder:
            memory = Memory.open(Path(folder) / "memory", model=self.model)
            for one in told:
                memory.add(one.text, user_id="reader", subject=one.subject, relation=one.relation)
            own = Consolidation(memory, consolidator=self.make(len(told)))
            candidate = own.consolidate(reader)
            seconds = time.process_time() - started
            moved = MovedWeights.load(candidate.folder, self.model)
            flops = own.training(candidate)["flops"]
            memory.close()
        return Made(moved.tensors, moved.num_bytes, seconds, flops, bool(candidate.passed))

    def active(self, prompts: Sequence[Sequence[int]]) -> AbstractContextManager:
        from hypernet.consolidation.weights import installed

        stack = ExitStack()
        stack.enter_context(super().active(prompts))
        stack.enter_context(installed(self.model.base_model, self.made[self.documents[0]].tensors))
        return stack

    def prepare_flops(self, case: Case) -> int:
        self.prepare(case)
        return round(self.made[self.documents[0]].flops)

    def stored_bytes(self) -> int:
        return self.made[self.documents[0]].num_bytes


# --- Prediction -----------------------------------------------------------------------------------------------------


class Length(NamedTuple):
    """Of a document: its facts and their tokens."""

    facts: int
    tokens: float


class CostSurface(NamedTuple):
    """F and v of each method by length, in FLOPs and in seconds.

    models: of each method, with answers of its mean length. seconds: lines to prepare and of a question, over the FLOPs
    or, where there are none, over the tokens. training: FLOPs of consolidation over the questions that it trains on.
    room: tokens of a document that the window holds.
    """

    models: Mapping[str, CostModel]
    seconds: Mapping[str, tuple[Line, Line]]
    training: Line
    trained: Callable[[int], float]
    room: int

    @classmethod
    def fitted(cls, model: CostModel, rows: Rows, *, trained: Callable[[int], float], room: int) -> "CostSurface":
        """From rows of kind cost that were timed."""
        of = {method: [row for row in rows if row["method"] == method] for method in TIERS}
        asked = _mean(row["prompt_tokens"] for row in of[FLOOR])
        found = max(row["prompt_tokens"] for row in of["retrieval"]) - asked
        sized = model._replace(question_tokens=round(asked), retrieved_tokens=round(found))
        models = {
            method: sized._replace(answer_tokens=_mean(row["answer_tokens"] for row in own))
            for method, own in of.items()
        }
        training = Line.fitted([(trained(row["facts"]), row["prepare_flops"]) for row in of[WEIGHTS]])
        surface = cls(models, {}, training, trained, room)
        lines = {}
        for method, own in of.items():
            work = [surface._work(method, Length(row["facts"], row["tokens"])) for row in own]
            pairs = [("prepare_s", [one.prepare for one in work]), ("question_s", [one.question for one in work])]
            lines[method] = tuple(
                Line.fitted([(x, row[key]) for x, row in zip(xs, own, strict=True)]) for key, xs in pairs
            )
        return surface._replace(seconds=lines)

    def flops(self, method: str, length: Length) -> Costs:
        model, tokens = self.models[method], length.tokens
        if method in (FLOOR, WEIGHTS):
            prepare = self.training.at(self.trained(length.facts)) if method == WEIGHTS else 0.0
            return Costs(prepare, model.costs(CEILING, 0).question)
        return model.costs(method, min(tokens, self.room) if method in (CEILING, "prefix_cache") else tokens)

    def costs(self, method: str, length: Length) -> Costs:
        """In seconds."""
        work = self._work(method, length)
        prepare, question = self.seconds[method]
        return Costs(prepare.at(work.prepare), question.at(work.question))

    def _work(self, method: str, length: Length) -> Costs:
        flops = self.flops(method, length)
        return flops if flops.prepare else flops._replace(prepare=length.tokens)


def agreement(rows: Rows, *, currency: str, without: Sequence[str] = ()) -> Row:
    """Pairs of methods at each point of the grid: how many have the predicted order, in all and of those not `NEAR`.

    Args:
        rows: of kind schedule.
        currency: seconds or flops.
        without: methods that are left out.
    """
    from benchmarks.measuring.metrics import bootstrap_interval

    place = lambda row: (row["seed"], row["facts"], row["updates"], row["questions"])  # noqa: E731
    rows = sorted((row for row in rows if row["method"] not in without), key=place)
    same, groups, near, points = [], [], [], []
    for key, own in groupby(rows, key=place):
        right = []
        for one, other in combinations(list(own), 2):
            measured, predicted = one[currency] / other[currency], one[f"predicted_{currency}"]
            close = 1 / NEAR < measured < NEAR
            agrees = (measured < 1) == (predicted < other[f"predicted_{currency}"])
            near.append(close)
            same.append(agrees)
            groups.append(key[:2])
            right.append(agrees or close)
        points.append(all(right))
    apart = [(agrees, group) for agrees, close, group in zip(same, near, groups, strict=True) if not close]
    values = [float(agrees) for agrees, _ in apart]
    enough = len({group for _, group in apart}) > 1
    interval = list(bootstrap_interval(values, groups=[group for _, group in apart])) if enough else None
    row = {"kind": "agreement", "currency": currency, "tiers": "all" if not without else "without weights"}
    row |= {"pairs": len(same), "near": sum(near), "agreement": _mean(values), "interval": interval}
    return row | {"of_all_pairs": _mean(same), "points": len(points), "whole_order": _mean(points)}


# --- Measurement ----------------------------------------------------------------------------------------------------


class Bench:
    """The methods, and documents drawn by (seed, facts, number)."""

    def __init__(self, cfg: BreakEvenSettings) -> None:
        import torch

        from hypernet.consolidation.consolidator import Consolidator
        from hypernet.doc_to_lora import DocToLoRA

        torch.set_num_threads(cfg.threads)
        self.cfg = cfg
        self.model = DocToLoRA.from_pretrained(cfg.checkpoint).eval().requires_grad_(False)
        given = {"model": self.model, "max_new_tokens": cfg.max_new_tokens}
        self.told: dict[str, list[Told]] = {}

        def make(number: int) -> Consolidator:
            parts = instantiate(cfg.consolidator)
            return Consolidator(**parts, questions=Wordings(), steps=self.steps(number))

        self.weights = ConsolidatedWeights(**given, told=self.told, make=make)
        self.methods: dict[str, Method] = {
            FLOOR: NoContext(**given),
            CEILING: FullContext(**given),
            "prefix_cache": PrefixCache(**given),
            "retrieval": Retrieval(**given, **cfg.retrieval),
            ADAPTER: DocToLoRAMethod(**given),
            WEIGHTS: self.weights,
        }
        self.wrong = WrongDocument(**given)

    def steps(self, number: int) -> int:
        """Of training so many facts."""
        return max(self.cfg.least_steps, self.cfg.steps_per_fact * number)

    def trained(self, number: int) -> float:
        """Questions that training so many facts reads: of each fact there are about eight."""
        batch = min(self.cfg.consolidator["batch_size"], 8 * number)
        return self.steps(number) * (batch + self.cfg.consolidator["rehearsal_size"])

    def case(self, seed: int, number: int, version: int = 0) -> Case:
        """A document of so many facts, all of which are asked for."""
        told, other = (facts(seed + 100 * version + shift, number) for shift in (0, _OTHER))
        document, wrong = (" ".join(one.text for one in of) for of in (told, other))
        self.told[document] = told
        asked = tuple(Asked(one.question, (one.answer,)) for one in told)
        return Case(f"{number} facts", f"{seed}/{version}", (document,), asked, others=(wrong,))

    @staticmethod
    def few(case: Case, number: int) -> Case:
        """With at most so many of its questions, from the first fact's to the last one's."""
        places = np.linspace(0, len(case.questions) - 1, min(number, len(case.questions))).round()
        return case._replace(questions=tuple(case.questions[int(place)] for place in places))

    def tokens(self, case: Case) -> int:
        return len(self.methods[FLOOR].encode(case.documents[0]))

    def is_run(self, method: str, number: int) -> bool:
        return method != WEIGHTS or number <= self.cfg.most_facts

    # One length

    def costs(self, seed: int, number: int, *, timed: bool) -> Iterator[Row]:
        """Rows of kind cost: accuracy over several documents (weights: over one), and F and v of the first."""
        drawn = [self.case(seed, number, version) for version in range(self.cfg.num_documents)]
        cases, few = [self.few(case, self.cfg.num_scored) for case in drawn], self.few(drawn[0], self.cfg.num_timed)
        for name, method in {**self.methods, WRONG: self.wrong}.items():
            if not self.is_run(name, number):
                continue
            scores, sizes = [], []
            for case in cases[:1] if name == WEIGHTS else cases:
                method.prepare(case)
                sizes.append(method.stored_bytes())
                answers = method.answer(case.questions)
                scores += [_right(a.text, q) for a, q in zip(answers, case.questions, strict=True)]
            row = {"kind": "cost", "seed": seed, "facts": number, "tokens": self.tokens(cases[0]), "method": name}
            row |= {"accuracy": _mean(scores), "asked": len(scores), "bytes": _mean(sizes)}
            if name == WEIGHTS:
                row["passed"] = self.weights.made[cases[0].documents[0]].passed
            yield row | (self._timed(name, few) if timed and name != WRONG else {})

    def _timed(self, name: str, case: Case) -> Row:
        method, prepared, asked, tokens, prompts = self.methods[name], [], [], [], []
        for turn in range(self.cfg.repeats + 1):  # the first to warm up
            started = time.process_time()
            method.prepare(case)
            prepared.append(time.process_time() - started)
            started = time.process_time()
            counts = [method.timed_answer(question)[2] for question in case.questions]
            asked.append((time.process_time() - started) / len(counts))
            if not turn:
                tokens, prompts = counts, [len(method.prompt(question)[0]) for question in case.questions]
        if name == WEIGHTS:
            prepared = [0.0, self.weights.made[case.documents[0]].seconds]
        row = {"prepare_s": statistics.median(prepared[1:]), "question_s": statistics.median(asked[1:])}
        row |= {"prepare_flops": method.prepare_flops(case), "question_flops": _mean(self._flops(name, case))}
        return row | {"answer_tokens": _mean(tokens), "prompt_tokens": _mean(prompts)}

    def _flops(self, name: str, case: Case) -> list[int]:
        """Of each question, counted; the method is prepared."""
        method, found = self.methods[name], []
        for question in case.questions:
            tokens = len(method.prompt(question)[0])
            run: list[Any] = []
            counted = flops_of(lambda q=question, run=run: run.append(method.timed_answer(q)[2]))
            if method.adapter is not None:
                counted += adapter_flops(method.adapter.targets, method.active_rank, tokens + run[0] - 1)
            found.append(counted)
        return found

    # One day

    def schedules(self, seed: int, number: int, predicted: CostSurface) -> Iterator[Row]:
        """Rows of kind schedule: a day with so many updates and questions, run by each method in turn."""
        versions = [
            self.few(self.case(seed, number, place), self.cfg.num_timed) for place in range(1 + max(self.cfg.updates))
        ]
        for updates in self.cfg.updates:
            names = [name for name in TIERS if self.is_run(name, number)]
            if updates and number > min(self.cfg.held_out):  # a consolidation for each version takes too long
                names = [name for name in names if name != WEIGHTS]
            days = versions[: 1 + updates]
            length = Length(number, _mean(self.tokens(case) for case in days))
            counted = {name: self._counted(name, days) for name in names}
            for questions in self.cfg.questions:
                seconds = self._taken(names, days, questions)
                shares = _shares(questions, len(days))
                for name in names:
                    each = zip(counted[name], shares, strict=True)
                    row = {"kind": "schedule", "seed": seed, "facts": number, "updates": updates}
                    row |= {"questions": questions, "method": name, "seconds": seconds[name]}
                    row["flops"] = sum(made + sum(of[turn % len(of)] for turn in range(n)) for (made, of), n in each)
                    for currency, costs in (("seconds", predicted.costs), ("flops", predicted.flops)):
                        prepare, question = costs(name, length)
                        row[f"predicted_{currency}"] = prepare * len(days) + question * questions
                    yield row

    def _counted(self, name: str, days: Sequence[Case]) -> list[tuple[int, list[int]]]:
        """FLOPs to prepare each version and of each of its questions."""
        return [(self.methods[name].prepare_flops(case), self._flops(name, case)) for case in days]

    def _taken(self, names: Sequence[str], days: Sequence[Case], questions: int) -> dict[str, float]:
        """Seconds of a whole day by method, the median of some days; what was consolidated before counts as then."""
        taken: dict[str, list[float]] = {name: [] for name in names}
        for _ in range(max(1, math.ceil(self.cfg.least_questions / questions))):
            for name in names:
                started = time.process_time()
                self._run(name, days, questions)
                taken[name].append(time.process_time() - started)
        before = sum(self.weights.made[case.documents[0]].seconds for case in days) if WEIGHTS in names else 0.0
        return {name: statistics.median(of) + (before if name == WEIGHTS else 0.0) for name, of in taken.items()}

    def _run(self, name: str, days: Sequence[Case], questions: int) -> None:
        method = self.methods[name]
        for case, asked in zip(days, _shares(questions, len(days)), strict=True):
            method.prepare(case)
            for turn in range(asked):
                method.timed_answer(case.questions[turn % len(case.questions)])


def measure(cfg: BreakEvenSettings) -> Iterator[Row]:
    bench = Bench(cfg)
    rows: list[Row] = []

    def kept(new: Iterable[Row]) -> Iterator[Row]:
        for row in new:
            rows.append(row)
            yield row

    for seed in cfg.seeds:
        for number in cfg.fitted:
            yield from kept(bench.costs(seed, number, timed=True))
    timed = [row for row in rows if "prepare_s" in row]
    longest = max(row["prompt_tokens"] for row in timed if row["method"] == CEILING)
    room = round(longest - _mean(row["prompt_tokens"] for row in timed if row["method"] == FLOOR))
    predicted = CostSurface.fitted(CostModel.of(bench.model), timed, trained=bench.trained, room=room)
    for seed in cfg.seeds:
        for number in cfg.held_out:
            yield from kept(bench.costs(seed, number, timed=False))
            yield from kept(bench.schedules(seed, number, predicted))
    scheduled = [row for row in rows if row["kind"] == "schedule"]
    for currency in ("seconds", "flops"):
        yield agreement(scheduled, currency=currency)
        yield agreement(scheduled, currency=currency, without=(WEIGHTS,))
    yield from surface(cfg, predicted, [row for row in rows if row["kind"] == "cost"])


def surface(cfg: BreakEvenSettings, predicted: CostSurface, rows: Rows) -> Iterator[Row]:
    """Rows of kind surface; accuracy is interpolated between the fitted lengths, and so is said for the others."""
    per_fact = Line.fitted([(row["facts"], row["tokens"]) for row in rows if row["method"] == FLOOR])
    for number in cfg.surface:
        length = Length(number, per_fact.at(number))
        full = predicted.costs(CEILING, length), predicted.flops(CEILING, length)
        for method in TIERS:
            own = [row for row in rows if row["method"] == method]
            fitted = [row for row in own if "prepare_s" in row]
            at = sorted({row["facts"] for row in fitted})
            scores = [_mean(row["accuracy"] for row in fitted if row["facts"] == here) for here in at]
            costs, flops = predicted.costs(method, length), predicted.flops(method, length)
            row = {"kind": "surface", "facts": number, "tokens": length.tokens, "method": method}
            row["extrapolated"] = number > max(at)  # then accuracy is not known
            row["accuracy"] = None if row["extrapolated"] else float(np.interp(math.log(number), np.log(at), scores))
            measured = [one["accuracy"] for one in own if one["facts"] == number]
            row["measured_accuracy"] = _mean(measured) if measured else None
            row |= {"prepare_s": costs.prepare, "question_s": costs.question}
            row |= {"prepare_flops": flops.prepare, "question_flops": flops.question}
            evens = [break_even(one, other) for one, other in zip((costs, flops), full, strict=True)]
            named = zip(("break_even_s", "break_even_flops"), evens, strict=True)
            yield row | {name: even if math.isfinite(even) and method != CEILING else None for name, even in named}


def _right(text: str, question: Asked) -> float:
    from hypernet.text.matching import exact_match

    return float(exact_match(text, question.answers))


def _shares(questions: int, versions: int) -> list[int]:
    """So many questions for each version, as even as can be."""
    ends = [questions * place // versions for place in range(versions + 1)]
    return [end - begin for begin, end in zip(ends, ends[1:], strict=False)]


def _mean(values: Iterable[float]) -> float:
    values = list(values)
    return float(sum(values) / len(values)) if values else math.nan


@hydra.main(config_path="../../conf", config_name="memory_break_even", version_base="1.3")
def main(cfg: Any) -> None:
    from benchmarks.measuring.rows import show_and_write

    with SCRIPT.errors():
        settings = SCRIPT.check(cfg)
        show_and_write(measure(settings), settings.output, config=plain(cfg))


if __name__ == "__main__":
    SCRIPT.run(main, Path(__file__).parents[2] / "conf/memory_break_even.yaml")
