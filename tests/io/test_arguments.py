"""key=value arguments: what they give, and the one line for each mistake."""

import pytest

from hypernet.io.arguments import key_values

NAMES = ("source", "seed")


def test_values_are_texts_and_may_hold_equals_signs_or_nothing():
    assert key_values(["seed=3", "source=a=b c"], NAMES) == {"seed": "3", "source": "a=b c"}
    assert key_values(["source="], NAMES) == {"source": ""} and key_values([], NAMES) == {}


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["source"], r"Cannot read 'source': settings are key=value with source, seed. See --help."),
        (["--seed=3"], r"Cannot read '--seed=3'"),
        (["sead=3"], r"Cannot read 'sead=3'"),
        (["seed=3", "seed=3"], "seed is given twice. Give it once."),
    ],
)
def test_mistakes_are_told_in_one_line(arguments, message):
    with pytest.raises(ValueError, match=message) as error:
        key_values(arguments, NAMES)
    assert "\n" not in str(error.value)
