"""Break-even: the number of questions after which what was prepared once is cheaper than what costs more each time.

break_even(Costs(prepare=2.1e9, question=5e7), Costs(prepare=0, question=8e8))        # 2.8 questions

n* = (F_m - F_b) / (v_b - v_m), with F what is paid once and v what is paid for each question.
"""

import math
from typing import NamedTuple


class Costs(NamedTuple):
    """Of a method: once per version of the document, and per question. Seconds or FLOPs."""

    prepare: float
    question: float


def break_even(adapter: Costs, other: Costs) -> float:
    """Questions from which on the adapter costs less altogether; 0: from the start, inf: never."""
    more_at_first, less_each = adapter.prepare - other.prepare, other.question - adapter.question
    if less_each <= 0:
        return 0.0 if more_at_first < 0 and less_each == 0 else math.inf
    return max(0.0, more_at_first / less_each)
