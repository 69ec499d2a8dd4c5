"""export_vllm: an adapter folder that `vllm serve` loads, of a rank it has room for, and the flags to serve it with.

    export = export_vllm(fenda + town, "outputs/served", max_lora_rank=64)
    print(export.command)         # vllm serve ... --enable-lora --max-lora-rank 64 --lora-modules served=...

What vLLM takes, from its documentation and sources, releases 0.11 to 0.26:
- --max-lora-rank is one of MAX_LORA_RANKS, and an adapter's r at most that. Every adapter is kept in buffers of that
  rank, so padding to it costs the server nothing. https://docs.vllm.ai/en/latest/api/vllm/config/lora/
- Of adapter_config.json it reads r, lora_alpha, target_modules, bias, modules_to_save, use_rslora and use_dora, and
  refuses DoRA, biases and saved modules; the factor is lora_alpha / r. PEFT's rank_pattern and alpha_pattern are not
  read, so all modules need one rank. https://docs.vllm.ai/en/latest/api/vllm/lora/peft_helper/
- Weights come from adapter_model.safetensors as base_model.model.<path>.lora_A.weight [r, d_in] and lora_B.weight
  [d_out, r]. These keys, not target_modules, say which modules there are; the last part of each path has to be a linear
  module of the served model. Parts of a fused module (q_proj of qkv_proj) go by their names in transformers, and not
  all of them need to be there. Paths with ".experts" mean mixture-of-experts weights of another layout.
  https://github.com/vllm-project/vllm/blob/main/vllm/lora/lora_model.py, and utils.py and model_manager.py next to it
- Weights are cast to --lora-dtype when loaded (auto: the base model's), and B is multiplied by the factor in that
  dtype. https://docs.vllm.ai/en/stable/api/vllm/lora/lora_weights/
"""

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from hypernet.adapters.adapter import LoRAAdapter, absolute_source, check_destination, check_is_adapter
from hypernet.adapters.composition import CompressionReport, compress, pad

# MaxLoRARanks in vllm/config/lora.py. Release 0.11.0 does not know 1 yet; rank 1 loads with --max-lora-rank 8 too.
MAX_LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
# LoRADType in vllm/config/lora.py names the two half precisions; a float32 file is cast to the served one.
VLLM_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True)
class VLLMExport:
    """What `export_vllm` wrote.

    Attributes:
        directory: the adapter folder.
        rank_before, rank: total rank of the adapter, and of the folder.
        max_lora_rank: the least that vLLM has to be started with.
        compression: what was lost; None where the delta is unchanged.
        base_model_name: hub name or absolute folder of the base model, None if unknown.
    """

    directory: Path
    rank_before: int
    rank: int
    max_lora_rank: int
    compression: CompressionReport | None
    base_model_name: str | None

    @property
    def serve_arguments(self) -> tuple[str, ...]:
        """What `vllm serve <base model>` needs to serve it as a model of the folder's name."""
        module = f"{self.directory.name}={self.directory}"
        return ("--enable-lora", "--max-lora-rank", str(self.max_lora_rank), "--lora-modules", module)

    @property
    def command(self) -> str:
        return shlex.join(["vllm", "serve", self.base_model_name or "BASE_MODEL", *self.serve_arguments])


def export_vllm(
    adapter: LoRAAdapter,
    directory: str | Path,
    *,
    max_lora_rank: int | None = None,
    dtype: str | None = None,
    fit: Literal["pad", "compress"] = "pad",
    overwrite: bool = False,
) -> VLLMExport:
    """Writes an adapter folder for vLLM. PEFT and `LoRAAdapter.load` read it too.

    A total rank that vLLM has no buffers of is padded with rows of zeros to the next one that it has: the delta is the
    same, exactly, and lora_alpha grows with r. A total rank above the limit is compressed to it, if that is allowed.

    Args:
        adapter: any, compressed ones too. Its chunks are joined as the hypernetwork was trained
            (`LoRAAdapter.fused`); fuse it before for another way.
        directory: the folder to make; its name is the model's name at the server.
        max_lora_rank: what the server is, or can be, started with; None: the most there is.
        dtype: float16, bfloat16 or float32; None: the adapter's own.
        fit: "pad" never changes the delta and refuses a rank above the limit; "compress" reduces it there.
        overwrite: replace an adapter folder that is there.

    Raises:
        ValueError: a setting is none of these, the rank is above the limit and `fit` is "pad", or the weights are such
            that vLLM would not take them.
        FileExistsError, OSError: as `LoRAAdapter.save`.
    """
    check_is_adapter(adapter)
    limit = MAX_LORA_RANKS[-1] if max_lora_rank is None else max_lora_rank
    if isinstance(limit, bool) or limit not in MAX_LORA_RANKS:
        raise ValueError(f"Expected max_lora_rank to be one of {MAX_LORA_RANKS}, got {limit!r}.")
    if fit not in ("pad", "compress"):
        raise ValueError(f'Expected fit to be "pad" or "compress", got {fit!r}.')
    if dtype is not None and dtype not in VLLM_DTYPES:
        raise ValueError(f"Expected dtype to be one of {', '.join(VLLM_DTYPES)}, got {dtype!r}.")
    directory = Path(directory).expanduser().resolve()
    check_destination(directory, overwrite=overwrite)
    adapter = adapter.fused()
    if expert := next((m.path for t in adapter.targets for m in t.modules() if ".experts" in m.path), None):
        raise ValueError(
            f"vLLM reads paths with .experts, such as {expert}, as mixture-of-experts weights of another layout. "
            "Export adapters without expert modules."
        )

    compression = None
    if adapter.rank > limit:
        if fit == "pad":
            raise ValueError(
                f"The adapter's total rank is {adapter.rank}, vLLM's limit here {limit}. Raise max_lora_rank (up to "
                f'{MAX_LORA_RANKS[-1]}), use fewer chunks, or set fit="compress" to lose some of it.'
            )
        exported, compression = compress(adapter, limit)
    else:
        rank = next(rank for rank in MAX_LORA_RANKS if rank >= adapter.rank)
        exported = adapter if rank == adapter.rank else pad(adapter, rank)
    exported = exported if dtype is None else exported.to(dtype=VLLM_DTYPES[dtype])
    _check_weights(exported)
    exported.save(directory, overwrite=overwrite)
    return VLLMExport(
        directory=directory,
        rank_before=adapter.rank,
        rank=exported.rank,
        max_lora_rank=exported.rank,
        compression=compression,
        base_model_name=absolute_source(adapter.provenance["base_model"]["name"]),
    )


def _check_weights(adapter: LoRAAdapter) -> None:
    """Refuses what the server would turn into infinities, or has no dtype for."""
    for name, (A, B) in adapter.concatenated().items():
        for rows in (A, B):
            if rows.dtype not in VLLM_DTYPES.values():
                raise ValueError(f"vLLM has no {rows.dtype} weights. Set dtype to one of {', '.join(VLLM_DTYPES)}.")
        # vLLM multiplies B by the factor in the weights' dtype.
        if not (A.isfinite().all() and (B * adapter.scaling).isfinite().all()):
            raise ValueError(
                f"The weights of {name}, with the scaling {adapter.scaling:g}, do not all fit into {B.dtype}. "
                "Set dtype=bfloat16, or generate the adapter again if they are not finite."
            )
