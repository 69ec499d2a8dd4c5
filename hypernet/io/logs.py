"""What other libraries log while they are imported, kept off a command's screen. Call it before importing them."""

import logging


def silence_torchao_warnings() -> None:
    """Where torchao is installed, transformers imports it, and it warns of each GPU library it lacks."""
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)
