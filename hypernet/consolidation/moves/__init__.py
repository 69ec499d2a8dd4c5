"""What may move in the base model, one choice a file.

moves = LowRank(rank=16)
parameters = moves.start(model, None, seed=0)        # named leaves to be trained
moves.tensors(model, parameters)                      # the weights they make, differentiable
moves.result(model, parameters).save(folder, model)   # `MovedWeights`
"""

from hypernet.consolidation.moves.base import Examples, Moves, settings_of
from hypernet.consolidation.moves.generated import GeneratedAdapter
from hypernet.consolidation.moves.low_rank import ATTENTION_AND_MLP, LowRank
from hypernet.consolidation.moves.orthogonal import OrthogonalSubspace
from hypernet.consolidation.moves.rows import ROW_CHOICES, ChosenRows
from hypernet.consolidation.moves.slots import SLOT_CHOICES, MemorySlots
from hypernet.consolidation.moves.whole import Everything, UpperBlocks

__all__ = [
    "ATTENTION_AND_MLP",
    "ROW_CHOICES",
    "SLOT_CHOICES",
    "ChosenRows",
    "Everything",
    "Examples",
    "GeneratedAdapter",
    "LowRank",
    "MemorySlots",
    "Moves",
    "OrthogonalSubspace",
    "UpperBlocks",
    "settings_of",
]
