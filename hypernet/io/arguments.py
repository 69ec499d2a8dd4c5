"""key_values: the key=value arguments of the library's own commands, read as train.py's are."""

from collections.abc import Collection, Sequence


def key_values(arguments: Sequence[str], names: Collection[str]) -> dict[str, str]:
    """Name to text of each argument, in their order.

    Raises:
        ValueError: an argument is no key=value, has another name, or comes twice.
    """
    found: dict[str, str] = {}
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if name not in names or not equals:
            raise ValueError(f"Cannot read {argument!r}: settings are key=value with {', '.join(names)}. See --help.")
        if name in found:
            raise ValueError(f"{name} is given twice. Give it once.")
        found[name] = value
    return found
