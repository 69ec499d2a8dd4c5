"""benchmarks/report/names.py: names and places of methods and tasks, also of unknown ones."""

import math

from benchmarks.report.names import METHODS, TASKS, TEXTS, name_of, order, short, task_order


def test_unknown_methods_and_tasks_have_a_name_and_a_place() -> None:
    assert name_of("doc_to_lora_rank16") == "Doc-to-LoRA, rank 16"
    ranks = sorted(["doc_to_lora_rank16", "doc_to_lora_rank8", "wrong_document", "full_context"], key=order)
    assert ranks == ["full_context", "doc_to_lora_rank8", "doc_to_lora_rank16", "wrong_document"]
    assert name_of("wrong_document_seed1") == "wrong document, training seed 1"
    assert name_of("my_method_seed1") == "my method seed1"
    assert name_of("my_method") == "my method" and order("my_method") > order("text_lora")
    assert task_order("locality") < task_order("squad") < task_order("encyclopedia_empty_document")
    assert math.isfinite(task_order("squad")[0])


def test_every_method_has_its_words_and_a_look_of_its_own() -> None:
    looks = [(m["color"], m["marker"], m.get("dashes"), m.get("hollow")) for m in METHODS.values()]
    assert all(m["name"] and m["text"].endswith(".") for m in METHODS.values())
    # A gradient method has the marker of a retrieval that is never drawn with it.
    assert len(set(looks)) == len(looks) - 1
    assert {color for color, *_ in looks} <= set(TEXTS["palette"])


def test_groups_and_costed_methods_are_known() -> None:
    assert {m for group in TEXTS["groups"].values() for m in group} | set(TEXTS["costed"]) <= set(METHODS)
    assert all(TASKS.values())


def test_short_keeps_significant_digits_and_separates_thousands() -> None:
    assert [short(value) for value in (0, 0.01234, 12.34, 999.6, 12345.6)] == ["0", "0.0123", "12.3", "1,000", "12,346"]
    assert short(1234, digits=2) == "1,234" and short(4.26, digits=2) == "4.3"
