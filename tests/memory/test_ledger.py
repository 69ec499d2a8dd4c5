"""CostLedger: which tier is chosen, from measurements made by hand."""

import pytest

from hypernet.memory.ledger import CostLedger, Measured
from hypernet.memory.store.records import Filters
from hypernet.memory.store.token_store import TokenStore

ALICE = Filters("alice")


@pytest.fixture
def ledger(tmp_path):
    store = TokenStore(tmp_path / "memory")
    yield CostLedger(store)
    store.close()


def measured(tier: str, accuracy: float, question_s: float, **changes) -> Measured:
    values = {"generator": "g" if tier == "adapter" else None, "base_model": "b", "reference": "given", "memories": 10}
    values |= {"questions": 8, "oracle": None, "question_tokens": 0.0, "prepare_s": 0.0}
    return Measured(tier=tier, accuracy=accuracy, question_s=question_s, **{**values, **changes})


def choose(ledger, *, accuracy=0.9, memories=10, ready=True, filters=ALICE):
    found = ledger.latest(filters, generator="g", base_model="b")
    return ledger.choose(found, accuracy=accuracy, memories=memories, ready=ready)


def test_cheapest_tier_with_the_accuracy_is_chosen(ledger):
    assert choose(ledger).tier == "token" and "no tier has been measured" in choose(ledger).reason
    ledger.add(measured("token", 0.95, 0.030), ALICE)
    ledger.add(measured("adapter", 0.92, 0.010), ALICE)
    ledger.add(measured("none", 0.10, 0.005), ALICE)
    assert choose(ledger).tier == "adapter" and choose(ledger, accuracy=0.94).tier == "token"
    assert choose(ledger, accuracy=0.05).tier == "none"
    none_enough = choose(ledger, accuracy=0.99)
    assert none_enough.tier == "token" and "none has measured 0.99" in none_enough.reason
    assert choose(ledger, ready=False).tier == "token"


def test_last_measurement_of_this_model_and_user_counts(ledger):
    ledger.add(measured("adapter", 1.0, 0.01), ALICE)
    ledger.add(measured("adapter", 0.5, 0.01), ALICE)
    assert choose(ledger).reason.startswith("none has measured")
    ledger.add(measured("adapter", 1.0, 0.01, generator="other"), ALICE)
    ledger.add(measured("token", 1.0, 0.01, base_model="other"), ALICE)
    ledger.add(measured("token", 1.0, 0.01), Filters("bob"))
    assert choose(ledger).tier == "adapter" and choose(ledger).reason.startswith("none has measured")
    assert ledger.latest(ALICE, generator=None, base_model=None)["token"].accuracy == 1.0


def test_measurement_with_far_fewer_memories_counts_no_more(ledger):
    ledger.add(measured("adapter", 1.0, 0.01), ALICE)
    assert choose(ledger, memories=20).tier == "adapter"
    grown = choose(ledger, memories=21)
    assert grown.tier == "token" and "with these memories" in grown.reason
