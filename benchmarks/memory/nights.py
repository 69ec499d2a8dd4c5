"""Do memories move into weights and leave the rest alone? `python -m benchmarks.memory.nights`

nights      facts said in chat, sleep, then an empty prompt: the truth in wordings that were never trained on
poison      the same with a harmful night in between, by the real gate and by one that says yes to everything
objectives  one night by each objective, from nothing and from the generated adapters; a teacher with a wrong memory
rehearsal   one night without rehearsal, with what the model writes itself, and with given questions
tiers       the same facts from the prompt, from adapters, from weights, the others switched off
review      what the model wrote, accepted, edited and rejected by a person who knows the truth
portability the same memories rebuilt for another base model

A fact is a sentence of the encyclopedia's test split that the base model cannot know. Of the four wordings in which the
encyclopedia asks for it the first two and the templates of `hypernet.consolidation.questions` are trained on, the third
and a template are the gate's, and by the fourth the figures are measured, against the truth. Controls: the base model
before, and weights of Alice that were told another's facts.
"""

import random
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import hydra
from hydra.utils import instantiate

from benchmarks.measuring.rows import Row, show_and_write
from hypernet.cli.scripts import Script, plain
from hypernet.cli.settings import Count, Number, OutputFile, Settings, Text
from hypernet.consolidation.questions import Templates
from hypernet.memory.store.records import MemoryVersion

PARTS = ("nights", "poison", "objectives", "rehearsal", "tiers", "review", "portability")


class Told(NamedTuple):
    """A sentence with its key, and a question with its answer that only it gives."""

    text: str
    subject: str
    relation: str
    question: str
    answer: str


class Wordings(Templates):
    """The encyclopedia's own questions on a relation: two are trained on with the templates, the third is held out, and
    so is the template that is, unless the encyclopedia has it too."""

    def training(self, memory: MemoryVersion) -> list[str]:
        return [*super().training(memory), *_forms(memory)[:2]]

    def held_out(self, memory: MemoryVersion) -> list[str]:
        own = _forms(memory)
        return [*own[2:3], *(text for text in super().held_out(memory) if text not in own)]


def _forms(memory: MemoryVersion) -> list[str]:
    from hypernet.data.encyclopedia import relations

    found = [relation.questions for relation in relations() if relation.name == memory.relation]
    return [form.format(n=memory.subject) for forms in found for form in forms]


class NightsSettings(Settings):
    checkpoint: Text
    parts: list[Text]
    seeds: list[Number]
    num_nights: Count
    num_facts: Count
    gate: dict[str, Any]
    moves: dict[str, Any]
    objective: dict[str, Any]
    rehearsal: dict[str, Any]
    remedy: dict[str, Any]
    steps: Count | None
    lr: float
    batch_size: Count
    rehearsal_size: Count
    num_known: Number
    num_background: Count
    num_control_nights: Count
    equal_steps: list[Count]
    portable: list[Text]
    output: OutputFile | None
    threads: Count


SCRIPT = Script("benchmarks.memory.nights", NightsSettings)


def facts(seed: int, number: int) -> list[Told]:
    """Facts of the encyclopedia's test split, no two with one key."""
    from hypernet.data.encyclopedia import Encyclopedia, relations

    forms = {relation.name: relation.questions for relation in relations()}
    encyclopedia, found, keys = Encyclopedia("test", seed=seed), [], set()
    for index in range(number * 4):
        record = encyclopedia.record(f"nights/{index}", num_entities=1, num_facts=4, num_distractors=0)
        for question in record.questions:
            names = [
                question.text[len(before) : len(question.text) - len(after)]
                for before, after in (form.split("{n}") for form in forms[question.group])
                if question.text.startswith(before) and question.text.endswith(after)
            ]
            holding = [text for text in record.sentences if question.answer in text and names[0] in text]
            if len(holding) == 1 and (names[0], question.group) not in keys and len(found) < number:
                keys.add((names[0], question.group))
                asked = forms[question.group][3].format(n=names[0])
                found.append(Told(holding[0], names[0], question.group, asked, question.answer))
    return found


class House:
    """A memory in a temporary folder with what consolidates it."""

    def __init__(
        self,
        cfg: NightsSettings,
        seed: int,
        *,
        gate: Any = None,
        start: str = "nothing",
        anew: bool = True,
        checkpoint: str | None = None,
        **changes: Any,
    ) -> None:
        import torch

        from hypernet.consolidation.consolidation import Consolidation
        from hypernet.consolidation.consolidator import Consolidator
        from hypernet.consolidation.rehearsal import OtherSubjects
        from hypernet.consolidation.sleep import Sleep
        from hypernet.data.encyclopedia import Encyclopedia, background_questions
        from hypernet.memory.memory import Memory
        from hypernet.text.matching import exact_match

        torch.set_num_threads(cfg.threads)
        self.right: Callable[..., float] = exact_match
        self._folder = tempfile.TemporaryDirectory()
        model = _model(checkpoint or cfg.checkpoint)
        self.memory = Memory.open(Path(self._folder.name) / "memory", model=model)
        numbers = {name: getattr(cfg, name) for name in ("steps", "lr", "batch_size", "rehearsal_size")}
        parts = {name: instantiate(getattr(cfg, name)) for name in ("moves", "objective", "rehearsal", "remedy")}
        if isinstance(parts["rehearsal"], partial):
            parts["rehearsal"] = parts["rehearsal"](questions=_known(seed, cfg.num_known))
        elif cfg.num_known and "rehearsal" not in changes and isinstance(parts["rehearsal"], OtherSubjects):
            parts["rehearsal"].also = tuple(_known(seed, cfg.num_known))
        given = {**numbers, **parts, **changes}
        rng = Encyclopedia("known", seed=seed).rng("background")
        asked = [question for question in background_questions(held_out=True)]
        self.background = rng.sample(asked, min(cfg.num_background, len(asked)))
        texts = [Encyclopedia("validation", seed=seed).record(f"local/{place}").document for place in range(4)]
        self.own = Consolidation(
            self.memory,
            consolidator=Consolidator(**given, questions=Wordings(), seed=seed),
            gate=gate or instantiate(cfg.gate),
            start=start,
            anew=anew,
            background=[question.text for question in self.background],
            texts=texts,
        )
        self.sleep = Sleep(self.own)

    def tell(self, told: Sequence[Told], user: str) -> None:
        """As messages of a chat with keys."""
        for one in told:
            self.memory.add(one.text, user_id=user, subject=one.subject, relation=one.relation, source="chat")

    def asked(self, told: Sequence[Told], user: str) -> float:
        """Share answered rightly by the weights with an empty prompt."""
        from hypernet.memory.store.records import Filters

        answers = self.own.ask([one.question for one in told], Filters(user))
        return _mean(self.right(answer.text, (one.answer,)) for answer, one in zip(answers, told, strict=True))

    def kept(self, user: str) -> float:
        """Share of the background that is answered rightly."""
        from hypernet.memory.store.records import Filters
        from hypernet.text.matching import exact_match

        answers = self.own.ask([question.text for question in self.background], Filters(user))
        pairs = zip(answers, self.background, strict=True)
        return _mean(exact_match(answer.text, (question.answer,)) for answer, question in pairs)

    def oracle(self, told: Sequence[Told]) -> float:
        """With each fact alone in the prompt."""
        texts = self.own.model.generate([one.question for one in told], documents=[one.text for one in told])
        return _mean(self.right(text, (one.answer,)) for text, one in zip(texts, told, strict=True))

    def hash(self, user: str) -> str:
        """Of the files of the live version; the base model has none."""
        from hypernet.memory.store.records import Filters

        live = self.own.live(Filters(user))
        return "base" if live is None else self.own.versions(Filters(user)).check(live)[:12]

    def checks(self, version: str | None) -> dict[str, float]:
        """What the gate measured of a candidate of Alice's."""
        from hypernet.memory.store.records import Filters

        gate = self.own.versions(Filters("alice")).get(version).gate if version else None
        return {f"gate_{check['name']}": check["value"] for check in (gate["checks"] if gate else ())}

    def close(self) -> None:
        self.memory.close()


def nights(cfg: NightsSettings, seed: int) -> Iterator[Row]:
    """Each night some facts are said and slept on; at the end the versions are rolled back one by one."""
    from hypernet.memory.store.records import Filters

    alice, told = Filters("alice"), facts(seed, cfg.num_nights * cfg.num_facts)
    others = facts(seed + 2000, cfg.num_control_nights * cfg.num_facts)
    for shuffled, anew in ((False, True), (False, False), (True, True)):
        house, hashes = House(cfg, seed, anew=anew), {}  # of each version when it became live
        for night in range(cfg.num_control_nights if shuffled else cfg.num_nights):
            today, so_far = (list(told[begin : (night + 1) * cfg.num_facts]) for begin in (night * cfg.num_facts, 0))
            house.tell(others[night * cfg.num_facts : (night + 1) * cfg.num_facts] if shuffled else today, "alice")
            before = house.asked(today, "alice")
            started = time.process_time()
            done = house.sleep.run(alice, at_once=True)
            seconds = time.process_time() - started
            hashes |= {done.version: house.hash("alice")} if done.promoted else {}
            yield {
                **{"kind": "nights", "seed": seed, "night": night + 1, "shuffled": shuffled, "anew": anew},
                **{"before": before, "after": house.asked(today, "alice"), "all_so_far": house.asked(so_far, "alice")},
                **{"oracle": house.oracle(so_far), "background": house.kept("alice"), "promoted": done.promoted},
                **{"handed_over": done.handed_over, "processor_s": seconds, "reason": done.reason},
                **house.checks(done.version),
            }
        versions, equal = house.own.versions(alice), 0
        for name in reversed(hashes):
            versions.rollback(name)
            equal += house.hash("alice") == hashes[name]
        labels = {"kind": "rollback", "seed": seed, "shuffled": shuffled, "anew": anew}
        yield {**labels, "versions": len(hashes), "equal": equal}
        house.close()


def poison(cfg: NightsSettings, seed: int) -> Iterator[Row]:
    """A good night, a harmful one, a good one, by the real gate and by one that always says yes."""
    from hypernet.consolidation.gate import AlwaysYes
    from hypernet.memory.store.records import Filters

    first, second = (facts(seed, 2 * cfg.num_facts)[place::2] for place in (0, 1))
    wrong = facts(seed + 1000, 60)
    # What is known, contradicted without its key; and sentences of words that mean nothing, which nothing asks about.
    lies = []
    for one in first:
        other = next((w for w in wrong if w.relation == one.relation and w.answer != one.answer), None)
        if other is not None:
            lies.append(one._replace(text=one.text.replace(one.answer, other.answer), answer=other.answer))
    for gate in (None, AlwaysYes()):
        house = House(cfg, seed, gate=gate)
        alice = Filters("alice")
        house.tell(first, "alice")
        house.sleep.run(alice, at_once=True)
        before, known = house.hash("alice"), house.asked(first, "alice")
        for one in lies:
            house.memory.add(
                one.text,
                user_id="alice",
                subject=one.subject,
                relation=one.relation,
                conflict="add_only",
                source="evil",
            )
        rng = random.Random(seed)
        for _ in range(cfg.num_facts):
            house.memory.add(
                " ".join(rng.sample("vrk zzo plim qar udd snef wob tri".split(), 6)) + ".", user_id="alice"
            )
        done = house.sleep.run(alice, at_once=True)
        after, still = house.hash("alice"), house.asked(first, "alice")
        house.tell(second, "alice")
        later = house.sleep.run(alice, at_once=True)
        yield {
            **{"kind": "poison", "seed": seed, "gate": type(house.own.gate).__name__, "lies": len(lies)},
            **{"promoted": done.promoted, "hash_unchanged": before == after, "known_before": known},
            **{"known_after": still, "later_promoted": later.promoted, "later_facts": house.asked(second, "alice")},
            **{"known_at_the_end": house.asked(first, "alice"), "reason": done.reason},
        }
        house.close()


def one_night(
    cfg: NightsSettings, seed: int, labels: dict[str, Any], *, wrong_memory: bool = False, **changes: Any
) -> Row:
    """A night with two nights' facts; forced, so that what it did can be seen."""
    from hypernet.memory.store.records import Filters

    told = facts(seed, 2 * cfg.num_facts)
    house = House(cfg, seed, **changes)
    # Each key with the sentence of another fact.
    texts = [one.text for one in (told[1:] + told[:1] if wrong_memory else told)]
    house.tell([one._replace(text=text) for one, text in zip(told, texts, strict=True)], "alice")
    started = time.process_time()
    candidate = house.own.consolidate(Filters("alice"))
    seconds = time.process_time() - started
    house.own.promote(candidate.name, Filters("alice"), force=True)
    training = house.own.training(candidate)
    row = {
        **{**labels, "seed": seed, "facts": len(told), "closed_book": house.asked(told, "alice")},
        **{"open_book": house.oracle(told), "background": house.kept("alice"), "passed": candidate.passed},
        **{"steps": len(training["losses"]), "processor_s": seconds, "tflops": training["flops"] / 1e12},
        **house.checks(candidate.name),
    }
    if labels["kind"] == "rehearsal":
        row["rehearsed"] = house.own.consolidator.rehearsed(house.own.model, house.memory.store.valid(Filters("alice")))
    house.close()
    return row


def portability(cfg: NightsSettings, seed: int) -> Iterator[Row]:
    """The same memories, exported and rebuilt for another base model; answers of one that speaks in sentences count
    where they hold the truth."""
    from benchmarks.measuring.metrics import contains
    from hypernet.memory.store.records import Filters

    told, exported, alice = facts(seed, cfg.num_facts), None, Filters("alice")
    for checkpoint in cfg.portable:
        house = House(cfg, seed, checkpoint=checkpoint, rehearsal=instantiate(cfg.rehearsal))
        house.right = contains
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "alice.jsonl"
            if exported is None:
                house.tell(told, "alice")
                house.memory.export_jsonl(path, user_id="alice")
                exported = path.read_bytes()
            else:
                path.write_bytes(exported)
                house.memory.import_jsonl(path)
        before, started = house.asked(told, "alice"), time.process_time()
        candidate = house.own.consolidate(alice)
        seconds = time.process_time() - started
        house.own.promote(candidate.name, alice, force=True)
        training = house.own.training(candidate)
        yield {
            **{"kind": "portability", "seed": seed, "checkpoint": checkpoint, "facts": len(told), "before": before},
            **{"closed_book": house.asked(told, "alice"), "another_user": house.asked(told, "bob")},
            **{"open_book": house.oracle(told), "passed": candidate.passed, "processor_s": seconds},
            **{"steps": len(training["losses"]), "tflops": training["flops"] / 1e12, **house.checks(candidate.name)},
        }
        house.close()


def objectives(cfg: NightsSettings, seed: int) -> Iterator[Row]:
    from hypernet.consolidation.objectives import Deep, OnPolicy, Supervised, TeacherKL

    tried = (Supervised(), TeacherKL(), OnPolicy(), Deep())
    for steps, start, objective in product(cfg.equal_steps, ("nothing", "adapters"), tried):
        labels = {"kind": "objectives", "objective": type(objective).__name__, "start": start}
        yield one_night(cfg, seed, labels, objective=objective, start=start, steps=steps)
    labels = {"kind": "objectives", "objective": "TeacherKL, wrong memory", "start": "nothing"}
    yield one_night(cfg, seed, labels, steps=max(cfg.equal_steps), wrong_memory=True)


def rehearsal(cfg: NightsSettings, seed: int) -> Iterator[Row]:
    from hypernet.consolidation.rehearsal import NoRehearsal, OtherSubjects, Replay, SelfSynthesised
    from hypernet.data.encyclopedia import background_questions

    replayed = _known(seed, 96)
    measured = {eight for question in background_questions(held_out=True) for eight in _eights(question.text)}
    measured |= {eight for one in facts(seed, 2 * cfg.num_facts) for eight in _eights(one.question)}
    kinds = (NoRehearsal(), SelfSynthesised(number=96), Replay(questions=replayed), OtherSubjects(number=96))
    for steps, kind in product(cfg.equal_steps, kinds):
        labels = {"kind": "rehearsal", "rehearsal": type(kind).__name__}
        row = one_night(cfg, seed, labels, rehearsal=kind, steps=steps)
        texts = row.pop("rehearsed")
        overlap = sum(eight in measured for text in texts for eight in _eights(text))
        yield {**row, "rehearsed": len(texts), "overlapping_8_grams": overlap}


def _known(seed: int, number: int) -> list[str]:
    """Questions that the base model answers by itself, about other facts and entities than the measured ones, and
    without eight words in a row of theirs."""
    from hypernet.data.encyclopedia import Encyclopedia, background_questions

    measured = {eight for question in background_questions(held_out=True) for eight in _eights(question.text)}
    asked = [question.text for question in background_questions(held_out=False)]
    asked = [text for text in asked if measured.isdisjoint(_eights(text))]
    return Encyclopedia("known", seed=seed).rng("replay").sample(asked, number)


def _eights(text: str) -> list[tuple[str, ...]]:
    words = text.casefold().split()
    return [tuple(words[place : place + 8]) for place in range(len(words) - 7)]


def review(cfg: NightsSettings, seed: int) -> Iterator[Row]:
    """A person accepts what is true, corrects what is not, and rejects all on some facts, one of them by its answer."""
    from hypernet.consolidation.objectives import Supervised
    from hypernet.consolidation.self_instruct.preference import Preference
    from hypernet.consolidation.self_instruct.review import Review, Reviewed
    from hypernet.memory.store.records import Filters
    from hypernet.text.matching import exact_match

    alice, told = Filters("alice"), facts(seed, 2 * cfg.num_facts)
    rejected, kept = told[: cfg.num_facts // 2], told[cfg.num_facts // 2 :]
    house = House(cfg, seed, objective=Supervised(), preference=Preference())
    house.tell(told, "alice")
    consolidator, found = house.own.consolidator, Review.of(house.memory.store.folder, alice)
    memories = house.memory.store.valid(alice)
    found.draft(house.own.model, memories, consolidator.questions)
    consolidator.questions = Reviewed(consolidator.questions, found)
    unapproved = house.sleep.run(alice, at_once=True)
    truth = {memory.ref: one for memory, one in zip(memories, told, strict=True)}
    assert all(one.text == memory.text for memory, one in zip(memories, told, strict=True))
    found.reject_text(rejected[0].answer)
    for item in list(found.items.values()):
        one = truth[item.memory]
        if one in rejected:
            found.decide(item.id, *(("reject",) if one != rejected[0] else ("accept",)))
        elif exact_match(item.answer, (one.answer,)):
            found.decide(item.id, "accept")
        else:
            found.decide(item.id, "edit", one.answer)
    statuses = [item.status for item in found.items.values()]
    lessons = consolidator.lessons(house.own.model, memories)
    done = house.sleep.run(alice, at_once=True)
    yield {
        **{"kind": "review", "seed": seed, "items": len(statuses), "edited": statuses.count("edited")},
        **{"promoted_unapproved": unapproved.promoted, "promoted": done.promoted, "reason": done.reason},
        **{"closed_book": house.asked(kept, "alice"), "open_book": house.oracle(kept)},
        "rejected_in_training": sum(one.answer in "".join(map(str, lesson)) for one in rejected for lesson in lessons),
        "rejected_answered": house.asked(rejected, "alice"),
        "background": house.kept("alice"),
    }
    house.close()


def tiers(cfg: NightsSettings, seed: int) -> Iterator[Row]:
    """Each tier by itself, for who was told and for who was not."""
    from hypernet.memory.store.records import Filters
    from hypernet.text.matching import exact_match

    told = facts(seed, cfg.num_nights * cfg.num_facts)
    house = House(cfg, seed)
    house.tell(told, "alice")
    house.sleep.run(Filters("alice"), at_once=True)
    questions = [one.question for one in told]
    for user in ("alice", "bob"):
        row: Row = {"kind": "tiers", "seed": seed, "user": user, "oracle": house.oracle(told)}
        for tier in ("none", "token", "adapter"):
            answers = house.memory.ask_many(questions, user_ids=[user] * len(told), tier=tier)
            row[tier] = _mean(exact_match(a.text, (one.answer,)) for a, one in zip(answers, told, strict=True))
        yield {**row, "weights": house.asked(told, user)}
    house.close()


@hydra.main(config_path="../../conf", config_name="memory_nights", version_base="1.3")
def main(cfg: Any) -> None:
    with SCRIPT.errors():
        settings = SCRIPT.check(cfg)
        if unknown := set(settings.parts) - set(PARTS):
            raise ValueError(f"There is no part {min(unknown)!r}: choose of {', '.join(PARTS)}.")
        show_and_write(rows(settings), settings.output, config=plain(cfg))


def rows(cfg: NightsSettings) -> Iterator[Row]:
    """All rows, part after part."""
    made = {"nights": nights, "poison": poison, "objectives": objectives, "rehearsal": rehearsal, "tiers": tiers}
    made |= {"review": review, "portability": portability}
    for part in cfg.parts:
        for seed in cfg.seeds:
            yield from made[part](cfg, seed)


_MODELS: dict[str, Any] = {}


def _model(checkpoint: str) -> Any:
    """Once for all memories."""
    from benchmarks.measuring.measure import BaseModelAlone, is_base_model
    from hypernet.doc_to_lora import DocToLoRA

    if checkpoint not in _MODELS:
        alone = is_base_model(checkpoint)
        model = BaseModelAlone.load(checkpoint, device="cpu") if alone else DocToLoRA.from_pretrained(checkpoint)
        # bfloat16 rounds away what a step of training moves.
        _MODELS[checkpoint] = model.float().eval().requires_grad_(False)
    return _MODELS[checkpoint]


def _mean(values: Any) -> float:
    values = list(values)
    return sum(values) / len(values)


if __name__ == "__main__":
    SCRIPT.run(main, Path(__file__).parents[2] / "conf/memory_nights.yaml")
