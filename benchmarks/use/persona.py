"""Can a hypernetwork write a personality? `python -m benchmarks.use.persona`

A character has two traits, each with a sign, and a sheet of statements that it would say and never would. From the same
sheet a persona is made by training on its lines (SFT, DPO), by a vector, by the sheet in the prompt, and by one forward
pass of a hypernetwork that was trained on characters of other traits. Asked is of statements that no method saw whether
the character would say them; a figure is log p(answer in character) - log p(other answer), minus the base model's.

Every method tries as many settings for each character and takes the one with the best log-likelihood of the two answers
on other held-out statements, among those that leave the real-world facts there are to choose by as they were.

kind          one row for
base          a seed: the base model
arm           an arm and a character
seen          a seed: the hypernetwork on held-out statements of the traits that it was trained on
told          a way to say facts and persona, alone and together
swapped       a seed: whether the base model is the same to the bit after personas came and went
vaccination   see `benchmarks.use.persona_vaccination`
"""

import json
import math
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import hydra

from benchmarks.forgetting.sweep import Cell, run_cells
from benchmarks.measuring.rows import Row, show_and_write
from hypernet.cli.scripts import Script, plain
from hypernet.cli.settings import AtLeast0, Count, Number, OutputFile, OutputFolder, Settings, Text

# Part → the searches that its rows depend on.
PARTS = {
    **{
        "written": ("hypernetwork", "perceiver"),
        "trained": ("sft", "dpo"),
        "steered": ("vector",),
        "prompted": ("prompt",),
        "shipped": (),
    },
    **{"composed": ("hypernetwork", "dpo"), "vaccination": ()},
}

# The hypernetworks by the names of their searches.
WRITERS = {"hypernetwork": "hypernetwork", "perceiver": "hypernetwork, Perceiver"}


class PersonaSettings(Settings):
    checkpoint: Text
    traits_folder: Text
    seeds: list[Number]
    parts: list[Text]
    characters: dict[str, dict[str, int]]
    other_traits: list[Text]
    statements: Count
    sheet: Count
    choice: Count
    test: Count
    max_lost: AtLeast0
    searches: dict[str, list[dict[str, Any]]]
    rank: Count
    protected: Number
    weight: AtLeast0
    batch_lines: Count
    batch_characters: Count
    num_facts: Number
    vaccination: dict[str, Any]
    readings: OutputFolder
    cells: OutputFolder
    output: OutputFile | None


SCRIPT = Script("benchmarks.use.persona", PersonaSettings)


def traits_of(settings: Mapping[str, Any]) -> tuple[Any, list[str]]:
    """The `Traits` of these settings, and the names of those of characters and hypernetworks."""
    from benchmarks.use.persona_data import Traits

    sizes = {key: settings[key] for key in ("sheet", "choice", "test")}
    traits = Traits(Path(settings["traits_folder"]), settings["statements"], **sizes)
    own = [trait for signs in settings["characters"].values() for trait in signs]
    return traits, list(dict.fromkeys([*own, *settings["other_traits"]]))


def check_traits(settings: Mapping[str, Any]) -> None:
    """Raises ValueError: a file of statements is missing, or has too few of them."""
    traits, names = traits_of(settings)
    for name in (*names, *settings["vaccination"]["traits"]):
        traits.statements(name)


class World:
    """What one seed draws, and what the base model has read of it."""

    def __init__(self, settings: Mapping[str, Any], seed: int) -> None:
        from benchmarks.measuring.measure import load_model
        from benchmarks.use.persona_data import ReadPool, characters
        from hypernet.consolidation.persona.last_block import LastBlock

        self.settings, self.seed = settings, seed
        self.model = load_model(settings["checkpoint"], "cpu").eval().requires_grad_(False)
        self.model.injector.clear()
        self.block = LastBlock(self.model)
        self.traits, names = traits_of(settings)
        self.signs: dict[str, dict[str, int]] = settings["characters"]
        self.names = list(self.signs)
        self.others = list(settings["other_traits"])
        self.pool = ReadPool.of_traits(self.block, self.traits, names, folder=settings["readings"])
        self.characters = characters(self.signs, self.traits, seed=seed)

    def rows(self, name: str, part: str) -> tuple[list[int], Any]:
        """Rows of the pool of a character's sheet, choice or test, and whether it would say each: 1 or -1."""
        import torch

        rows, signs = [], []
        for trait, sign in self.signs[name].items():
            rows += (found := self.pool.rows(trait, getattr(self.traits.split(trait, seed=self.seed), part)))
            signs += [sign * float(self.pool.says[row]) for row in found]
        return rows, torch.tensor(signs)

    def statements(self, name: str, part: str) -> list[str]:
        split = {trait: self.traits.split(trait, seed=self.seed) for trait in self.signs[name]}
        return [self.traits.statements(t)[place].text for t, parts in split.items() for place in getattr(parts, part)]

    def shared(self, inputs: Any) -> Any:
        """What personas leave alone: the mean of these inputs, and where those of other answers lie."""
        from hypernet.consolidation.persona.last_block import Shared

        others = self.other_text
        return Shared.of(inputs, None if others is None else others.inputs, number=self.settings["protected"])

    @cached_property
    def facts(self) -> dict[str, tuple[list[tuple[str, str]], Any, list[int]]]:
        """Part → questions with what the base model says up to the end of the right answer; what it reads of them; and
        how many tokens come before the right answer, which say how a sentence begins and do not count."""
        from benchmarks.use.persona_data import read_once

        known = list(self._said[True])
        # Read in packed rows, bfloat16 rounds otherwise than where they were generated: two of 73 are not said then.
        if known:
            asked = [(question, text) for question, text, _ in known]
            since = self.block.answer_tokens([text[:start].rstrip() for _, text, start in known])
            right = self.block.rightly(read_once(self.block, asked, folder=self.settings["readings"]), since=since)
            known = [one for one, is_right in zip(known, right, strict=True) if is_right]
        random.Random(f"facts/{self.seed}").shuffle(known)
        found = {}
        for part, told in {"choice": known[::2], "test": known[1::2]}.items():
            own = [(question, text) for question, text, _ in told]
            since = self.block.answer_tokens([text[:start].rstrip() for _, text, start in told])
            found[part] = (own, read_once(self.block, own, folder=self.settings["readings"]) if own else None, since)
        return found

    @cached_property
    def other_text(self) -> Any:
        """Of every token of what the base model says to such questions that it answers wrongly; none is measured. None:
        it answers all rightly."""
        from benchmarks.use.persona_data import read_once

        asked = [(question, text) for question, text, _ in self._said[False]]
        return read_once(self.block, asked, folder=self.settings["readings"]) if asked else None

    @cached_property
    def _said(self) -> dict[bool, list[tuple[str, str, int]]]:
        """Whether it holds the truth → questions, what the base model says (of what is true up to the end of the
        truth), and where that begins."""
        from benchmarks.measuring.metrics import contains
        from benchmarks.use.persona_data import said_once
        from hypernet.data.encyclopedia import background_facts, background_questions

        groups = {group for group, _, _ in background_facts()}
        asked = list({one.answer: one for one in background_questions() if one.group in groups}.values())
        found: dict[bool, list[tuple[str, str, int]]] = {True: [], False: []}
        texts = said_once(self.model, [one.text for one in asked], folder=self.settings["readings"])
        for one, text in zip(asked, texts, strict=True):
            start = text.casefold().find(one.answer.casefold())
            right = bool(contains(text, (one.answer,))) and start >= 0
            if text:
                found[right].append((one.text, text[: start + len(one.answer)] if right else text, start))
        return found

    @cached_property
    def before(self) -> dict[str, tuple[Any, list[float]]]:
        """The base model's log-odds of each character's test statements, and what it says."""
        return {name: (Arm(self).odds(name, "test"), Arm(self).said(name)) for name in self.names}

    @cached_property
    def spoken(self) -> dict[str, Any]:
        """Trait → what the base model reads of its test statements as answers."""
        from benchmarks.use.persona_data import read_once

        found = {}
        for trait in dict.fromkeys(trait for signs in self.signs.values() for trait in signs):
            statements = self.traits.statements(trait)
            places = self.traits.split(trait, seed=self.seed).test
            asked = [(SPEAK, f"{statements[place].text}.") for place in places]
            found[trait] = read_once(self.block, asked, folder=self.settings["readings"])
        return found


SPEAK = "Say something that is true of you."


@dataclass(frozen=True)
class Arm:
    """A way to be the character.

    lora: of the last block. around: what the base model reads inside. document: what stands before the prompt.
    """

    world: World
    lora: Any = None
    around: Callable[[], AbstractContextManager[Any]] | None = None
    document: str | None = None

    def odds(self, name: str, part: str) -> Any:
        """Of each statement log p(in character) - log p(other)."""
        import torch

        rows, signs = self.world.rows(name, part)
        chosen, other = self.world.pool.read(rows, signs)
        if self.around is not None or self.document is not None:
            from benchmarks.use.persona_data import answer_places
            from hypernet.consolidation.persona.character import YES, SheetStatement

            asked = [(SheetStatement(text, True).line.prompt, YES) for text in self.world.statements(name, part)]
            read = self._live(asked)
            where = answer_places(read, self.world.pool.place)
            chosen = chosen._replace(inputs=read.inputs[where], residual=read.residual[where])
        with torch.no_grad():
            return self.world.block.log_odds(chosen, other.targets, self.lora)

    def kept(self, part: str) -> list[float]:
        """Of each fact that the base model says whether it still goes on with it, behind its own words before it."""
        asked, read, since = self.world.facts[part]
        if not asked:
            return []
        if self.around is not None or self.document is not None:
            read = self._live(asked)
        return [float(one) for one in self.world.block.rightly(read, self.lora, since=since)]

    def said(self, name: str) -> list[float]:
        """Of each pair of a test statement in character and another one, log p a token of the first minus the second's,
        as answers to `SPEAK`."""
        import torch

        found: list[float] = []
        for trait, sign in self.world.signs[name].items():
            read = self.world.spoken[trait]
            if self.around is not None or self.document is not None:
                statements = self.world.traits.statements(trait)
                places = self.world.traits.split(trait, seed=self.world.seed).test
                read = self._live([(SPEAK, f"{statements[place].text}.") for place in places])
            with torch.no_grad():
                each = self.world.block.log_p(read, self.lora) / torch.bincount(read.row)
            half = len(each) // 2  # the first ones are said by somebody with the trait
            found += (sign * (each[:half] - each[half:])).tolist()
        return found

    def _live(self, asked: Sequence[tuple[str, str]]) -> Any:
        documents = None if self.document is None else [self.document] * len(asked)
        with (self.around or nullcontext)():
            return self.world.block.read(asked, documents)


@dataclass(frozen=True)
class Chosen:
    """The setting that was taken, of how many, and its arm."""

    arm: Arm
    setting: Mapping[str, Any]
    tried: int
    seconds: float


def choose(world: World, name: str, candidates: Sequence[tuple[Mapping[str, Any], Callable[[], Arm]]]) -> Chosen:
    """By the mean log σ(log-odds) on the statements to choose by; whoever loses more facts than allowed comes last."""
    import torch

    started, best, found = time.process_time(), (-math.inf, -math.inf), None
    for setting, make in candidates:
        arm = make()
        likely = float(torch.nn.functional.logsigmoid(arm.odds(name, "choice")).mean())
        kept = _mean(arm.kept("choice") or [1.0])
        place = (0.0 if kept >= 1 - world.settings["max_lost"] else kept - 1, likely)
        if found is None or place > best:
            best, found = place, (arm, setting)
    assert found is not None
    return Chosen(*found, len(candidates), time.process_time() - started)


def arm_row(world: World, name: str, arm: str, chosen: Chosen | Arm) -> Row:
    own = chosen.arm if isinstance(chosen, Chosen) else chosen
    odds, (before, said_before) = own.odds(name, "test"), world.before[name]
    changes, kept = (odds - before).tolist(), own.kept("test")
    said = [a - b for a, b in zip(own.said(name), said_before, strict=True)]
    taken: Row = {}
    if isinstance(chosen, Chosen):
        taken = {"setting": json.dumps(dict(chosen.setting)), "tried": chosen.tried, "seconds": chosen.seconds}
    return {
        **{"kind": "arm", "arm": arm, "character": name, "log_odds": _mean(changes)},
        **{"in_character": _mean([float(one > 0) for one in odds]), "said": _mean(said)},
        **{"facts": _mean(kept or [1.0]), **taken},
        "items": {
            "log_odds": [round(one, 3) for one in changes],
            **{"in_character": [int(one > 0) for one in odds], "facts": [int(one) for one in kept]},
            "said": [round(one, 3) for one in said],
        },
    }


def measure_cell(cell: Cell) -> list[Row]:
    """All rows of one part at one seed."""
    import torch

    torch.set_num_threads(1)
    torch.manual_seed(cell.seed)
    if cell.method == "vaccination":
        from benchmarks.use.persona_vaccination import vaccinated

        return list(vaccinated(World(cell.settings, cell.seed)))
    ways = {
        "written": _written,
        "trained": _trained,
        "steered": _steered,
        "prompted": _prompted,
        "shipped": _shipped,
        "composed": _composed,
    }
    return list(ways[cell.method](World(cell.settings, cell.seed)))


# Personas in weights


def trained(world: World, name: str, setting: Mapping[str, Any]) -> Arm:
    """A LoRA that was trained on the sheet's lines; `beta` makes it DPO."""
    from hypernet.consolidation.persona.training import PersonaTraining
    from hypernet.consolidation.self_instruct.preference import Preference

    beta = setting.get("beta")
    preference = None if beta is None else Preference(beta=beta)
    settings = {key: setting[key] for key in ("lr", "steps")}
    kept = {"rank": world.settings["rank"], "batch_size": world.settings["batch_lines"], "seed": world.seed}
    kept["weight"] = world.settings["weight"]
    training = PersonaTraining(preference=preference, **kept, **settings)
    read = world.pool.read(*world.rows(name, "sheet"))
    return Arm(world, training.train(world.block, read, shared=world.shared(read[0].inputs), others=world.other_text))


def written_by(world: World, name: str, writer: Any, setting: Mapping[str, Any]) -> Arm:
    """The hypernetwork's LoRA of a sheet, in one forward pass, times a scale."""
    import torch

    from hypernet.consolidation.persona.last_block import Factors

    rows, signs = world.rows(name, "sheet")
    with torch.no_grad():
        lora = writer(world.pool.inputs[rows][None], signs[None])
    return Arm(world, Factors(lora.A[0], setting.get("scale", 1.0) * lora.B[0]))


def train_writer(world: World, setting: Mapping[str, Any]) -> Any:
    """On characters of two of the other traits, with random signs: sheets of their statements, other ones asked."""
    import torch

    from hypernet.consolidation.persona.training import OTHER_TOKENS
    from hypernet.consolidation.persona.writer import CharacterWriter

    others, pool, rng = world.other_text, world.pool, random.Random(f"writer/{world.seed}")
    shared = world.shared(pool.inputs[[row for trait in world.others for row in pool.of[trait]]])
    given = {key: setting[key] for key in ("kind", "ridge") if key in setting}
    pair = torch.tensor([pool.yes]), torch.tensor([pool.no])
    size = float(pool.residual.square().mean().sqrt())
    answers = size * world.block.answer_directions(*pair, rank=1)
    writer = CharacterWriter(world.block, shared, answers, rank=world.settings["rank"], seed=world.seed, **given)
    optimizer = torch.optim.AdamW(writer.parameters(), lr=setting["lr"], betas=(0.9, 0.95), weight_decay=0.01)
    for step in range(setting["steps"]):
        for group in optimizer.param_groups:
            share = 0.5 + 0.5 * math.cos(math.pi * step / setting["steps"])
            group["lr"] = setting["lr"] * min(1.0, (step + 1) / 20) * share
        sheets, marks, asked, signs = draw_characters(world, rng, "train", world.settings["batch_characters"])
        chosen, other = pool.read(asked, signs)
        lora = writer(pool.inputs[sheets], marks)
        loss = -torch.nn.functional.logsigmoid(world.block.log_odds(chosen, other.targets, lora)).mean()
        if others is not None:
            tokens = rng.sample(range(len(others.inputs)), min(OTHER_TOKENS, len(others.inputs)))
            loss = loss + world.settings["weight"] * world.block.moved(world.block.some(others, tokens), lora)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return writer.eval()


def draw_characters(world: World, rng: random.Random, part: str, number: int) -> tuple[Any, Any, list[int], Any]:
    """Sheets' rows and marks [C, T], rows that are asked and their signs, of characters of two of the other traits.

    Args:
        part: "train": sheets and questions from all but the test statements; "test": questions from these.
    """
    import torch

    sheets, asked = list[tuple[int, float]](), list[tuple[int, float]]()
    for _ in range(number):
        for trait in rng.sample(world.others, min(2, len(world.others))):
            sign, places = rng.choice((-1.0, 1.0)), world.traits.split(trait, seed=world.seed)
            held = set(places.test)
            rows = {True: list[int](), False: list[int]()}
            for place, row in enumerate(world.pool.of[trait]):
                if place not in held:
                    rows[bool(world.pool.says[row] > 0)].append(row)
            size = world.traits.sheet // 2
            drawn = {says: rng.sample(own, min(2 * size, len(own))) for says, own in rows.items()}
            for says, own in drawn.items():
                mark = sign if says else -sign
                sheets += [(row, mark) for row in own[:size]]
                asked += [(row, mark) for row in own[size:]] if part == "train" else []
            if part == "test":
                asked += [(row, sign * float(world.pool.says[row])) for row in world.pool.rows(trait, places.test)]
    marks, signs = (torch.tensor([mark for _, mark in each]) for each in (sheets, asked))
    rows_of_sheets = torch.tensor([row for row, _ in sheets]).view(number, -1)
    return rows_of_sheets, marks.view(number, -1), [row for row, _ in asked], signs


def _written(world: World) -> Iterator[Row]:
    import torch

    searches, odds = world.settings["searches"], {name: before for name, (before, _) in world.before.items()}
    yield {
        **{"kind": "base", "facts_known": {part: len(asked) for part, (asked, *_) in world.facts.items()}},
        "in_character": _mean([float(one > 0) for own in odds.values() for one in own]),
        "log_odds": _mean([float(one) for own in odds.values() for one in own]),
    }
    started = time.process_time()
    made_of: dict[str, Any] = {}
    writers: dict[str, list[tuple[Mapping[str, Any], Any]]] = {kind: [] for kind in WRITERS}
    for kind in WRITERS:
        for setting in searches[kind]:
            key = json.dumps({**setting, "scale": None})  # scales of one network
            made_of[key] = made_of[key] if key in made_of else train_writer(world, setting)
            writers[kind].append((setting, made_of[key]))
    seconds = time.process_time() - started
    found: dict[str, dict[str, Chosen]] = {arm: {} for arm in WRITERS.values()}
    for name in world.names:
        for kind, arm in WRITERS.items():
            made = [(setting, _once(written_by, world, name, writer, setting)) for setting, writer in writers[kind]]
            found[arm][name] = choose(world, name, made)
    yield from _with_others(world, found)
    # Of traits that it was trained on, other statements.
    name = world.names[0]
    setting = found["hypernetwork"][name].setting
    writer = next(one for own, one in writers["hypernetwork"] if own is setting)
    drawn = draw_characters(world, random.Random(f"seen/{world.seed}"), "test", 8)
    chosen, other_read = world.pool.read(drawn[2], drawn[3])
    with torch.no_grad():
        after = world.block.log_odds(chosen, other_read.targets, writer(world.pool.inputs[drawn[0]], drawn[1]))
        before = world.block.log_odds(chosen, other_read.targets)
    yield {
        **{"kind": "seen", "log_odds": float((after - before).mean()), "training_s": seconds},
        **{"in_character": float((after > 0).float().mean()), "networks": len(made_of)},
        "items": {
            "log_odds": [round(one, 3) for one in (after - before).tolist()],
            "in_character": (after > 0).int().tolist(),
        },
    }


def _trained(world: World) -> Iterator[Row]:
    found: dict[str, dict[str, Chosen]] = {"SFT": {}, "DPO": {}}
    for arm, own in found.items():
        for name in world.names:
            settings = world.settings["searches"][arm.lower()]
            own[name] = choose(world, name, [(one, _once(trained, world, name, one)) for one in settings])
    yield from _with_others(world, found)


def _with_others(world: World, found: Mapping[str, Mapping[str, Chosen]]) -> Iterator[Row]:
    """Each arm, and the next character's by the same arm, who shares no trait."""
    for arm, of in found.items():
        for place, name in enumerate(world.names):
            yield arm_row(world, name, arm, of[name])
            other = of[world.names[(place + 1) % len(world.names)]].arm
            yield arm_row(world, name, f"another character's, {arm}", other)


def _once(make: Callable[..., Arm], *given: Any) -> Callable[[], Arm]:
    return lambda: make(*given)


# Personas outside of weights


def _steered(world: World) -> Iterator[Row]:
    from hypernet.consolidation.persona.vector import PersonaVector

    for name in world.names:
        character, vectors = world.characters[name], {}
        own, others = ([(SPEAK, f"{text}.") for text in told] for told in (character.says, character.never))
        tries = []
        for setting in world.settings["searches"]["vector"]:
            layer = setting["layer"]
            if layer not in vectors:
                vectors[layer] = PersonaVector.of_answers(world.model, own, others, layer=layer)
            tries.append((setting, _once(_steering, world, vectors[layer], setting["alpha"])))
        chosen = choose(world, name, tries)
        yield arm_row(world, name, "vector", chosen)
        vector = vectors[chosen.setting["layer"]].random(seed=world.seed)
        yield arm_row(world, name, "random vector", _steering(world, vector, chosen.setting["alpha"]))


def _steering(world: World, vector: Any, alpha: float) -> Arm:
    return Arm(world, around=lambda: vector.steering(alpha))


def _prompted(world: World) -> Iterator[Row]:
    from hypernet.consolidation.persona.character import SHEETS

    for name in world.names:
        tries = [
            (setting, _once(_with_sheet, world, world.characters[name].sheet(SHEETS[setting["form"]])))
            for setting in world.settings["searches"]["prompt"]
        ]
        yield arm_row(world, name, "sheet in the prompt", choose(world, name, tries))


def _with_sheet(world: World, sheet: str) -> Arm:
    return Arm(world, document=sheet)


def _shipped(world: World) -> Iterator[Row]:
    """The checkpoint's own hypernetwork, which was trained to recite: statements as a document."""
    if not hasattr(world.model, "internalize"):
        return
    for name in world.names:
        document = " ".join(f"{text}." for text in world.characters[name].says)
        odds, before = (whole_odds(world, name, given) for given in (world.model.internalize(document), None))
        changes = [after - first for after, first in zip(odds, before, strict=True)]
        yield {
            **{"kind": "arm", "arm": "shipped hypernetwork", "character": name, "log_odds": _mean(changes)},
            **{"in_character": _mean([float(one > 0) for one in odds]), "said": None, "facts": None},
            "items": {
                "log_odds": [round(one, 3) for one in changes],
                "in_character": [int(one > 0) for one in odds],
            },
        }


def whole_odds(world: World, name: str, adapter: Any) -> list[float]:
    """As `Arm.odds`, of every second test statement, asked of the whole model with an adapter of documents."""
    from hypernet.consolidation.persona.character import NO, YES, SheetStatement

    questions = [SheetStatement(text, True).line.prompt for text in world.statements(name, "test")[::2]]
    yes, no = (world.model.log_likelihoods(questions, [word] * len(questions), adapter) for word in (YES, NO))
    signs = world.rows(name, "test")[1][::2].tolist()
    return [sign * (a - b) for sign, a, b in zip(signs, yes, no, strict=True)]


def _composed(world: World) -> Iterator[Row]:
    """A document's facts and a persona, alone and together; and what is left afterwards."""
    import torch

    from benchmarks.forgetting.protocol import new_facts
    from benchmarks.measuring.metrics import contains
    from hypernet.base.base_model import fingerprint

    first, second = world.names[:2]
    model, searches = world.model, world.settings["searches"]
    # The second setting of each: none is chosen here.
    dpo, written = (searches[key][min(1, len(searches[key]) - 1)] for key in ("dpo", "hypernetwork"))
    personas = {
        "DPO": trained(world, first, dpo).lora,
        "hypernetwork": written_by(world, first, train_writer(world, written), written).lora,
    }
    probe = torch.tensor(model.layout.prompt_ids(model.tokenizer, ["Where do you live?"]))
    hashed, logits = fingerprint(model.base_model), model.base_model(probe).logits
    told = new_facts(world.seed, world.settings["num_facts"])
    facts = model.internalize([one.text for one in told]) if told else None
    injector = world.block.injector()
    try:
        for way, lora in {"none": None, **personas}.items():
            adapter = None if lora is None else world.block.adapter(lora, name=first)
            for document in (None, facts):
                with injector.using(adapter):
                    odds = whole_odds(world, first, document)
                    questions = [one.asked for one in told]
                    answers = model.generate(questions, document, max_new_tokens=24) if told else []
                right = [float(contains(a, (one.answer,))) for a, one in zip(answers, told, strict=True)]
                yield {
                    **{"kind": "told", "persona": way, "document": document is not None},
                    **{"log_odds": _mean(odds), "answered": _mean(right or [0.0])},
                    "items": {"log_odds": [round(one, 3) for one in odds], "answered": [int(one) for one in right]},
                }
        both = [world.block.adapter(lora, name=first) for lora in personas.values()]
        seen = []
        for adapter in (*both, None, *both):
            with injector.using(adapter):
                seen.append(model.base_model(probe).logits)
        pooled = Arm(world, personas["DPO"]).odds(first, "test")
        with injector.using(both[0]):
            live = Arm(world, around=nullcontext).odds(first, "test")
    finally:
        injector.remove()
    yield {
        **{"kind": "swapped", "other_character": second},
        "weights_equal": fingerprint(model.base_model) == hashed,
        "logits_equal": torch.equal(model.base_model(probe).logits, logits) and torch.equal(seen[2], logits),
        "again_equal": torch.equal(seen[0], seen[3]) and torch.equal(seen[1], seen[4]),
        "changed": not torch.equal(seen[0], logits) and not torch.equal(seen[0], seen[1]),
        "formula_error": float((pooled - live).abs().max()),
    }


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def rows(cfg: PersonaSettings) -> Iterator[Row]:
    """All rows, part by part."""
    if unknown := sorted(set(cfg.parts) - set(PARTS)):
        raise ValueError(f"{unknown[0]!r} is no part. Choose of {', '.join(PARTS)}.")
    settings = cfg.model_dump(exclude={"seeds", "parts", "cells", "output"})
    cells = []
    for part in cfg.parts:
        searches = {name: settings["searches"][name] for name in PARTS[part]}
        own = {**settings, "searches": searches}
        if part != "vaccination":
            own.pop("vaccination")
        cells += [Cell("persona", part, seed, own) for seed in cfg.seeds]
    return run_cells(cells, measure_cell, folder=cfg.cells, workers=1)


@hydra.main(config_path="../../conf", config_name="use_persona", version_base="1.3")
def main(cfg: Any) -> None:
    with SCRIPT.errors():
        settings = SCRIPT.check(cfg)
        check_traits(settings.model_dump())
        show_and_write(rows(settings), settings.output, config=plain(cfg), quiet=("items",))


if __name__ == "__main__":
    SCRIPT.run(main, Path(__file__).parents[2] / "conf/use_persona.yaml")
