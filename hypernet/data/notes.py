"""A seeded, endless pile of notes as people write them: minutes, memos, chats, recipes, patient notes, stock lists, ...

    notes = Notes("train", seed=0)
    note = notes.note(7)              # text, facts, questions with variants of their answers
    notes.record(7)                   # the same as a record of the curriculum
    write_rows(notes, Path("notes.jsonl"), num_notes=1000)      # in the columns of SQuAD 2.0

Why it exists: the encyclopedia's English is small enough for a model of a few million parameters. A base model that
reads real text needs documents of many shapes, with several facts in a sentence, and questions in other words than the
text's. Kinds of note, sentences and questions are data: `notes.yaml`; names and things: `notes_words.yaml`.

Every note depends on (seed, split, index) and the settings alone. A kind of note belongs to one split, and so does each
family name, given name, town, brand and code, by a hash. A slot of a note has one value, is told by one sentence, and a
question asks for one slot: no note contradicts itself and no question has two answers.
"""

import json
import random
import re
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import date, timedelta
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from transformers import PreTrainedTokenizerBase

from hypernet.data.records import UNKNOWN, Question, Record
from hypernet.data.sources import count_tokens
from hypernet.io.files import replaced

MAX_DRAWS = 1000  # of a value until it is of the split and new in its note
LAYOUTS = ("prose", "lines", "bullets", "fields")  # and "chat", where a kind has speakers
MONTHS = (
    *("January", "February", "March", "April", "May", "June"),
    *("July", "August", "September", "October", "November", "December"),
)
WEEKDAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
NUMBER_WORDS = (
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"),
    *("thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen", "twenty"),
)
# One of each is a writer's habit and holds for the whole note.
DATE_FORMATS = (
    *("{d} {month} {y}", "{month} {d}, {y}", "{d:02}/{m:02}/{y}", "{y}-{m:02}-{d:02}", "{d:02}.{m:02}.{y}"),
    *("{day} {d} {mon}", "{weekday} {d} {month}", "{month} {d}", "{d} {month}", "the {nth} of {month}"),
    *("{nth} {month} {y}", "{d}-{mon}-{yy:02}", "{weekday}, {month} {d}", "{mon} {d}", "{weekday} {nth} {month} {y}"),
)
TIME_FORMATS = ("{h:02}:{m:02}", "{h12}:{m:02} {half}", "{h12}.{m:02}{half}", "{h}.{m:02}", "{h:02}:{m:02} h")
CURRENCIES = (
    *(("£", "", "pounds"), ("$", "", "dollars"), ("€", "", "euros"), ("CHF ", "", "francs"), ("A$", "", "dollars")),
    *(("", " euros", "euros"), ("", " dollars", "dollars"), ("", " pounds", "pounds"), ("EUR ", "", "euros")),
)
TITLE_STYLES = ("{}", "{}", "{}", "# {}", "## {}", "**{}**", "=== {} ===", "[{}]", "{}:", "__{}__")
FIELD_STYLES = ("{}: {}", "{}: {}", "**{}:** {}", "- {}: {}", "{} – {}", "{} = {}", "* {}: {}", "| {} | {} |")
CHAT_STYLES = (
    "{name}: {text}",
    "[{clock}] {name}: {text}",
    "<{name}> {text}",
    "{clock} {name} – {text}",
    "{name}> {text}",
)
BULLETS = ("- ", "* ", "• ", "– ", "> ", "[ ] ")
SEPARATORS = ("\n\n---\n\n", "\n\n\n", "\n\n* * *\n\n", "\n----------\n")  # of two notes on one sheet
LEAST_WORDS_OF_TWO = 140
LETTERS = "ABCDEFGHJKLMNPRSTUVWXYZ"


class NoteQuestion(NamedTuple):
    """A question about a note.

    answer: as it stands in the text, or `UNKNOWN`. variants: other texts that are as right ("14:30" for "2:30 pm").
    kind: of the answer, e.g. "person", "date", "money". fact: which of the note's facts it asks for.
    """

    question: str
    answer: str
    variants: tuple[str, ...]
    answerable: bool
    kind: str
    fact: str


class Note(NamedTuple):
    """A document of one note, or of two of different kinds, and the questions about it.

    facts: name of a fact → its value and the sentence or line that tells it.
    subjects: what the note is about; questions that hold one of these are clear without the note.
    """

    text: str
    kinds: tuple[str, ...]
    facts: Mapping[str, tuple[str, str]]
    subjects: tuple[str, ...]
    questions: tuple[NoteQuestion, ...]


class _Value(NamedTuple):
    text: str
    variants: tuple[str, ...] = ()
    names: tuple[str, ...] = ()  # of a person, so that no other in the note shares one


class _Form(NamedTuple):
    """A text with slots; parts alternate between text and the name of a slot."""

    parts: tuple[str, ...]
    slots: frozenset[str]
    num_words: int

    @classmethod
    def of(cls, text: str) -> "_Form":
        parts = tuple(re.split(r"\{(\w+)\}", text))
        return cls(parts, frozenset(parts[1::2]), len(text.split()))

    def fill(self, values: Mapping[str, _Value], write: Callable[[str], str] | None = None) -> str:
        """With `write`, what stands between the values is changed by it. "a" becomes "an" before a vowel."""
        texts = [values[part].text if i % 2 else part for i, part in enumerate(self.parts)]
        for i in range(0, len(texts) - 1, 2):
            if texts[i].endswith((" a ", "A ")) and texts[i + 1][0] in "aeiouAEIOU8":
                texts[i] = texts[i][:-1] + "n "
        if write:
            texts[::2] = map(write, texts[::2])
        return "".join(texts)


class _Slot(NamedTuple):
    value: str
    labels: tuple[str, ...]
    ask: tuple[_Form, ...]


class _Rows(NamedTuple):
    """Several things of one sort, e.g. the items of a stock list; `key` is the slot that tells them apart."""

    many: tuple[int, int]
    key: str
    heads: tuple[str, ...]
    slots: Mapping[str, _Slot]
    frames: tuple[_Form, ...]


class _Kind(NamedTuple):
    name: str
    split: str
    about: tuple[str, ...]
    slots: Mapping[str, _Slot]
    titles: tuple[_Form, ...]
    frames: tuple[_Form, ...]
    fillers: tuple[_Form, ...]
    closings: tuple[_Form, ...]
    layouts: tuple[str, ...]
    register: tuple[_Form, ...]
    speakers: tuple[str, ...]
    rows: _Rows | None


@cache
def _data(name: str) -> dict:
    # libyaml reads it in a tenth of a second, Python's own parser in two seconds.
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    return yaml.load(files("hypernet.data").joinpath(name).read_text(encoding="utf-8"), Loader=loader)


@cache
def _kinds() -> Mapping[str, _Kind]:
    def forms(texts: Iterable[str]) -> tuple[_Form, ...]:
        return tuple(map(_Form.of, texts))

    def slots(entries: Mapping[str, Mapping[str, Any]]) -> dict[str, _Slot]:
        return {
            name: _Slot(
                _braced(str(entry["value"])), _alternatives(entry.get("label")), forms(_alternatives(entry.get("ask")))
            )
            for name, entry in entries.items()
        }

    def rows(entry: Mapping[str, Any]) -> _Rows:
        low, high = entry["many"]
        return _Rows((low, high), entry["key"], tuple(entry["heads"]), slots(entry["slots"]), forms(entry["frames"]))

    data = _data("notes.yaml")
    registers = {name: forms(texts) for name, texts in data["registers"].items()}
    return {
        name: _Kind(
            name,
            entry["split"],
            _alternatives(entry["about"]),
            slots(entry["slots"]),
            forms(entry["titles"]),
            forms(entry["frames"]),
            forms(entry["fillers"]),
            forms(entry.get("closings", ())),
            tuple(entry.get("layouts", LAYOUTS)),
            registers[entry["register"]],
            _alternatives(entry.get("speakers")),
            rows(entry["rows"]) if "rows" in entry else None,
        )
        for name, entry in data["kinds"].items()
    }


def _alternatives(text: str | None) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(" | ")) if text else ()


def _braced(template: str) -> str:
    return template if "{" in template else "{" + template + "}"


def note_kinds(split: str | None = None) -> dict[str, int]:
    """Kinds of note, of one split or of all, each with the number of its sentences (frames)."""
    return {
        name: len(kind.frames) + (len(kind.rows.frames) if kind.rows else 0)
        for name, kind in _kinds().items()
        if split in (None, kind.split)
    }


class Notes:
    """Notes of one split; a `hypernet.data.sources.Source`.

    Args:
        split: "train", "validation" or "test".
        tokenizer: what lengths are counted with; None counts words.
        num_words: of a note, an inclusive range that each draws from; it is missed by a sentence or, where a kind has
            no more to tell, by more.
        num_wordings: questions for each fact, in different words; as many as there are at most.
        num_unanswerable: questions that the note does not answer, an inclusive range.
        only_named: asks only what is clear without the note, because it names what the note is about: for several
            documents in one adapter.
        kinds: of the split's, to draw from; None: all.

    Raises:
        ValueError: an unknown split, kind or range.
    """

    def __init__(
        self,
        split: str = "train",
        *,
        seed: int = 0,
        tokenizer: PreTrainedTokenizerBase | None = None,
        num_words: Sequence[int] = (30, 300),
        num_wordings: int = 2,
        num_unanswerable: Sequence[int] = (0, 1),
        only_named: bool = False,
        kinds: Sequence[str] | None = None,
    ) -> None:
        available = list(note_kinds(split))
        if not available:
            raise ValueError(f"Unknown split {split!r}; choose one of train, validation, test.")
        if unknown := sorted(set(kinds or ()) - set(available)):
            raise ValueError(f"No kind of note {unknown[0]!r} in split {split}; choose from {', '.join(available)}.")
        for name, bounds in (("num_words", num_words), ("num_unanswerable", num_unanswerable)):
            if len(bounds) != 2 or not 0 <= bounds[0] <= bounds[1]:
                raise ValueError(f"{name} is {list(bounds)}; give the least and the most.")
        if num_wordings < 1:
            raise ValueError(f"num_wordings is {num_wordings}; ask for each fact at least once.")
        self.split = split
        self.seed = seed
        self.tokenizer = tokenizer
        self.num_words = num_words
        self.num_wordings = num_wordings
        self.num_unanswerable = num_unanswerable
        self.only_named = only_named
        self.kinds = list(kinds or available)

    def record(self, index: int) -> Record:
        note = self.note(index)
        return Record((note.text,), tuple(_question(note, asked) for asked in note.questions))

    def num_tokens(self, index: int) -> int:
        # Making a note takes less than counting its tokens.
        return count_tokens([self.note(index).text], self.tokenizer)[0]

    def cross_document(self, rng: random.Random, record: Record) -> Question:
        """A question about another note of the same kind, which names what this document does not mention."""
        document = record.document.lower()
        while True:
            note = self._note(f"another {rng.randrange(10**12)}", record.questions[0].group)
            named = [q for q in note.questions if any(subject in q.question for subject in note.subjects)]
            if named and not any(subject.lower() in document for subject in note.subjects):
                return _question(note, rng.choice(named))._replace(answer=UNKNOWN, kind="cross_document")

    def note(self, index: int) -> Note:
        """The note of this number; the same one every time and everywhere."""
        return self._note(str(index))

    def _note(self, key: str, kind: str | None = None) -> Note:
        rng = random.Random(f"{self.seed}/notes/{self.split}/{key}")
        low, high = self.num_words
        target = low + (high - low) * rng.betavariate(1.2, 1.8)
        names = [kind or rng.choice(self.kinds)]
        others = [name for name in self.kinds if name not in names]
        if target > LEAST_WORDS_OF_TWO and others and rng.random() < 0.75:
            names.append(rng.choice(others))
        return _Writer(rng, self).page([_kinds()[name] for name in names], target)


def write_rows(notes: Notes, path: Path, *, num_notes: int, first: int = 0) -> None:
    """Writes notes as JSON lines in the columns of SQuAD 2.0, a line for each question, all right answers in it.

    `hypernet.data.qa` reads them, and so does the benchmark's task=squad: name=squad_v2 path=<this file>.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with replaced(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        for index in range(first, first + num_notes):
            note = notes.note(index)
            for asked in note.questions:
                answers = [asked.answer, *asked.variants] if asked.answerable else []
                row = {
                    "id": str(index),
                    "title": ", ".join(note.kinds),
                    "context": note.text,
                    "question": asked.question,
                }
                file.write(json.dumps({**row, "answers": {"text": answers}}, ensure_ascii=False) + "\n")


def _question(note: Note, asked: NoteQuestion) -> Question:
    kind = "document" if asked.answerable else "unanswerable"
    return Question(asked.question, asked.answer, kind, asked.fact.partition(".")[0])


class _Writer:
    """Draws the values of the notes of one document and writes them."""

    kind: _Kind  # of the note being written
    values: Mapping[str, _Value]
    only_named: bool

    def __init__(self, rng: random.Random, settings: Notes) -> None:
        self.rng, self.split, self.settings = rng, settings.split, settings
        self.day = date(2019, 1, 1) + timedelta(rng.randrange(5000))
        self.date_format, self.time_format = rng.choice(DATE_FORMATS), rng.choice(TIME_FORMATS)
        self.currency = rng.choice(CURRENCIES)
        self.in_words = rng.random() < 0.5
        self.minutes = rng.choice((5, 15, 30))
        self.used: set[str] = set()
        self.facts: dict[str, tuple[str, str]] = {}
        self.questions: list[NoteQuestion] = []
        self.unanswerable: list[NoteQuestion] = []
        # Few write so; a reader should have met it.
        self.terse, self.typos = rng.random() < 0.1, rng.random() < 0.06
        self.write = self._change if self.terse or self.typos else None

    # Values

    def draw(self, template: str) -> _Value:
        """A value that no other slot of this note has."""
        for _ in range(MAX_DRAWS):
            value = self.expand(template)
            keys = {text.lower() for text in (value.text, *value.names)}
            if self.used.isdisjoint(keys):
                self.used |= keys
                return value
        raise AssertionError(f"too few values of {template} in split {self.split} for one note")

    def expand(self, template: str) -> _Value:
        parts = _parts(template)
        if len(parts) == 3 and not parts[0] and not parts[2]:
            return self.atom(parts[1])
        drawn = [self.atom(part) if i % 2 else _Value(part) for i, part in enumerate(parts)]
        text = "".join(value.text for value in drawn)
        names = tuple(name for value in drawn for name in value.names)
        # "12 litres" is also 12, "Dr Ama Ofori" also Ama Ofori; of two numbers neither is the whole answer.
        inner = [value for i, value in enumerate(drawn) if i % 2]
        single = len(inner) == 1 and (not parts[0] or parts[0][-1] == " ")
        single = single and (len(inner[0].names) > 1 or inner[0].text[:1].isdigit() or inner[0].text in NUMBER_WORDS)
        return _Value(text, (inner[0].text, *inner[0].variants) if single else (), names)

    def atom(self, atom: str) -> _Value:
        """One thing in braces: a number, a letter, a choice, a person, a date, or another kind of value."""
        rng = self.rng
        match _parsed(atom):
            case "@", _:
                return _Value(rng.choice(LETTERS))
            case "choice", choices:
                return _Value(rng.choice(choices))
            case "range", (low, high, step, width):
                number = rng.randrange(low, high + 1, step)
                words = (NUMBER_WORDS[number],) if number < len(NUMBER_WORDS) and not width else ()
                return _Value(str(number).zfill(width), words)
            case "few", (low, high, step, _):
                number = rng.randrange(low, high + 1, step)
                both = (str(number), NUMBER_WORDS[number])
                return _Value(both[self.in_words], (both[not self.in_words],))
            case "number", (low, high, step, _):
                number = rng.randrange(low, high + 1, step)
                return _Value(f"{number:,}", (str(number),) if number > 999 else ())
            case "decimal", (low, high, _, _):
                return _Value(f"{rng.randrange(10 * low + 1, 10 * high) / 10:.1f}")
            case "date", (low, high, _, _):
                return self.date(self.day + timedelta(rng.randint(low, high)))
            case "time", (low, high, _, _):
                return self.time(60 * low + rng.randrange(0, 60 * (high - low), self.minutes))
            case "money", (low, high, step, _):
                cents = rng.choice((0, 0, 20, 50, 50, 75, 95)) if high <= 100 and step == 1 else 0
                return self.money(rng.randrange(low, high + 1, step), cents)
            case "person", _:
                return self.person()
            case "first" | "last" as which, _:
                return _Value(name := rng.choice(rng.choice(_people(self.split)[which == "last"])), (), (name,))
            case "values", name:
                own = name in _data("notes_words.yaml")["own"]
                while True:
                    value = self.expand(rng.choice(_pool(name, self.split)))
                    if not own or _split_of(value.text) == self.split:
                        return value
        raise AssertionError(atom)

    def person(self) -> _Value:
        rng = self.rng
        firsts, lasts = _people(self.split)
        area = rng.randrange(len(firsts))
        first = rng.choice(firsts[area])
        last = rng.choice(lasts[area] if rng.random() < 0.9 else rng.choice(lasts))
        return _Value(f"{first} {last}", (last, first, f"{first[0]}. {last}"), (first, last))

    def date(self, day: date) -> _Value:
        ending = "th" if 10 < day.day < 14 else {1: "st", 2: "nd", 3: "rd"}.get(day.day % 10, "th")
        month, weekday = MONTHS[day.month - 1], WEEKDAYS[day.weekday()]
        fields = {"d": day.day, "m": day.month, "y": day.year, "yy": day.year % 100, "nth": f"{day.day}{ending}"}
        fields |= {"month": month, "mon": month[:3], "weekday": weekday, "day": weekday[:3]}
        text = self.date_format.format(**fields)
        others = ["{d} {month}", "{month} {d}", "{nth} {month}", "{d} {mon}"]
        if "{y" in self.date_format:
            others += ["{d} {month} {y}", "{month} {d}, {y}", "{y}-{m:02}-{d:02}"]
        return _Value(text, tuple(other.format(**fields) for other in others))

    def time(self, minutes: int) -> _Value:
        hours, rest = divmod(minutes % 1440, 60)
        fields = {"h": hours, "h12": (hours - 1) % 12 + 1, "m": rest, "half": "am" if hours < 12 else "pm"}
        form = self.time_format
        if not rest and "half" in form:
            form = form.replace(":{m:02}", "").replace(".{m:02}", "")
        others = (
            "{h:02}:{m:02}",
            "{h12}:{m:02} {half}",
            "{h12}.{m:02} {half}",
            *(("{h12} {half}",) if not rest else ()),
        )
        return _Value(form.format(**fields), tuple(other.format(**fields) for other in others))

    def money(self, amount: int, cents: int) -> _Value:
        before, behind, unit = self.currency
        number = f"{amount:,}" + (f".{cents:02}" if cents else "")
        plain = number.replace(",", "")
        return _Value(before + number + behind, (number, plain, f"{number} {unit}", f"{plain} {unit}"))

    # Text

    def page(self, kinds: Sequence[_Kind], target: float) -> Note:
        """One note, or two of different kinds on one sheet; of two, questions say which they mean."""
        self.only_named = self.settings.only_named or len(kinds) > 1
        texts, subjects = [], []
        for kind in kinds:
            self.kind = kind
            self.values = {name: self.draw(slot.value) for name, slot in kind.slots.items()}
            texts.append(self.note(self.settings.num_words[0] / len(kinds), target / len(kinds)))
            subjects += [self.values[slot].text for slot in kind.about]
        self.rng.shuffle(self.questions)
        count = min(self.rng.randint(*self.settings.num_unanswerable), len(self.unanswerable))
        questions = (*self.questions, *self.rng.sample(self.unanswerable, count))
        text = self.rng.choice(SEPARATORS).join(texts)
        return Note(text, tuple(kind.name for kind in kinds), self.facts, tuple(subjects), questions)

    def note(self, low: float, target: float) -> str:
        rng, kind, values = self.rng, self.kind, self.values
        told: dict[str, str] = {}  # slot → the sentence that tells it

        def fill(form: _Form) -> str:
            text = form.fill(values, self.write)
            for slot in form.slots:
                told.setdefault(slot, text)
            return text

        title = rng.choice(kind.titles)
        closing = rng.choice(kind.closings) if kind.closings and rng.random() < 0.6 else None
        top, bottom = fill(title), ""
        if closing and told.keys().isdisjoint(closing.slots - set(kind.about)):
            bottom = fill(closing)
        size = len(top.split()) + len(bottom.split())
        # What is left out can be asked for in vain.
        open_slots = [slot for slot in kind.slots if slot not in told]
        left_out = set(rng.sample(open_slots, min(rng.choice((0, 1, 1, 2, 3)), len(open_slots) // 2)))
        layout = rng.choice(kind.layouts)
        rows = ""
        if kind.rows and rng.random() < 0.8:
            rows = self.rows(kind.rows, layout, told, few=target < 80)
            size += len(rows.split())
        fields: list[str] = []
        if layout == "fields" or (layout != "chat" and rng.random() < 0.2):
            labelled = [slot for slot in open_slots if kind.slots[slot].labels and slot not in told.keys() | left_out]
            most = len(labelled) if layout == "fields" else min(3, len(labelled))
            style = rng.choice(FIELD_STYLES)
            for slot in rng.sample(labelled, rng.randint(min(2, most), most)):
                if size > target:
                    break
                fields.append(style.format(rng.choice(kind.slots[slot].labels), values[slot].text))
                told[slot] = fields[-1]
                size += len(fields[-1].split())
        body: list[tuple[int, str]] = []
        for place, form in rng.sample(list(enumerate(kind.frames)), len(kind.frames)):
            new = form.slots - set(kind.about)
            if new and new.isdisjoint(told.keys() | left_out) and size < target:
                body.append((place, fill(form)))
                size += len(body[-1][1].split())
        if rng.random() < 0.6:
            body.sort()
        sentences = [text for _, text in body]
        # Most notes hold a sentence or two that nobody would ask about; long ones more.
        most = min(target, size + 90)
        short, long = ([form for form in kind.register if (form.num_words > 12) == wanted] for wanted in (False, True))
        padding = rng.sample(long, min(len(long), rng.choice((0, 0, 1, 2)))) if size + 40 < target else []
        padding += rng.sample(short, min(len(short), rng.choice((0, 0, 1))))
        padding += rng.sample(kind.fillers, min(len(kind.fillers), rng.choice((0, 1, 1, 2, 3))))
        # A kind that has too little to tell for the least number of words gets all of these.
        rest = rng.sample([*kind.fillers, *kind.register], len(kind.fillers) + len(kind.register))
        for place, form in enumerate([*padding, *rest]):
            if size >= (max(most, low) if place < len(padding) else low):
                break
            if (sentence := form.fill(values, self.write)) not in sentences:
                sentences.insert(rng.randrange(len(sentences) + 1), sentence)
                size += form.num_words
        text = self.laid_out(layout, top, fields, sentences, rows, bottom)
        self.ask(told)
        return text

    def laid_out(self, layout: str, top: str, fields: list[str], sentences: list[str], rows: str, bottom: str) -> str:
        rng = self.rng
        if "\n" not in top and not top.endswith((".", ":", "!", "?")):
            top = rng.choice(TITLE_STYLES).format(top)
        match layout:
            case "chat":
                style, clock = rng.choice(CHAT_STYLES), rng.randrange(480, 1200)
                names = [self.values[slot].text for slot in self.kind.speakers]
                lines = []
                for sentence in sentences:
                    clock += rng.randint(0, 4)
                    when = f"{clock // 60:02}:{clock % 60:02}"
                    lines.append(style.format(name=rng.choice(names), text=sentence, clock=when))
                body = "\n".join(lines)
            case "lines":
                body = "\n".join(sentences)
            case "bullets":
                numbered, bullet = rng.random() < 0.25, rng.choice(BULLETS)
                body = "\n".join(
                    f"{i}. {text}" if numbered else bullet + text for i, text in enumerate(sentences, start=1)
                )
            case _:
                breaks = {rng.randrange(2, len(sentences)) for _ in range(len(sentences) // 4)}
                body = "".join(("\n\n" if i in breaks else " ") + text for i, text in enumerate(sentences)).strip()
        middle = ["\n".join(fields), body]
        middle.insert(rng.choice((1, 2, 2)) if sentences else 1, rows)
        return rng.choice(("\n\n", "\n\n", "\n")).join(part for part in (top, *middle, bottom) if part)

    def rows(self, rows: _Rows, layout: str, told: Mapping[str, str], *, few: bool) -> str:
        """Several things of one sort as a list, a table or sentences, with the questions about each."""
        rng = self.rng
        low, high = rows.many
        drawn = [
            {name: self.draw(slot.value) for name, slot in rows.slots.items()}
            for _ in range(low if few else rng.randint(low, high))
        ]
        form = rng.choice(rows.frames)
        names = [name for name in rows.slots if name in form.slots]  # not a set, whose order differs from run to run
        table = layout in ("fields", "lines", "bullets") and rng.random() < 0.2
        if table:
            names = list(rows.slots)
            edge = rng.choice(("| ", "", ""))
            between = " | " if edge else rng.choice(("; ", ", ", "\t"))
            line = lambda cells: edge + between.join(cells) + edge[::-1]  # noqa: E731
            lines = [line([row[name].text for name in names]) for row in drawn]
            heads = [line([slot.labels[0] for slot in rows.slots.values()])]
            heads += [line(["---"] * len(names))] if edge else []
        else:
            lines = [form.fill({**self.values, **row}, self.write) for row in drawn]
            heads = [rng.choice(rows.heads)] if rng.random() < 0.8 or not lines[0].endswith(".") else []
        for row, text in zip(drawn, lines, strict=True):
            self.ask_about_row(rows, row, text, names)
        other = {**row, rows.key: self.draw(rows.slots[rows.key].value)}
        self.ask_about_row(rows, other, "", names)
        if table:
            return "\n".join([*heads, *lines])
        if layout in ("prose", "chat") and lines[0].endswith("."):
            return " ".join([*heads, *lines])
        bullet = rng.choice((*BULLETS, ""))
        return "\n".join([*heads, *(bullet + text for text in lines)])

    def ask(self, told: Mapping[str, str]) -> None:
        about = set(self.kind.about)
        known = told.keys() | about
        for name, slot in self.kind.slots.items():
            if name in told:
                self.facts[f"{self.kind.name}.{name}"] = (self.values[name].text, told[name])
            forms = [f for f in slot.ask if f.slots <= known and (f.slots & about or not self.only_named)]
            self._ask(f"{self.kind.name}.{name}", slot, forms, self.values, self.values[name], answerable=name in told)

    def ask_about_row(self, rows: _Rows, row: Mapping[str, _Value], text: str, names: Iterable[str]) -> None:
        """Without a text: about a thing that the note does not list."""
        about = set(self.kind.about)
        values = {**self.values, **row}
        known = about | set(names)
        for name in names:
            slot = rows.slots[name]
            fact = f"{self.kind.name}.{name} of {row[rows.key].text}"
            forms = [f for f in slot.ask if f.slots <= known and (f.slots & about or not self.only_named)]
            if text:
                self.facts[fact] = (row[name].text, text)
                self._ask(fact, slot, forms, values, row[name], answerable=True)
            elif name != rows.key:
                self._ask(fact, slot, [f for f in forms if rows.key in f.slots], values, row[name], answerable=False)

    def _ask(
        self,
        fact: str,
        slot: _Slot,
        forms: Sequence[_Form],
        values: Mapping[str, _Value],
        value: _Value,
        *,
        answerable: bool,
    ) -> None:
        kind = _value_kind(slot.value)
        variants = [text for text in value.variants if text != value.text]
        if without := re.fullmatch(r"(?:[Aa]n?|[Tt]he) (.+)", value.text):
            variants.append(without[1])
        # Rows have many questions that are alike; they would outnumber the others.
        wordings = self.settings.num_wordings if answerable and values is self.values else 1
        for form in self.rng.sample(forms, min(len(forms), wordings)):
            question = form.fill(values)
            if not answerable:
                self.unanswerable.append(NoteQuestion(question, UNKNOWN, (), False, kind, fact))
            elif value.text.lower() not in question.lower():
                self.questions.append(
                    NoteQuestion(question, value.text, tuple(dict.fromkeys(variants)), True, kind, fact)
                )

    def _change(self, text: str) -> str:
        """Abbreviates words or, rarely, mistypes one; the values stay as they are."""
        if self.terse:
            text = _abbreviations().sub(lambda found: _data("notes.yaml")["abbreviations"][found[0]], text)
        words = list(re.finditer(r"\b[a-z]{5,}\b", text)) if self.typos and self.rng.random() < 0.25 else []
        if words:
            word = self.rng.choice(words)
            i = word.start() + self.rng.randrange(1, len(word[0]) - 2)
            text = text[:i] + text[i + 1] + text[i] + text[i + 2 :]
        return text


@cache
def _abbreviations() -> re.Pattern[str]:
    return re.compile(rf"\b({'|'.join(_data('notes.yaml')['abbreviations'])})\b")


@cache
def _parts(template: str) -> tuple[str, ...]:
    """Text and, at odd places, what stands in braces."""
    return tuple(re.split(r"\{([^{}]+)\}", template))


@cache
def _parsed(atom: str) -> tuple[str, Any]:
    words = _data("notes_words.yaml")
    if atom in ("@", "person", "first", "last"):
        return atom, None
    if "|" in atom:
        return "choice", tuple(atom.split("|"))
    numbers = r"(-?\d+)(?:-|\.\.)(-?\d+)(?:/(\d+))?"
    if found := re.fullmatch(rf"(?:(few|number|decimal|date|time|money) )?{numbers}", atom):
        name, low, high, step = found.groups()
        width = len(low) if low.startswith("0") and len(low) > 1 else 0
        return name or "range", (int(low), int(high), int(step or 1), width)
    if atom not in words["values"]:
        raise AssertionError(f"notes_words.yaml has no values {atom!r}")
    return "values", atom


@cache
def _pool(name: str, split: str) -> tuple[str, ...]:
    words = _data("notes_words.yaml")
    texts = tuple(words["values"][name])
    own = name in words["own"]
    return tuple(text for text in texts if not own or "{" in text or _split_of(text) == split)


@cache
def _people(split: str) -> tuple[list[list[str]], list[list[str]]]:
    """Given names and family names of this split by area of language."""
    areas = [
        [[name.replace("_", " ") for name in names[which].split() if _split_of(name) == split] for names in people]
        for people in [_data("notes_words.yaml")["people"].values()]
        for which in ("first", "last")
    ]
    both = [(first, last) for first, last in zip(*areas, strict=True) if first and last]
    return [first for first, _ in both], [last for _, last in both]


def _split_of(text: str) -> str:
    bucket = zlib.crc32(text.encode()) % 20
    return "test" if bucket < 3 else "validation" if bucket < 5 else "train"


@cache
def _value_kind(template: str) -> str:
    atoms = _parts(template)[1::2]
    name, rest = _parsed(atoms[0])
    name = {"values": rest, "first": "person", "range": "number", "few": "number", "decimal": "number"}.get(name, name)
    alone = template == f"{{{atoms[0]}}}" or (len(atoms) == 1 and name in ("number", "person"))
    return name if alone and name not in ("choice", "@") else "text"
