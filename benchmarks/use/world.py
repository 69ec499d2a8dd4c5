"""A text world: rooms with gates that open for one object each, and a kitchen with a recipe.

world = World(seed=0)                          # its rules: what opens each gate, what each dish is made of and with
maps = world.maps("train", 60)                 # no map of "test" has the obstacles of one of "train"
outcome = play(maps[0], policy, rng=rng, jam=0.1, spare=2)
outcome.total, outcome.trajectory              # share of the obstacles passed; what happened, as text and as tries

The names of gates and dishes are the same in all worlds. So are recipes, a dish's ingredient and tool; keys are a
world's own: what was learned in one world is right about recipes in another, and wrong about keys.
"""

import random
from collections.abc import Callable, Sequence
from typing import NamedTuple

from hypernet.data.encyclopedia import Encyclopedia
from hypernet.memory.use.principles import Trajectory, Try

KEY, INGREDIENT, TOOL = "key", "ingredient", "tool"
ROOMS, KITCHEN = ("hall", "cellar", "attic"), "kitchen"
OPTIONS = 4  # objects that lie about at each obstacle, the right one among them
_SHARED = 1_000  # seed of what all worlds have in common
Policy = Callable[[str, str, Sequence[str]], Sequence[str]]  # subject, relation, objects → the objects, best first


class Obstacle(NamedTuple):
    """room: where it is. right: the object that it asks for. objects: that lie there."""

    room: str
    subject: str
    relation: str
    right: str
    objects: tuple[str, ...]


class Outcome(NamedTuple):
    """total: share of the map's obstacles that were passed."""

    total: float
    trajectory: Trajectory


class World:
    """The rules of one world.

    Args:
        seed: of its own rules.
        num_gates, num_dishes: names that its maps draw from.
    """

    def __init__(self, seed: int, *, num_gates: int = 12, num_dishes: int = 6) -> None:
        shared, own = Encyclopedia("test", seed=_SHARED), Encyclopedia("test", seed=seed)
        rng = shared.rng("names")
        names: dict[str, None] = {}
        while len(names) < num_gates + num_dishes:
            names.setdefault(shared.entity(rng, "town").name)
        self.seed = seed
        self.gates, self.dishes = list(names)[:num_gates], list(names)[num_gates:]
        self.objects = _goods(shared, 12)
        keys, recipes = own.rng("keys"), shared.rng("recipes")
        self.rules = {(gate, KEY): keys.choice(self.objects) for gate in self.gates}
        self.rules |= {
            (dish, part): recipes.choice(self.objects) for dish in self.dishes for part in (INGREDIENT, TOOL)
        }

    def maps(self, split: str, number: int) -> list[tuple[Obstacle, ...]]:
        """Maps of one split, "train" or "test": gates and dish of a map, together, are those of one split alone.

        Raises:
            ValueError: an unknown split.
        """
        if split not in ("train", "test"):
            raise ValueError(f"There is no split {split!r}: choose of train, test.")
        rng = random.Random(f"{self.seed}/{split}/maps")
        found: list[tuple[Obstacle, ...]] = []
        while len(found) < number:
            path, dish = tuple(rng.sample(self.gates, len(ROOMS))), rng.choice(self.dishes)
            # Drawn by its name, so that the splits share none, whoever draws first.
            if (random.Random(f"{sorted(path)}/{dish}").random() < 0.5) != (split == "train"):
                continue
            asked = [(room, gate, KEY) for room, gate in zip(ROOMS, path, strict=True)]
            asked += [(KITCHEN, dish, INGREDIENT), (KITCHEN, dish, TOOL)]
            found.append(tuple(self._obstacle(rng, *one) for one in rng.sample(asked, len(asked))))
        return found

    def _obstacle(self, rng: random.Random, room: str, subject: str, relation: str) -> Obstacle:
        right = self.rules[subject, relation]
        others = rng.sample([one for one in self.objects if one != right], OPTIONS - 1)
        return Obstacle(room, subject, relation, right, tuple(rng.sample([right, *others], OPTIONS)))


def obstacles_of(one: Sequence[Obstacle]) -> tuple[frozenset[str], str]:
    """Which gates and which dish: what no two maps of different splits share."""
    gates = frozenset(each.subject for each in one if each.relation == KEY)
    return gates, next(each.subject for each in one if each.relation == TOOL)


def play(one: Sequence[Obstacle], policy: Policy, *, rng: random.Random, jam: float, spare: int) -> Outcome:
    """Obstacle after obstacle, until the last is passed or the tries are used up: one for each, and some to spare.

    Args:
        policy: ranks the objects; they are tried in that order, and once all are, again.
        jam: probability that the right object does nothing.
        spare: tries.
    """
    left, tries, told, passed = len(one) + spare, list[Try](), list[str](), 0
    for obstacle in one:
        told.append(
            f"In the {obstacle.room}, {obstacle.subject} wants its {obstacle.relation}. There are "
            f"{', '.join(obstacle.objects)}."
        )
        order = list(policy(obstacle.subject, obstacle.relation, obstacle.objects))
        place, opened = 0, False
        while left and not opened:
            action = order[place % len(order)]
            opened = action == obstacle.right and rng.random() >= jam
            tries.append(Try(obstacle.subject, obstacle.relation, action, opened))
            told.append(f"You give it {action}: {'it opens' if opened else 'nothing happens'}.")
            place, left = place + 1, left - 1
        if not opened:
            break
        passed += 1
    total = passed / len(one)
    return Outcome(total, Trajectory(" ".join(told), tuple(tries), total))


def _goods(encyclopedia: Encyclopedia, number: int) -> list[str]:
    """Different ones, no two with a word in common."""
    rng, found, words = encyclopedia.rng("goods"), list[str](), set[str]()
    while len(found) < number:
        made = encyclopedia.value(rng, "goods")
        if not words & set(made.split()):
            found.append(made)
            words |= set(made.split())
    return found
