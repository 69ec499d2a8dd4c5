"""What is done against forgetting beside rehearsal, one remedy a file.

remedy = Vaccination(alpha=1.0)
remedy.start(model, examples, seed=0)              # Examples: lessons, and what they are told apart from
with remedy.around(model):                          # the student's forward passes while it learns
    ...
remedy.after(parameters, loss)                      # once it has learned
"""

from hypernet.consolidation.remedies.base import NoRemedy, Remedy
from hypernet.consolidation.remedies.realignment import Realignment
from hypernet.consolidation.remedies.vaccination import Vaccination

__all__ = ["NoRemedy", "Realignment", "Remedy", "Vaccination"]
