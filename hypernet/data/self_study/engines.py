"""Models that write, for self-study: in this process by transformers, or in vLLM."""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from hypernet.base.base_model import fingerprint, load_base_model
from hypernet.base.catalog import locate
from hypernet.base.generation import decode_answer, end_ids, generate_ids
from hypernet.base.packed_attention import packed_logits
from hypernet.base.packed_rows import Segment, pack_row, pad_rows, shared_beginning
from hypernet.data.records import StoredAnswer
from hypernet.data.self_study.settings import StudySettings
from hypernet.text.chat import DOCUMENT_SEPARATOR, ChatLayout, closing_ids
from hypernet.text.tokens import framed_ids


class Engine(Protocol):
    """A model that writes."""

    tokenizer: PreTrainedTokenizerBase
    layout: ChatLayout
    fingerprint: str

    def write(
        self, prompts: Sequence[Sequence[int]], *, max_new_tokens: int, temperature: float, seed: int
    ) -> list[list[int]]:
        """Continuations of prompts, token ids each, the closing token included where there is one."""
        ...

    def text(self, ids: Sequence[int]) -> str:
        """What a continuation says, without the closing token."""
        ...

    def top_k(self, text: str | None, asked: Sequence[tuple[str, list[int]]], k: int) -> list[StoredAnswer]:
        """How likely tokens were in answers to questions, (question, answer's ids) each, about a text or none."""
        ...


class TransformersEngine:
    """See `Engine`; the model runs in this process."""

    def __init__(self, base_model: nn.Module, tokenizer: PreTrainedTokenizerBase, *, batch_size: int = 8) -> None:
        self.base_model = base_model
        self.tokenizer = tokenizer
        self.batch_size = batch_size
        self.layout = ChatLayout.of(tokenizer)
        self.fingerprint = fingerprint(base_model)
        self._ends = end_ids(base_model, tokenizer)

    def write(
        self, prompts: Sequence[Sequence[int]], *, max_new_tokens: int, temperature: float, seed: int
    ) -> list[list[int]]:
        device = next(self.base_model.parameters()).device
        found = []
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(seed)
            for start in range(0, len(prompts), self.batch_size):
                found += generate_ids(
                    self.base_model,
                    self.tokenizer,
                    prompts[start : start + self.batch_size],
                    max_new_tokens=max_new_tokens,
                    temperature=temperature,
                )
        return found

    def text(self, ids: Sequence[int]) -> str:
        return decode_answer(self.tokenizer, ids, self._ends)

    @torch.no_grad()
    def top_k(self, text: str | None, asked: Sequence[tuple[str, list[int]]], k: int) -> list[StoredAnswer]:
        # One row for all questions, as in training: the text is read once, and the tokens are cut in the same places.
        before = self.layout.before_user
        prefix, framed = [], [(before, q, self.layout.after_user) for q, _ in asked]
        if text is not None:
            (prefix,) = framed_ids(self.tokenizer, [(before, text, "")])
            framed = [("", DOCUMENT_SEPARATOR + q, self.layout.after_user) for q, _ in asked]
        segments = [
            Segment(prompt + ids, len(prompt), text is not None, 0)
            for prompt, (_, ids) in zip(framed_ids(self.tokenizer, framed), asked, strict=True)
        ]
        row = pack_row(prefix, segments) if prefix else pack_row(*shared_beginning(segments))
        rows = pad_rows([row], pad_id=self.tokenizer.pad_token_id).to(next(self.base_model.parameters()).device)
        logits = packed_logits(self.base_model, rows, rows.target_kind >= 0)
        log_probs, indices = logits.float().log_softmax(-1).topk(min(k, logits.shape[-1]))
        ends = np.cumsum([len(ids) for _, ids in asked])[:-1]
        parts = (np.split(tensor.cpu().numpy(), ends) for tensor in (indices, log_probs))
        return [StoredAnswer(tuple(ids), *both) for (_, ids), *both in zip(asked, *parts, strict=True)]


class VllmEngine:
    """See `Engine`; the model runs in vLLM. Written after its documentation and never run here."""

    def __init__(self, source: str, *, dtype: str | None = None, seed: int = 0) -> None:
        try:
            from vllm import LLM
        except ImportError as error:
            raise ValueError("engine=vllm needs vLLM, which is not installed: pip install vllm.") from error
        self.model = LLM(model=source, dtype=dtype or "auto", seed=seed, max_logprobs=64)
        self.tokenizer = self.model.get_tokenizer()
        self.layout = ChatLayout.of(self.tokenizer)
        self._ends = closing_ids(self.tokenizer)
        # Its weights are spread over processes; the name has to do.
        self.fingerprint = f"vllm:{source}"

    def write(
        self, prompts: Sequence[Sequence[int]], *, max_new_tokens: int, temperature: float, seed: int
    ) -> list[list[int]]:
        from vllm import SamplingParams

        # vLLM adds the tokens that the model's generation config stops at; the rest of that one it leaves alone here.
        settings = SamplingParams(
            temperature=temperature, max_tokens=max_new_tokens, seed=seed, stop_token_ids=self._ends
        )
        inputs = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
        outputs = self.model.generate(inputs, settings, use_tqdm=False)
        return [list(output.outputs[0].token_ids) for output in outputs]

    def text(self, ids: Sequence[int]) -> str:
        return decode_answer(self.tokenizer, ids, self._ends)

    def top_k(self, text: str | None, asked: Sequence[tuple[str, list[int]]], k: int) -> list[StoredAnswer]:
        from vllm import SamplingParams

        prompts = self.layout.prompt_ids(self.tokenizer, [question for question, _ in asked], [text] * len(asked))
        whole = [{"prompt_token_ids": prompt + ids} for prompt, (_, ids) in zip(prompts, asked, strict=True)]
        settings = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=k)
        answers = []
        for output, (_, ids) in zip(self.model.generate(whole, settings, use_tqdm=False), asked, strict=True):
            # It also gives the token that is there, which need not be among the k.
            best = [
                sorted(((p.logprob, token) for token, p in place.items()), reverse=True)[:k]
                for place in output.prompt_logprobs[-len(ids) :]
            ]
            indices = np.array([[token for _, token in place] for place in best])
            answers.append(StoredAnswer(tuple(ids), indices, np.array([[p for p, _ in place] for place in best])))
        return answers


def load_engine(source: str, settings: StudySettings) -> Engine:
    """The model at `source`, a hub name or folder, run as the settings say."""
    dtype = settings.dtype or None
    if settings.engine == "vllm":
        return VllmEngine(str(locate(source)), dtype=dtype, seed=settings.seed)
    base_model, tokenizer = load_base_model(source, device=settings.device, dtype=dtype)
    return TransformersEngine(base_model, tokenizer, batch_size=settings.batch_size)
