"""What other libraries say that is not for the user of this one, kept off the screen."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

# Where torchao is installed, transformers imports it. It then says which GPU libraries it could not load, and registers
# constants in a way that torch warns of.
_NOT_FOR_THE_USER = {
    "torchao": "Failed to load ",
    "torch.utils._pytree": "<enum ",
}


def silence_imports() -> None:
    """Drops what libraries log while they are imported; `import hypernet` calls it, before it imports any of them."""
    for name, beginning in _NOT_FOR_THE_USER.items():
        logging.getLogger(name).addFilter(partial(_is_for_the_user, beginning=beginning))


def _is_for_the_user(record: logging.LogRecord, *, beginning: str) -> bool:
    return not record.getMessage().startswith(beginning)


@contextmanager
def without_weight_bars() -> Iterator[None]:
    """transformers without its bars for weights; those of downloads, which are huggingface_hub's, stay."""
    from transformers.utils.logging import set_tqdm_hook

    before = set_tqdm_hook(lambda bar, args, kwargs: bar(*args, **{**kwargs, "disable": True}))
    try:
        yield
    finally:
        set_tqdm_hook(before)


@contextmanager
def without_load_report(quiet: bool) -> Iterator[None]:
    """Where `quiet`, transformers without its report of tensors that it did not expect."""
    from transformers.utils import logging as transformers_logging

    before = transformers_logging.get_verbosity()
    if quiet:
        transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(before)


@contextmanager
def log_kept_back(name: str) -> Iterator[list[str]]:
    """What a library logs inside the block, as a list instead of lines on the screen.

    Args:
        name: the library's top logger.
    """
    messages: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger(name)
    propagated, logger.propagate = logger.propagate, False
    logger.addHandler(handler)
    try:
        yield messages
    finally:
        logger.removeHandler(handler)
        logger.propagate = propagated
