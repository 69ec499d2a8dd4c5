"""Character: what somebody would say and would never say, and what of it a persona is trained on.

character = Character("ada", says=("I like long walks",), never=("I avoid all exercise",))
character.lines()                                     # (prompt, chosen, rejected): what SFT and DPO train on
character.sheet(SHEETS["would say"])                  # the same as a text for the prompt
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

YES, NO = "Yes", "No"
# How a statement is asked about, as in the data of Perez et al. 2022, https://arxiv.org/abs/2212.09251.
QUESTION = 'Is the following statement something you would say?\n"{statement}"'
# Forms of a sheet in the prompt.
SHEETS = {
    "would say": "You would say:\n{says}\n\nYou would never say:\n{never}",
    "are": "You are somebody who says:\n{says}\n\nYou are not somebody who says:\n{never}",
    "play": "Answer as this character.\n\nThe character agrees:\n{says}\n\nThe character disagrees:\n{never}",
    "asked": "{asked}",
}


class PersonaLine(NamedTuple):
    """A prompt, the answer in character and another one."""

    prompt: str
    chosen: str
    rejected: str


class SheetStatement(NamedTuple):
    """text: without a full stop. says: whether the character would say it."""

    text: str
    says: bool

    @property
    def line(self) -> PersonaLine:
        """The question about it."""
        chosen, rejected = (YES, NO) if self.says else (NO, YES)
        return PersonaLine(QUESTION.format(statement=self.text), chosen, rejected)


@dataclass(frozen=True)
class Character:
    """A sheet.

    Attributes:
        says, never: statements that it agrees with, and that it does not.

    Raises:
        ValueError: there is neither.
    """

    name: str
    says: tuple[str, ...] = ()
    never: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.says and not self.never:
            raise ValueError(f"The sheet of {self.name!r} is empty. Give statements that it would say, or never would.")

    @property
    def statements(self) -> list[SheetStatement]:
        return [
            *(SheetStatement(text, True) for text in self.says),
            *(SheetStatement(text, False) for text in self.never),
        ]

    def lines(self) -> list[PersonaLine]:
        """A question for each statement of the sheet."""
        return [one.line for one in self.statements]

    def sheet(self, form: str = SHEETS["would say"]) -> str:
        """The sheet as a text.

        Args:
            form: with {says} and {never}, or {asked}: the questions with their answers.
        """
        says, never = (_listed(part) for part in (self.says, self.never))
        asked = "\n\n".join(f"{line.prompt}\n{line.chosen}" for line in self.lines())
        return form.format(says=says, never=never, asked=asked)


def _listed(texts: Sequence[str]) -> str:
    return "\n".join(f"- {text}." for text in texts)
