"""SecureSum: a sum whose parts nobody sees, by masks that each two users share and that cancel. Simulated.

secure = SecureSum(size=3072, seed=0)
uploads = {user: secure.upload(vector, user, users) for user, vector in vectors.items()}   # each by itself is random
secure.total(uploads, users)                                                              # their sum, of all who sent

Everything runs in one process, and masks come from a seeded generator that is not made for secrets: this shows that the
arithmetic is exact and what the server gets to see, not that nobody can cheat. Numbers are fixed point modulo 2^64, so
masks cancel to the bit, which floats do not.

Source: Bonawitz et al. 2017, https://eprint.iacr.org/2017/281, section 4; keys and secret sharing are left out, and a
dropped user's masks are named by those who stay.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

Words = npt.NDArray[np.uint64]


class SecureSum:
    """Sums vectors of one size.

    Args:
        size: of a vector. seed: of the masks; a round should have its own. fraction_bits: behind the binary point.
    """

    def __init__(self, *, size: int, seed: int, fraction_bits: int = 32) -> None:
        self.size, self.seed, self.fraction_bits = size, seed, fraction_bits

    @property
    def rounding(self) -> float:
        """By which a vector that is rounded can be longer than it was."""
        return float(np.sqrt(self.size) * 2.0 ** -(self.fraction_bits + 1))

    def encoded(self, vector: npt.ArrayLike, *, parts: int) -> Words:
        """Fixed point, negative numbers from 2^64 down.

        Raises:
            ValueError: another size, or the sum of so many parts could overflow.
        """
        given = np.asarray(vector, np.float64)
        if given.shape != (self.size,):
            raise ValueError(f"A vector of {self.size} numbers is summed, not of shape {list(given.shape)}.")
        limit = 2.0 ** (63 - self.fraction_bits) / max(parts, 1)
        if not np.abs(given).max(initial=0.0) < limit:
            raise ValueError(f"Numbers of {parts} parts must stay below {limit:g}. Clip them, or take fewer bits.")
        return np.rint(given * 2.0**self.fraction_bits).astype(np.int64).view(np.uint64)

    def upload(self, vector: npt.ArrayLike, user: str, users: Sequence[str]) -> Words:
        """What the server gets of a user: the vector with the masks that it shares with each of the others."""
        total = self.encoded(vector, parts=len(users))
        for other in users:
            if other != user:
                total = total + self._signed_mask(user, other)
        return total

    def total(self, uploads: Mapping[str, Words], users: Sequence[str]) -> npt.NDArray[np.float64]:
        """The sum of what was sent. Of `users` who sent nothing, those who did name the masks that they share.

        Raises:
            ValueError: somebody sent who is none of the users.
        """
        if strangers := sorted(set(uploads) - set(users)):
            raise ValueError(f"{strangers[0]} is none of the {len(users)} users of this round.")
        total = np.zeros(self.size, np.uint64)
        for user, words in uploads.items():
            total = total + words
            for other in users:
                if other not in uploads:
                    total = total - self._signed_mask(user, other)
        return total.view(np.int64).astype(np.float64) / 2.0**self.fraction_bits

    def _signed_mask(self, user: str, other: str) -> Words:
        """Of the first of the two, in the order of names; of the other one modulo 2^64 its negative."""
        first, second = sorted((user, other))
        pair = f"{first}\0{second}".encode()
        generator = np.random.Generator(np.random.Philox(np.random.SeedSequence([self.seed, *pair])))
        mask = generator.integers(0, 2**64, self.size, np.uint64)
        return mask if user == first else np.uint64(0) - mask
