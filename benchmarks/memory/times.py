"""Does the memory know what held when? `python -m benchmarks.memory.times`

order      the same statements told in other orders: answers of `as_of` that change, and would if the last told won
mistakes   facts that a fact of another (subject, relation) ended, and corrections that ended nothing
timeqa     questions on Wikipedia pages whose answers hold for a span of time: is the statement of the right span found?

TimeQA's memories are made like this: the sentence that the annotators marked as holding a question's answer, behind its
page's title, is one statement; its dates are those of the question, for the page has them in no form that a program can
read. So what is measured is whether search uses dates, not whether dates are found in a text. All pages are one user's,
alone or among other sentences of the pages, without dates. A question is asked as it is and without its dates, at a
date drawn from its span; the control is a date from another span of the page.
"""

import random
import re
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from datetime import date, timedelta
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import hydra
from pydantic import Field

from benchmarks.measuring.rows import Row
from hypernet.cli.scripts import Script
from hypernet.cli.settings import Count, Number, OutputFile, Settings, Text
from hypernet.memory.memory import Memory
from hypernet.memory.store.records import Draft, Filters

USER = "reader"
_PRIORITY = ("registry", "notes/*")  # of sources, the best first
_ANOTHER = "date of another span"  # the control
_FIRST_DAY, _DAYS = date(1900, 1, 1), 40_000


# --- Order ----------------------------------------------------------------------------------------------------------


def drawn_statements(rng: random.Random, *, num_keys: int, statements_per_key: int) -> list[list[Draft]]:
    """Statements of each key, no two of one key from the same day on: of those the one told last holds, by intent."""
    keys = []
    for key in range(num_keys):
        conflict = rng.choice(["latest", "source_priority"])
        drafts = []
        for number, day in enumerate(rng.sample(range(_DAYS), statements_per_key)):
            end = _day(day + rng.randint(1, _DAYS // 4)) if rng.random() < 0.3 else None
            drafts.append(
                Draft(
                    text=f"{key}: value {number}",
                    subject=f"thing {key}",
                    relation="value",
                    source=rng.choice([None, "registry", "notes/a"]),
                    conflict=conflict,
                    filters=Filters(f"user{key % 3}"),
                    valid_at=_day(day),
                    invalid_at=end,
                )
            )
        keys.append(drafts)
    return keys


def order(
    seed: int, *, num_keys: int, statements_per_key: int, num_orders: int, num_dates: int, **settings: Any
) -> Row:
    """Tells the same statements in several orders, each to a memory of its own; compares what holds at each date."""
    rng = random.Random(seed)
    keys = drawn_statements(rng, num_keys=num_keys, statements_per_key=statements_per_key)
    dates = [_day(rng.randrange(_DAYS)) for _ in range(num_dates)]
    told = [draft for drafts in keys for draft in drafts]
    views, naive = [], []
    for _ in range(num_orders):
        with tempfile.TemporaryDirectory() as folder:
            memory = Memory.open(folder, source_priority=_PRIORITY, **settings)
            for start in range(0, len(told), 50):
                memory.store.add(told[start : start + 50])
            views.append([{m.subject: m.text for m in memory.list(as_of=when)} for when in dates])
            memory.close()
        naive.append([_last_told(told, when) for when in dates])
        rng.shuffle(told)
    names = [drafts[0].subject for drafts in keys]

    def changed(found: list[list[dict]]) -> int:
        first, *others = found
        return sum(
            one.get(n) != two.get(n) for other in others for one, two in zip(first, other, strict=True) for n in names
        )

    answers = len(names) * num_dates * (num_orders - 1)
    return {
        **{"kind": "order", "seed": seed, "statements": len(told), "orders": num_orders, "answers": answers},
        **{"changed": changed(views), "changed_if_the_last_told_won": changed(naive)},
    }


def _last_told(told: Sequence[Draft], when: date) -> dict:
    """Subject → text of the last statement told that says of itself that it holds then: the control."""
    return {
        draft.subject: draft.text
        for draft in told
        if draft.valid_at <= when and (draft.invalid_at is None or when < draft.invalid_at)
    }


def _day(number: int) -> date:
    return _FIRST_DAY + timedelta(days=number)


# --- Mistakes -------------------------------------------------------------------------------------------------------


def mistakes(seed: int, *, num_facts: int, num_corrections: int, key: str) -> Row:
    """Adds facts of different (subject, relation), then corrects some; counts what ended wrongly and what did not end.

    Args:
        key: "given" (subject and relation), "extracted" from the sentence, or "subject", the control.
    """
    from hypernet.data.encyclopedia import Encyclopedia, Fact, relations
    from hypernet.memory.extraction import extract_facts

    encyclopedia = Encyclopedia("test", seed=seed)
    rng = encyclopedia.rng("mistakes")
    facts: list[Fact] = []
    names: set[str] = set()
    while len(facts) < num_facts:
        entity = encyclopedia.entity(rng, rng.choice(relations()).entity_kind)
        if entity.name.casefold() in names:  # two of one name would be one subject
            continue
        names.add(entity.name.casefold())
        facts += [
            Fact(entity, relation, encyclopedia.value(rng, relation.value_kind))
            for relation in relations()
            if relation.entity_kind == entity.kind
        ]
    facts = facts[:num_facts]
    corrected = rng.sample(range(num_facts), num_corrections)
    told = [(number, facts[number], _day(rng.randrange(_DAYS // 2))) for number in range(num_facts)]
    for number in corrected:
        entity, relation, _ = facts[number]
        fact = Fact(entity, relation, encyclopedia.value(rng, relation.value_kind))
        told.append((number, fact, _day(_DAYS // 2 + rng.randrange(_DAYS // 2))))
    with tempfile.TemporaryDirectory() as folder:
        memory = Memory.open(folder, extractor=extract_facts if key == "extracted" else None)
        drafts = []
        for _, fact, since in told:
            sentence = rng.choice(fact.relation.sentences).format(s=fact.entity.name, n=fact.entity.name, v=fact.value)
            said = {"given": fact.relation.name, "subject": "is"}
            keyed = {"subject": fact.entity.name, "relation": said[key]} if key in said else {}
            text = sentence[0].upper() + sentence[1:]
            drafts.append(Draft(text=text, filters=Filters(USER), valid_at=since, **keyed))
        if key == "extracted":  # which is what `Memory.add` does
            refs = [memory.add(draft.text, user_id=USER, valid_at=draft.valid_at) for draft in drafts]
        else:
            refs = memory.store.add(drafts)
        owner = {str(ref): number for ref, (number, _, _) in zip(refs, told, strict=True)}
        statements = memory.store.statements()
        first = {owner[m.ref]: m for m in reversed(statements)}  # the one told first of each fact
        memory.close()
    with_key = sum(m.subject is not None for m in statements)
    ended = {number for number, statement in first.items() if statement.invalid_at is not None}
    return {
        **{"kind": "mistakes", "seed": seed, "key": key, "facts": num_facts, "corrections": num_corrections},
        "statements_with_key": with_key,
        **{"ended_by_mistake": len(ended - set(corrected)), "corrections_missed": len(set(corrected) - ended)},
    }


# --- TimeQA ---------------------------------------------------------------------------------------------------------

_MONTHS = "jan feb mar apr may jun jul aug sep oct nov dec".split()
_POINT = r"(?:(?P<m{0}>jan|feb|mar|apr|may|jun|jul|aug|sep|oct|nov|dec)[a-z]*\.? )?(?P<y{0}>[12]\d{{3}})\b"
_SPAN = re.compile(
    r"(?:\b(?:from|between|during|in|since|of|the|year|period)\s+)*\b"
    + _POINT.format("a")
    + r"(?:\s*(?:\bto\b|\band\b|\buntil\b|[-–])\s*"
    + _POINT.format("b")
    + ")?",
    re.IGNORECASE,
)


class Statement(NamedTuple):
    """since, until: half open, so that spans which follow each other share no day."""

    page: str
    relation: str
    text: str
    since: date
    until: date


class DatedQuestion(NamedTuple):
    """text: as asked. undated: without its dates. answers: right ones. right: the statements of its span."""

    page: str
    text: str
    undated: str
    answers: tuple[str, ...]
    right: tuple[Statement, ...]


class Pages(NamedTuple):
    """others: sentences of the pages that answer no question. skipped: questions, by the reason."""

    questions: list[DatedQuestion]
    others: list[tuple[str, str]]
    skipped: dict[str, int]


def read_timeqa(path: str | Path, *, max_pages: int | None = None) -> Pages:
    """Questions of TimeQA's human annotated file with the statements that answer them.

    Raises:
        ValueError: it is no such file.
        OSError: it cannot be read.
    """
    import json

    from hypernet.text.sentences import split_sentences

    found = Pages([], [], defaultdict(int))
    try:
        pages = json.loads(Path(path).read_text(encoding="utf-8"))[:max_pages]
        for page in pages:
            title, used = page["paras"][0], set()
            sentences = [[text[s:e].strip() for s, e in split_sentences(text)] for text in page["paras"]]
            for text, marked in page["questions"]:
                answers = [answer for answer in marked if answer["answer"].strip()]
                times = list(_SPAN.finditer(text))
                span = span_of(times[0]) if len(times) == 1 else None
                if not answers or span is None:
                    found.skipped["it has no answer" if not answers else "its dates are not one span"] += 1
                    continue
                right = []
                for answer in answers:
                    paragraph = page["paras"][answer["para"]]
                    holding = [
                        paragraph[s:e].strip()
                        for s, e in split_sentences(paragraph)
                        if s < answer["end"] and answer["from"] < e
                    ]
                    used |= set(holding)
                    right.append(Statement(page["link"], page["type"], f"{title}: {' '.join(holding)}", *span))
                undated = " ".join((text[: times[0].start()] + text[times[0].end() :]).split())
                given = tuple(answer["answer"] for answer in answers)
                found.questions.append(DatedQuestion(page["link"], text, undated, given, tuple(right)))
            others = [sentence for paragraph in sentences[1:] for sentence in paragraph if len(sentence.split()) > 3]
            found.others.extend((page["link"], f"{title}: {sentence}") for sentence in others if sentence not in used)
    except (KeyError, TypeError, IndexError, AttributeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not TimeQA's human annotated file ({error!r}). Name that file.") from error
    return found


def span_of(found: re.Match) -> tuple[date, date] | None:
    """First day, and the day after the last. A year or month that ends a span is where the next span begins."""
    since, last = _first_of(found, "a"), _first_of(found, "b")
    if last is None or last == since:  # one year or month: all of it
        by_month = found["ma"] and (last is None or found["mb"])
        until = (since + timedelta(days=31 if by_month else 366)).replace(day=1)
        return since, until if by_month else until.replace(month=1)
    return (since, last) if since < last else None


def _first_of(found: re.Match, which: str) -> date | None:
    year, month = found[f"y{which}"], found[f"m{which}"]
    return date(int(year), _MONTHS.index(month[:3].lower()) + 1 if month else 1, 1) if year else None


def timeqa(pages: Pages, seeds: Sequence[int], *, num_others: int, **settings: Any) -> Iterator[Row]:
    """A row for each way to keep the dates and to ask; intervals are of pages, which are drawn whole."""
    from benchmarks.measuring.metrics import bootstrap_interval

    scores: dict[tuple[str, str, str], list[dict[str, float]]] = defaultdict(list)
    for seed in seeds:
        rng = random.Random(seed)
        others = rng.sample(pages.others, min(num_others, len(pages.others)))
        dates = [_drawn(rng, question.right[0]) for question in pages.questions]
        wrong = [_elsewhere(rng, question, pages.questions) for question in pages.questions]
        for kept in ("start and end", "start, and a key", "none"):
            with tempfile.TemporaryDirectory() as folder:
                memory, statement_of = _filled(folder, pages, others, kept, settings)
                asked = {"date of the span": dates, _ANOTHER: wrong} if kept != "none" else {"no date": dates}
                for when, days in asked.items():
                    for form in ("text", "undated"):
                        for question, day in zip(pages.questions, days, strict=True):
                            if day is not None:
                                given = None if kept == "none" else day
                                hits = memory.search(getattr(question, form), user_id=USER, limit=5, as_of=given)
                                scores[kept, when, form].append(_scored(question, hits, statement_of))
                memory.close()
    for (kept, when, form), found in scores.items():
        how = "as asked" if form == "text" else "without its dates"
        row: Row = {"kind": "timeqa", "others": min(num_others, len(pages.others)), "dates": kept, "asked_at": when}
        row |= {"question": how, "questions": len(found), "pages": len({one["page"] for one in found})}
        row["seeds"] = len(seeds)
        groups = [one["page"] for one in found]
        for name in ("right_at_1", "right_at_5", "answer_at_1", "answer_at_5"):
            values = [one[name] for one in found]
            row |= {
                name: sum(values) / len(values),
                f"{name}_interval": list(bootstrap_interval(values, groups=groups)),
            }
        yield row


def _drawn(rng: random.Random, statement: Statement) -> date:
    return statement.since + timedelta(days=rng.randrange((statement.until - statement.since).days))


def _elsewhere(rng: random.Random, question: DatedQuestion, questions: Sequence[DatedQuestion]) -> date | None:
    """A date within another span of the page and outside the question's; None if there is none."""
    others = [
        s for other in questions if other.page == question.page for s in other.right if s.text != question.right[0].text
    ]
    since, until = question.right[0].since, question.right[0].until
    for statement in rng.sample(others, len(others)):
        when = _drawn(rng, statement)
        if not since <= when < until:
            return when
    return None


def _filled(
    folder: str, pages: Pages, others: Sequence[tuple[str, str]], kept: str, settings: dict[str, Any]
) -> tuple[Memory, dict[str, tuple[str, date | None]]]:
    """A memory of all statements and others, and id@version → its text and first day."""
    memory, always = Memory.open(folder, **settings), date(1, 1, 1)
    drafts = {(text, None): Draft(text=text, filters=Filters(USER), valid_at=always) for _, text in others}
    for statement in dict.fromkeys(s for question in pages.questions for s in question.right):
        page, relation, text, since, until = statement
        match kept:
            case "none":
                drafts[text, None] = Draft(text=text, filters=Filters(USER), valid_at=always)
            case "start, and a key":
                keyed = {"subject": page, "relation": relation}
                drafts[text, since] = Draft(text=text, filters=Filters(USER), valid_at=since, **keyed)
            case _:
                dated = {"valid_at": since, "invalid_at": until}
                drafts[text, since] = Draft(text=text, filters=Filters(USER), **dated)
    refs = memory.store.add(list(drafts.values()))
    return memory, {str(ref): place for ref, place in zip(refs, drafts, strict=True)}


def _scored(
    question: DatedQuestion, hits: Sequence[Any], statement_of: dict[str, tuple[str, date | None]]
) -> dict[str, Any]:
    """Whether the first hit, or one of five, is a statement of the question's span, and whether it holds an answer.

    A memory without dates cannot tell two spans of one text apart: there, its text is enough.
    """
    right = {(s.text, s.since) for s in question.right} | {(s.text, None) for s in question.right}
    found = [statement_of[hit.ref] in right for hit in hits]
    answered = [any(answer in (hit.text or "") for answer in question.answers) for hit in hits]
    return {
        **{"page": question.page, "right_at_1": any(found[:1]), "right_at_5": any(found)},
        **{"answer_at_1": any(answered[:1]), "answer_at_5": any(answered)},
    }


def markdown(rows: Sequence[Row]) -> str:
    """TimeQA's table in the documentation: shares of questions whose first hit is a statement of the right span."""
    from benchmarks.report.tables import Table, number

    cells = {
        "dates kept": lambda row: row["dates"],
        "other sentences": lambda row: f"{row['others']:,}",
        "question": lambda row: row["question"],
        "right first": number("right_at_1"),
        "low": lambda row: f"{row['right_at_1_interval'][0]:.2f}",
        "high": lambda row: f"{row['right_at_1_interval'][1]:.2f}",
        "right of five": number("right_at_5"),
    }
    shown = [row for row in rows if row["kind"] == "timeqa" and row["asked_at"] != _ANOTHER]
    return Table.of("", shown, cells).markdown()


# --- All ------------------------------------------------------------------------------------------------------------


class TimesSettings(Settings):
    model: Text | None
    seeds: Annotated[list[Number], Field(min_length=1, description="a list of whole numbers, at least one")]
    num_keys: Count
    statements_per_key: Annotated[int, Field(ge=2, le=1000, description="a whole number from 2 to 1000")]
    num_orders: Annotated[int, Field(ge=2, description="a whole number, at least 2")]
    num_dates: Count
    num_facts: Count
    num_corrections: Number
    timeqa_file: Text | None
    max_pages: Count | None
    num_others: list[Number]
    output: OutputFile | None


def measure(cfg: TimesSettings) -> Iterator[Row]:
    """The rows.

    Raises:
        ValueError: a file or the model cannot be read, or more facts are to be corrected than there are.
    """
    from hypernet.memory.embedding import open_embedder

    if cfg.num_corrections > cfg.num_facts:
        raise ValueError(f"num_corrections is {cfg.num_corrections}, but there are only num_facts={cfg.num_facts}.")
    pages = read_timeqa(cfg.timeqa_file, max_pages=cfg.max_pages) if cfg.timeqa_file else None
    embedder = open_embedder(cfg.model) if cfg.model else None
    sizes = {name: getattr(cfg, name) for name in ("num_keys", "statements_per_key", "num_orders", "num_dates")}
    for seed in cfg.seeds:
        yield order(seed, **sizes)
    for key in ("given", "extracted", "subject"):
        for seed in cfg.seeds:
            yield mistakes(seed, num_facts=cfg.num_facts, num_corrections=cfg.num_corrections, key=key)
    if pages:
        yield {"kind": "timeqa_made", "questions": len(pages.questions), "skipped": dict(pages.skipped)}
        for num_others in cfg.num_others:
            yield from timeqa(pages, cfg.seeds, num_others=num_others, embedder=embedder)


SCRIPT = Script("benchmarks.memory.times", TimesSettings)


@hydra.main(config_path="../../conf", config_name="memory_times", version_base="1.3")
@SCRIPT
def main(cfg: TimesSettings) -> None:
    from benchmarks.measuring.rows import show_and_write

    show_and_write(measure(cfg), cfg.output, config=cfg.model_dump())


if __name__ == "__main__":
    SCRIPT.run(main, Path(__file__).parents[2] / "conf/memory_times.yaml")
