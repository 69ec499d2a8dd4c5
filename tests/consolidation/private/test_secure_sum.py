"""Sums by masks: exact to the bit, also where somebody drops out; an upload alone tells nothing."""

import numpy as np
import pytest

from hypernet.consolidation.private.secure_sum import SecureSum

USERS = ["alice", "bob", "carol", "dan"]


@pytest.fixture
def vectors():
    rng = np.random.default_rng(0)
    return {user: rng.normal(size=500) for user in USERS}


@pytest.fixture
def secure():
    return SecureSum(size=500, seed=3)


def test_masks_cancel_to_the_bit(secure, vectors):
    uploads = {user: secure.upload(vector, user, USERS) for user, vector in vectors.items()}
    plain = sum(secure.encoded(vector, parts=4) for vector in vectors.values())
    assert np.array_equal(secure.total(uploads, USERS), plain.view(np.int64) / 2.0**32)
    assert np.abs(secure.total(uploads, USERS) - sum(vectors.values())).max() <= 4 * 2.0**-33


def test_masks_of_who_dropped_out_are_taken_off(secure, vectors):
    uploads = {user: secure.upload(vector, user, USERS) for user, vector in vectors.items() if user not in ("bob",)}
    expected = sum(vector for user, vector in vectors.items() if user != "bob")
    assert np.abs(secure.total(uploads, USERS) - expected).max() <= 3 * 2.0**-33


def test_upload_alone_looks_like_random_numbers(secure, vectors):
    zeros = secure.upload(np.zeros(500), "bob", USERS)
    given = secure.upload(vectors["bob"], "bob", USERS)
    for words in (zeros, given):
        bits = np.unpackbits(words.view(np.uint8))
        assert abs(bits.mean() - 0.5) < 0.01
    correlation = np.corrcoef(given.view(np.int64).astype(float), vectors["bob"])[0, 1]
    assert abs(correlation) < 0.1


def test_sum_without_one_of_the_users_known_is_no_sum(secure, vectors):
    uploads = {user: secure.upload(vector, user, USERS) for user, vector in vectors.items()}
    wrong = secure.total({user: uploads[user] for user in USERS[:3]}, USERS[:3])
    assert np.abs(wrong).max() > 1e6


def test_one_user_sends_its_vector_as_it_is(secure, vectors):
    alone = secure.upload(vectors["dan"], "dan", ["dan"])
    assert np.array_equal(alone, secure.encoded(vectors["dan"], parts=1))


def test_rounding_bounds_what_a_vector_gains():
    secure = SecureSum(size=100, seed=0, fraction_bits=4)
    vector = np.full(100, 0.0313)  # just above half of 1/16: rounded up
    rounded = secure.total({"a": secure.upload(vector, "a", ["a"])}, ["a"])
    assert np.linalg.norm(rounded) <= np.linalg.norm(vector) + secure.rounding
    assert np.linalg.norm(rounded) == pytest.approx(10 / 16) and secure.rounding == pytest.approx(10 / 32)


def test_what_could_overflow_is_refused(secure, vectors):
    with pytest.raises(ValueError, match="must stay below"):
        secure.upload(np.full(500, 2.0**31), "bob", USERS)
    with pytest.raises(ValueError, match="500 numbers"):
        secure.upload(np.zeros(3), "bob", USERS)
    with pytest.raises(ValueError, match="eve is none of the 4 users"):
        secure.total({"eve": secure.encoded(np.zeros(500), parts=4)}, USERS)
