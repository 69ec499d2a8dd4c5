"""Statements of traits for benchmarks.use.persona: split by their hashes, read by the base model once, kept on disk.

traits = Traits(folder, number=240)
traits.split("extraversion", seed=0)                     # Parts: sheet, choice, test, by whether one with it says so
pool = ReadPool.of_traits(block, traits, names, folder="outputs")    # what the LoRA works on, of every statement

The statements are those of Perez et al. 2022, https://arxiv.org/abs/2212.09251 (CC BY 4.0); no sentence of them is part
of this project.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Self

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from hypernet.consolidation.persona.character import NO, YES, Character, SheetStatement
from hypernet.consolidation.persona.last_block import LastBlock
from hypernet.consolidation.private.gradients import Reading
from hypernet.doc_to_lora import DocToLoRA
from hypernet.io.files import replaced


class Parts(NamedTuple):
    """Numbers of a trait's statements: half of each part would be said by somebody with the trait."""

    sheet: list[int]
    choice: list[int]
    test: list[int]


@dataclass(frozen=True)
class Traits:
    """Statements of each trait, as many that one with it says as others.

    Args:
        folder: of <trait>.jsonl files with statement and answer_matching_behavior, such as data/persona_evals.
        number: of statements of each trait.
        sheet, choice: of them in a sheet, and to choose a setting by; test: to measure.
    """

    folder: Path
    number: int
    sheet: int
    choice: int
    test: int

    def statements(self, trait: str) -> list[SheetStatement]:
        """Raises ValueError where the file is missing, or has too few statements."""
        path = self.folder / f"{trait}.jsonl"
        if not path.is_file():
            raise ValueError(f"There is no {path}. Set traits_folder to the folder with the traits' statements.")
        half, found = self.number // 2, {True: dict[str, None](), False: dict[str, None]()}
        for line in path.read_text(encoding="utf-8").splitlines():
            fields = json.loads(line)
            found[fields["answer_matching_behavior"].strip() == YES].setdefault(fields["statement"].strip(" ."))
        chosen = [
            SheetStatement(text, says) for says, texts in found.items() for text in sorted(texts, key=_hash)[:half]
        ]
        if len(chosen) < 2 * half or self.sheet + self.choice + self.test > 2 * half:
            raise ValueError(
                f"{path} has {len(chosen)} of {self.number} statements, of which sheet, choice and test want "
                f"{self.sheet + self.choice + self.test}. Take fewer."
            )
        return chosen

    def split(self, trait: str, *, seed: int) -> Parts:
        statements, parts = self.statements(trait), Parts([], [], [])
        for says in (True, False):
            own = [place for place, one in enumerate(statements) if one.says == says]
            own.sort(key=lambda place: _hash(f"{seed}/{statements[place].text}"))
            start = 0
            for part, size in zip(parts, (self.sheet, self.choice, self.test), strict=True):
                part += own[start : start + size // 2]
                start += size // 2
        return parts


def characters(named: Mapping[str, Mapping[str, int]], traits: Traits, *, seed: int) -> dict[str, Character]:
    """Their sheets, of name → trait → 1: has it, -1: has the opposite."""
    found = {}
    for name, signs in named.items():
        told: dict[bool, list[str]] = {True: [], False: []}
        for trait, sign in signs.items():
            statements = traits.statements(trait)
            for place in traits.split(trait, seed=seed).sheet:
                told[statements[place].says == (sign > 0)].append(statements[place].text)
        found[name] = Character(name, tuple(told[True]), tuple(told[False]))
    return found


@dataclass(frozen=True)
class ReadPool:
    """inputs [N, d_in], residual [N, D] where the answer is told; says [N]: 1 or -1; of: trait → its rows.

    yes, no: the tokens that are told apart at this place of an answer.
    """

    inputs: Tensor
    residual: Tensor
    says: Tensor
    of: Mapping[str, range]
    yes: int
    no: int
    place: int

    @classmethod
    def of_traits(cls, block: LastBlock, traits: Traits, names: Sequence[str], *, folder: str | Path) -> Self:
        """Reads what no file of the folder has."""
        tensors, places, start = [], {}, 0
        place, yes, no = block.told_apart(YES, NO)
        for name in names:
            statements = traits.statements(name)
            identity = _hash(json.dumps([block.model.base_model_fingerprint, statements, block.place.path]))[:16]
            path = Path(folder) / f"{name}-{identity}.safetensors"
            if not path.is_file():
                block.model.injector.clear()
                read = block.read([(one.line.prompt, YES) for one in statements])
                where = answer_places(read, place)
                _save(path, {"inputs": read.inputs[where], "residual": read.residual[where]})
            tensors.append(load_file(path))
            places[name] = range(start, start + len(statements))
            start += len(statements)
        says = [1.0 if one.says else -1.0 for name in names for one in traits.statements(name)]
        inputs, residual = (torch.cat([one[key] for one in tensors]) for key in ("inputs", "residual"))
        return cls(inputs, residual, torch.tensor(says), places, yes, no, place)

    def rows(self, trait: str, places: Sequence[int]) -> list[int]:
        """Rows of a trait's statements."""
        return [self.of[trait][place] for place in places]

    def read(self, rows: Sequence[int], signs: Tensor) -> tuple[Reading, Reading]:
        """Answers in character and the others of these rows; signs [rows]: 1 of a statement that the character says."""
        where = torch.tensor(rows)
        targets = torch.where(signs > 0, self.yes, self.no), torch.where(signs > 0, self.no, self.yes)
        chosen, other = (
            Reading(self.inputs[where], self.residual[where], one, torch.arange(len(rows))) for one in targets
        )
        return chosen, other


def read_once(block: LastBlock, asked: Sequence[tuple[str, str]], *, folder: str | Path, chat: bool = True) -> Reading:
    """What the base model reads of these, from the folder where it did before."""
    identity = _hash(json.dumps([block.model.base_model_fingerprint, list(asked), chat, block.place.path]))[:16]
    path = Path(folder) / f"asked-{identity}.safetensors"
    if not path.is_file():
        block.model.injector.clear()
        _save(path, block.read(asked, chat=chat)._asdict())
    return Reading(**load_file(path))


def said_once(model: DocToLoRA, questions: Sequence[str], *, folder: str | Path) -> list[str]:
    """What the base model answers, from the folder where it did before."""
    identity = _hash(json.dumps([model.base_model_fingerprint, list(questions)]))[:16]
    path = Path(folder) / f"said-{identity}.json"
    if not path.is_file():
        found: list[str] = []
        for start in range(0, len(questions), 32):
            found += model.generate(list(questions[start : start + 32]), max_new_tokens=16)
        path.parent.mkdir(parents=True, exist_ok=True)
        with replaced(path) as temporary:
            temporary.write_text(json.dumps(found), encoding="utf-8")
    said: list[str] = json.loads(path.read_bytes())
    return said


def _save(path: Path, tensors: Mapping[str, Tensor]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with replaced(path) as temporary:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary)


def answer_places(read: Reading, place: int) -> list[int]:
    """Where each row's answer has its token of this number."""
    return [int((read.row == row).nonzero()[place]) for row in range(read.num_rows)]


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
