"""A stand-in for the package vllm where that is not installed: its engine's interface and its documented limits.

It knows nothing of hypernet: adapters are read from their folders, and answers come from transformers and PEFT, one
sequence at a time, without a cache. What vLLM refuses it refuses; where vLLM would go wrong silently, such as an
adapter under a number that another one has, it raises. The limits, from vLLM's documentation and sources (see
hypernet/interop/vllm.py for the addresses), are written down here a second time.
"""

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import load_file

from vllm.lora.request import LoRARequest
from vllm.sampling_params import RequestOutputKind, SamplingParams

__all__ = ["EngineArgs", "LLMEngine", "SamplingParams"]
MADE: list["LLMEngine"] = []  # for tests to look into
_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
# The linear modules of vLLM's Llama, qkv_proj and gate_up_proj as the parts they are packed from.
_MODULES = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


class EngineArgs:
    def __init__(
        self,
        *,
        model: str,
        skip_tokenizer_init: bool = False,
        enable_lora: bool = False,
        max_lora_rank: int = 16,
        max_loras: int = 1,
        max_cpu_loras: int | None = None,
        max_num_seqs: int = 256,
        disable_log_stats: bool = False,
    ) -> None:
        if max_lora_rank not in _RANKS:
            raise ValueError(f"max_lora_rank: Input should be one of {_RANKS}")
        if max_loras < 1 or (max_cpu_loras is not None and max_cpu_loras < max_loras):
            raise ValueError("max_cpu_loras must be >= max_loras >= 1")
        if not (Path(model) / "config.json").is_file():
            raise ValueError(f"no folder of a model: {model}")
        vars(self).update(locals())


class LLMEngine:
    def __init__(self, args: EngineArgs) -> None:
        from transformers import AutoModelForCausalLM

        self.args, self.waiting, self.running = args, [], []
        self.model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
        self.loaded: dict[int, LoRARequest] = {}
        self.most_loras = 0
        MADE.append(self)

    @classmethod
    def from_engine_args(cls, engine_args: EngineArgs) -> "LLMEngine":
        return cls(engine_args)

    def add_request(
        self, request_id: str, prompt: Any, params: SamplingParams, *, lora_request: LoRARequest | None = None
    ) -> None:
        ids = prompt["prompt_token_ids"]
        if any(one.id == request_id for one in [*self.waiting, *self.running]):
            raise ValueError(f"request {request_id} is there already")
        if self.args.skip_tokenizer_init and (params.detokenize or params.stop):
            raise ValueError("stop strings and texts need a tokenizer")
        if params.output_kind is not RequestOutputKind.DELTA:
            raise ValueError("output_kind must be DELTA: the stand-in gives what is new alone")
        config = self.model.config
        if not ids or len(ids) >= config.max_position_embeddings or max(ids) >= config.vocab_size:
            raise ValueError("the prompt does not fit the model")
        if lora_request is not None:
            self._check(lora_request)
        self.waiting.append(SimpleNamespace(id=request_id, ids=list(ids), new=[], params=params, lora=lora_request))

    def abort_request(self, request_ids: list[str]) -> None:
        self.waiting = [one for one in self.waiting if one.id not in request_ids]
        self.running = [one for one in self.running if one.id not in request_ids]

    def has_unfinished_requests(self) -> bool:
        return bool(self.waiting or self.running)

    def step(self) -> list[Any]:
        if not self.has_unfinished_requests():
            raise RuntimeError("vLLM would wait for ever: there is no request")
        for one in list(self.waiting):  # in their order; one whose adapter has no room lets others by
            loras = {other.lora.lora_int_id for other in self.running if other.lora} | (
                {one.lora.lora_int_id} if one.lora else set()
            )
            if len(self.running) < self.args.max_num_seqs and len(loras) <= self.args.max_loras:
                self.waiting.remove(one)
                self.running.append(one)
                self.most_loras = max(self.most_loras, len(loras))
        return [self._advanced(one) for one in list(self.running)]

    def add_lora(self, lora_request: LoRARequest) -> bool:
        self._check(lora_request)
        if lora_request.lora_int_id in self.loaded:
            return False
        _read(Path(lora_request.lora_path), self.args.max_lora_rank)
        self.loaded[lora_request.lora_int_id] = lora_request
        return True

    def remove_lora(self, lora_id: int) -> bool:
        return self.loaded.pop(lora_id, None) is not None

    def list_loras(self) -> set[int]:
        return set(self.loaded)

    def _check(self, lora: LoRARequest) -> None:
        if not self.args.enable_lora:
            raise ValueError("LoRA is not enabled")
        other = self.loaded.get(lora.lora_int_id)
        if other is not None and other.lora_path != lora.lora_path:
            raise AssertionError(f"vLLM would answer from {other.lora_path}, which has the number too")

    @torch.no_grad()
    def _advanced(self, one: Any) -> Any:
        ids = torch.tensor([one.ids + one.new])
        if one.lora is None:
            logits = self.model(ids).logits[0, -1]
        else:
            from peft import PeftModel

            with_lora = PeftModel.from_pretrained(self.model, one.lora.lora_path)
            logits = with_lora(ids).logits[0, -1]
            self.model = with_lora.unload()
        log_p = logits.float().log_softmax(-1)
        token = int(log_p.argmax())
        if one.params.temperature:
            generator = torch.Generator().manual_seed((one.params.seed or 0) + len(one.new))
            token = int(torch.multinomial((logits / one.params.temperature).softmax(-1), 1, generator=generator))
        one.new.append(token)
        reason = None
        if token in one.params.stop_token_ids or token == self.model.config.eos_token_id:
            reason = "stop"
        elif len(one.new) >= one.params.max_tokens or ids.shape[1] + 1 >= self.model.config.max_position_embeddings:
            reason = "length"
        if reason:
            self.running.remove(one)
        logprobs = None
        if one.params.logprobs is not None:
            best = {token, *log_p.topk(one.params.logprobs).indices.tolist()} if one.params.logprobs else {token}
            logprobs = [{other: SimpleNamespace(logprob=float(log_p[other]), decoded_token=None) for other in best}]
        found = SimpleNamespace(index=0, text="", token_ids=[token], logprobs=logprobs, finish_reason=reason)
        return SimpleNamespace(request_id=one.id, outputs=[found], finished=reason is not None)


def _read(folder: Path, max_lora_rank: int) -> None:
    """Raises ValueError where vLLM refuses the folder."""
    config = json.loads((folder / "adapter_config.json").read_text())
    wrong = [name for name in ("use_dora", "modules_to_save") if config.get(name)]
    if wrong or config["bias"] != "none":
        raise ValueError(f"vLLM does not support {', '.join(wrong) or 'bias'}")
    if config.get("rank_pattern") or config.get("alpha_pattern"):
        raise ValueError("vLLM does not read rank_pattern and alpha_pattern")
    if not isinstance(config["r"], int) or config["r"] > max_lora_rank:
        raise ValueError(f"LoRA rank {config['r']} is greater than max_lora_rank {max_lora_rank}.")
    for key, weight in load_file(folder / "adapter_model.safetensors").items():
        path, letter = re.fullmatch(r"base_model\.model\.(.+)\.lora_([AB])\.weight", key).groups()
        if path.rsplit(".", 1)[-1] not in _MODULES:
            raise ValueError(f"expected target modules in {sorted(_MODULES)} but received {path}")
        if weight.shape["AB".index(letter)] != config["r"]:
            raise ValueError(f"{key} has another rank than {config['r']}")
