"""Recited: the context encoder of a chunk that the base model says itself, as its answer to a question.

encoder = Recited(base_model, module="down_proj", question="What does the text say?")
encoder.stream(ids, mask, read)      # read may return what is added to the module's output, from there on
"""

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hypernet.base.targets import find_targets
from hypernet.model.context_encoder import CONTEXT_ENCODERS, ContextEncoder
from hypernet.text.chat import ChatLayout
from hypernet.text.chunking import Frame
from hypernet.text.tokens import framed_ids


class Recited(ContextEncoder):
    """A map for every block: what enters the module, the state that enters the block, and where the next token lies.

    The last is the direction in the final states that raises the next token's logit above the others' mean: its row of
    the output embeddings times the final norm's weights, less the mean over all tokens, at length 1.

    Args:
        module: the adapted module.
        question: what the chunk is the answer to. Any will do; what is asked later is another one.

    Raises:
        ValueError: the base model's last norm is not found; and as of `ContextEncoder` and `find_targets`.
    """

    kind = "recited"

    def __init__(
        self,
        base_model: PreTrainedModel,
        *,
        module: str = "down_proj",
        question: str = "What does the text say?",
        context_tokens: int = 0,
    ) -> None:
        super().__init__(base_model, context_tokens=context_tokens)
        (target,) = find_targets(base_model, [module])
        self.module, self.question = module, question
        self._paths = target.paths
        self.num_maps = len(target.paths)
        self.feature_dim = target.d_in + 2 * target.d_out
        if not hasattr(getattr(self._decoder, "norm", None), "weight"):
            raise ValueError(f"{type(base_model).__name__} has no final norm of that name. Use another kind.")

    @property
    def settings(self) -> dict[str, Any]:
        return {**super().settings, "module": self.module, "question": self.question}

    def frame(self, tokenizer: PreTrainedTokenizerBase) -> Frame:
        layout = ChatLayout.of(tokenizer)
        (before,) = layout.prompt_ids(tokenizer, [self.question])
        opening, closing = framed_ids(tokenizer, [(layout.before_answer, "", ""), ("", "", layout.after_answer)])
        before = before + opening
        return Frame(before, closing, unread_before=len(before) - 1, unread_after=max(0, len(closing) - 1))

    def _read_maps(self, ids: Tensor, mask: Tensor, read: Callable[[int, Tensor], Tensor | None]) -> None:
        following = torch.cat([ids[:, 1:], ids[:, -1:]], dim=1)
        embeddings = self.base_model.get_output_embeddings().weight
        rows = embeddings.float() * self._decoder.norm.weight.float()
        directions = F.normalize(rows[following] - rows.mean(0), dim=-1).to(embeddings.dtype)
        states: dict[int, Tensor] = {}

        def enter(index: int, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            states[index] = args[0] if args else kwargs["hidden_states"]

        def leave(index: int, _: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
            added = read(index, torch.cat([args[0], states.pop(index), directions], dim=-1))
            return None if added is None else output + added.to(output.dtype)

        blocks = getattr(self._decoder, self._blocks_name)
        with ExitStack() as undo:
            for index, path in enumerate(self._paths):
                module = self.base_model.get_submodule(path)
                hooks = (
                    blocks[index].register_forward_pre_hook(partial(enter, index), with_kwargs=True),
                    # Before the injector's: what it adds is no feature.
                    module.register_forward_hook(partial(leave, index), prepend=True),
                )
                for hook in hooks:
                    undo.callback(hook.remove)
            self._last_state(ids, mask)


CONTEXT_ENCODERS[Recited.kind] = Recited
