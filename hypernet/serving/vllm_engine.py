"""VLLMEngine: vLLM decodes, generated adapters go to it as LoRARequests; otherwise as `BatchEngine`.

make_engine = vllm_engine(max_lora_rank=256, max_loras=8)        # checked before a model is loaded
engine = make_engine(model, max_batch=32)

The hypernetwork reads documents here, with a base model of its own; vLLM has its copy, on its device. An adapter is
written as a PEFT folder of one plain LoRA (`hypernet.interop.vllm`) when it is first asked, and removed from the disk
and from vLLM once nothing uses it. Tokens become text here, so that blanks, stop texts and half characters are those of
`BatchEngine`; random ones are drawn by vLLM, another seed's. What vLLM takes and refuses is listed, with its sources,
in `hypernet.interop.vllm`; its engine: https://docs.vllm.ai/en/latest/api/vllm/v1/engine/llm_engine/
"""

import itertools
import shutil
import tempfile
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from hypernet.adapters.adapter import LoRAAdapter, absolute_source
from hypernet.base.base_model import num_embeddings
from hypernet.base.generation import check_fits, end_ids
from hypernet.doc_to_lora import DocToLoRA
from hypernet.interop.vllm import MAX_LORA_RANKS, export_vllm
from hypernet.serving.engine import Delta, Generation, TokenLogprob
from hypernet.text.tokens import check_known


def vllm_engine(*, max_lora_rank: int = 256, max_loras: int = 8) -> Callable[..., "VLLMEngine"]:
    """What makes the engine of a model.

    Args:
        max_lora_rank: highest total rank of an adapter, one of vLLM's `MAX_LORA_RANKS`.
        max_loras: different adapters in one step; sequences with others wait.

    Raises:
        ValueError: vLLM is not installed, or has no such setting.
    """
    if find_spec("vllm") is None:
        raise ValueError("--engine vllm needs the package vllm: pip install vllm.")
    if max_lora_rank not in MAX_LORA_RANKS:
        raise ValueError(
            f"max_lora_rank is {max_lora_rank}. vLLM has room for {', '.join(map(str, MAX_LORA_RANKS))}: give one."
        )
    if max_loras < 1:
        raise ValueError(f"max_loras is {max_loras}. Give at least 1.")
    return partial(VLLMEngine, max_lora_rank=max_lora_rank, max_loras=max_loras)


class VLLMEngine:
    """Not thread-safe: one thread owns it and the model.

    Args:
        model: whose tokenizer, window and hypernetwork count; vLLM loads its base model from the same place.
        max_batch: sequences decoded at once. max_lora_rank, max_loras: as `vllm_engine`.

    Raises:
        ValueError: the hypernetwork's chunks are joined in a way that is no one LoRA.
    """

    def __init__(self, model: DocToLoRA, *, max_batch: int = 32, max_lora_rank: int = 256, max_loras: int = 8) -> None:
        if not model.trained_joining.is_plain_lora:
            raise ValueError(
                f"vLLM takes one LoRA for all tokens of all questions, and this hypernetwork's chunks are joined by "
                f"{model.trained_joining.way}. Serve it with --engine hypernet."
            )
        from vllm import EngineArgs, LLMEngine

        self.model, self.max_batch, self.max_lora_rank = model, max_batch, max_lora_rank
        self.ends = end_ids(model.base_model, model.tokenizer)
        self.running: list[Generation] = []
        self._requests: dict[str, Generation] = {}
        self._names: dict[Generation, str] = {}
        self._numbers = itertools.count(1)  # never given twice: vLLM knows an adapter by its number alone
        self._loaded: weakref.WeakKeyDictionary[LoRAAdapter, Any] = weakref.WeakKeyDictionary()
        self._gone: deque[int] = deque()
        self._folder = tempfile.TemporaryDirectory(prefix="hypernet-vllm-")
        self._llm = LLMEngine.from_engine_args(
            EngineArgs(
                model=absolute_source(model.base_model_source),
                skip_tokenizer_init=True,
                enable_lora=True,
                max_lora_rank=max_lora_rank,
                max_loras=min(max_loras, max_batch),
                max_num_seqs=max_batch,
                disable_log_stats=True,
            )
        )

    @property
    def room(self) -> int:
        """Sequences that may be admitted now."""
        return self.max_batch - len(self.running)

    def check(self, generation: Generation) -> None:
        """ValueError as `BatchEngine.check`, or if vLLM does not take the adapter, which it has been given by then."""
        check_known([generation.prompt], self.model.tokenizer, num_embeddings=num_embeddings(self.model.base_model))
        max_new_tokens = generation.sampling.max_new_tokens
        check_fits(self.model.base_model, [len(generation.prompt)], max_new_tokens=max_new_tokens)
        self._lora_request(generation.adapter)

    def admit(self, arrivals: Sequence[Generation]) -> None:
        """Hands new sequences to vLLM; those that it refuses end with an error."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        self._unload()
        for one in arrivals:
            sampling, name = one.sampling, f"hypernet-{next(self._numbers)}"
            try:
                parameters = SamplingParams(
                    max_tokens=sampling.max_new_tokens,
                    temperature=sampling.temperature,
                    top_p=sampling.top_p,
                    seed=sampling.seed,
                    logprobs=sampling.logprobs,
                    stop_token_ids=list(self.ends),
                    detokenize=False,
                    output_kind=RequestOutputKind.DELTA,
                )
                prompt = {"prompt_token_ids": list(one.prompt)}
                self._llm.add_request(name, prompt, parameters, lora_request=self._lora_request(one.adapter))
            except Exception as error:
                one.emit(Delta(error=error))
                continue
            self.running.append(one)
            self._requests[name], self._names[one] = one, name

    def step(self) -> None:
        """What vLLM's next step adds to each sequence; those that are done or cancelled leave."""
        self._abort([one for one in self.running if one.cancelled])
        if not self.running:
            return
        for output in self._llm.step():
            one = self._requests.get(output.request_id)
            if one is None:
                continue
            (found,) = output.outputs
            goes_on = True
            for place, token in enumerate(found.token_ids):
                logprob = None if one.sampling.logprobs is None else self._logprob(token, found.logprobs[place], one)
                goes_on = goes_on and one.take(token, self.model.tokenizer, self.ends, logprob)
            if output.finished:
                self._leave(one)
                if goes_on:  # vLLM ended it for a reason of its own
                    reason = f"vLLM ended the answer early: {found.finish_reason}. Ask again."
                    one.emit(Delta(error=RuntimeError(reason)))
            elif not goes_on:  # a stop text, which vLLM is not told
                self._abort([one])

    def clear(self) -> list[Generation]:
        """Takes all sequences out, and returns them."""
        dropped = list(self.running)
        self._abort(dropped)
        return dropped

    def _abort(self, generations: Sequence[Generation]) -> None:
        if generations:
            self._llm.abort_request([self._leave(one) for one in generations])

    def _leave(self, one: Generation) -> str:
        """Forgets a sequence; the name of its request."""
        self.running.remove(one)
        name = self._names.pop(one)
        del self._requests[name]
        return name

    def _logprob(self, token: int, found: Any, one: Generation) -> TokenLogprob:
        """vLLM's dict of a token → its log p, in which the chosen token is beside the most likely ones."""
        decode = self.model.tokenizer.decode
        best = sorted(found.items(), key=lambda item: -item[1].logprob)[: one.sampling.logprobs]
        top = tuple((str(decode([other])), float(value.logprob)) for other, value in best)
        return TokenLogprob(str(decode([token])), float(found[token].logprob), top)

    # --- Adapters -----------------------------------------------------------------------------------------------------

    def _lora_request(self, adapter: LoRAAdapter | None) -> Any:
        """What vLLM knows an adapter by, once it has loaded it; None: no adapter.

        Raises:
            ValueError: its rank is above the limit, or vLLM does not take it.
        """
        if adapter is None:
            return None
        if (kept := self._loaded.get(adapter)) is not None:
            return kept
        from vllm.lora.request import LoRARequest

        if adapter.rank > self.max_lora_rank:
            raise ValueError(
                f"The adapter has rank {adapter.rank}, and vLLM was started with at most {self.max_lora_rank}. Serve "
                f"with a higher --max-lora-rank (up to {MAX_LORA_RANKS[-1]}), or give a shorter document."
            )
        number = next(self._numbers)
        folder = Path(self._folder.name) / f"adapter-{number}"
        # It was joined before, and is used by its sum: to a hypernetwork trained with ridge that has to be said.
        export_vllm(adapter if adapter.is_fused else adapter.fused("sum"), folder, max_lora_rank=self.max_lora_rank)
        request = LoRARequest(folder.name, number, str(folder))
        try:
            self._llm.add_lora(request)
        except Exception as error:
            shutil.rmtree(folder, ignore_errors=True)
            raise ValueError(f"vLLM does not take the adapter: {' '.join(str(error).split())}") from error
        self._loaded[adapter] = request
        weakref.finalize(adapter, _drop, self._gone, number, folder)
        return request

    def _unload(self) -> None:
        """Takes out of vLLM what nothing uses any more."""
        while self._gone:
            self._llm.remove_lora(self._gone.popleft())


def _drop(gone: "deque[int]", number: int, folder: Path) -> None:
    """By whichever thread let go of the adapter last; vLLM itself belongs to the model's."""
    shutil.rmtree(folder, ignore_errors=True)
    gone.append(number)
