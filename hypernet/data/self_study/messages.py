"""What users ask without a document, as the base model expects it: it writes their messages itself.

messages = written_messages(engine, 600)
"""

import random

from hypernet.data.self_study.engines import Engine
from hypernet.text.tokens import framed_ids

_TOKENS = 40
_MOST_CUT = 9  # words


def written_messages(engine: Engine, number: int, *, seed: int = 0) -> list[str]:
    """Messages drawn at temperature 1 from the place where the chat template has a user's, a part of them cut short.

    A model that was tuned for chat writes what it is asked for there, of all subjects; every second message is cut to
    its first one to nine words, since people also ask in few. Empty ones are left out, so that there may be fewer.

    Returns:
        At most `number`; none where nothing comes before a user's message.

    Source: Magpie, https://arxiv.org/abs/2406.08464.
    """
    (before,) = framed_ids(engine.tokenizer, [(engine.layout.before_user, "", "")])
    if not before:
        return []
    rng = random.Random(f"written messages {seed}")
    found = []
    written = engine.write([before] * number, max_new_tokens=_TOKENS, temperature=1.0, seed=seed)
    for place, ids in enumerate(written):
        words = engine.text(ids).split()
        if place % 2 and words:
            words = words[: rng.randint(1, _MOST_CUT)]
            words[-1] = words[-1].rstrip("?.!,") + rng.choice("?.! ").strip()
        if text := " ".join(words).strip():
            found.append(text)
    return found
