"""What the rows' methods and tasks are called on the page, and in which order they come."""

from pathlib import Path

import yaml

FLOOR, CEILING = "no_context", "full_context"
ADAPTER = "doc_to_lora"
GATED, ROUTED = "doc_to_lora_gated", "doc_to_lora_routed"
WRONG = "wrong_document"
CONTROLS = (FLOOR, CEILING, WRONG)
ALTERNATIVES = ("full_context", "prefix_cache", "retrieval")  # what an adapter's break-even is counted against
GRADIENT = ("text_lora", "distillation_oracle", "distillation_generated", "warm_start_oracle", "warm_start_generated")
TEXTS = yaml.safe_load((Path(__file__).parent / "texts.yaml").read_text(encoding="utf-8"))
METHODS, TASKS = TEXTS["methods"], TEXTS["tasks"]
NUMBERED = {"_rank": "rank", "_seed": "training seed"}  # how a method's name ends → what it is on the page
# Tasks whose documents say nothing that is asked for, and whose documents contradict what was learned: the sweep's own
# first, for it has more cases than the tiny one.
INTERFERENCE = ("interference", "locality")
CONFLICT = ("conflict_by_times_asked", "conflict")
CONTROL_TASKS = tuple(task for task, name in TASKS.items() if name.startswith("control"))


def name_of(method: str) -> str:
    """On the page; `doc_to_lora_rank16` is one checkpoint of several, `doc_to_lora_seed1` one training of several."""
    base, what, number = _numbered(method)
    if what:
        return f"{METHODS[base]['name']}, {what} {number}"
    return METHODS[base]["name"] if base in METHODS else base.replace("_", " ")


def task_name(task: str) -> str:
    return TASKS.get(task, task.replace("_", " "))


def task_order(task: str) -> tuple[float, str]:
    """Key that sorts tasks as the page does: unknown ones stand before the controls."""
    place = list(TASKS).index(task) if task in TASKS else len(TASKS) - len(CONTROL_TASKS) - 0.5
    return place, task


def order(method: str) -> tuple[int, str]:
    """Key that sorts methods as the tables do; ranks by their size."""
    base, what, number = _numbered(method)
    place = list(METHODS).index(base) if base in METHODS else len(METHODS)
    return place, f"{base}{what}{number:9d}"


def _numbered(method: str) -> tuple[str, str, int]:
    """(a known method, "rank" or "seed", its number); the name itself, nothing and 0 if it is no such name."""
    for suffix, what in NUMBERED.items():
        base, _, number = method.rpartition(suffix)
        if base in METHODS and number.isdigit():
            return base, what, int(number)
    return method, "", 0


def short(value: float, *, digits: int = 3) -> str:
    """So many significant digits, or the whole number where that is longer, with commas between thousands."""
    if value == 0:
        return "0"
    whole = abs(value) >= 10 ** (digits - 1) - 0.5 * 10 ** (1 - digits)
    return f"{value:,.0f}" if whole else f"{value:.{digits}g}"
