"""LoRAAdapter: what a document became, one LoRA block per chunk, and its folder on disk (PEFT's format).

    both = adapter_of_document_1 + adapter_of_document_2  # the chunks of both; the shared bias block stays single
    both.save("adapters/both")  # the chunks as generated; in other programs they add up to their plain sum
    both.fused().save("adapters/plain")  # joined as trained: PeftModel.from_pretrained(base_model, "adapters/plain")
    again = LoRAAdapter.load("adapters/both", base_model_fingerprint=fingerprint)

An adapter says what it contains: `provenance` names its documents with their hashes and chunk spans, the hypernetwork,
the base model and the versions, and travels with it through + and the disk. Axis letters: hypernet/__init__.py.
"""

import hashlib
import json
import logging
import reprlib
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

import torch
import torch.nn.functional as F
from einops import rearrange
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from hypernet.adapters.joining import Joining, distinct, separated
from hypernet.base.catalog import KNOWN_BASE_MODELS, folder_of, is_fetched
from hypernet.base.targets import LoRATarget
from hypernet.io.files import replaced_folder, save_tensors

log = logging.getLogger(__name__)

_FORMAT_VERSION = 1
_CONFIG_FILE, _WEIGHTS_FILE, PROVENANCE_FILE = "adapter_config.json", "adapter_model.safetensors", "provenance.json"
MOST_NAMED = 5  # documents in a warning
PER_CHUNK = ("chunks", "passages")  # lists in a document's entry with one item per chunk
PROVENANCE_KEYS = ("documents", "generator", "base_model", "versions", "created")
ADAPTER_FILES = (_CONFIG_FILE, _WEIGHTS_FILE, PROVENANCE_FILE)
# Entries of provenance["operations"] after which documents cannot come or go, and why.
FINAL_OPERATIONS = {
    "compress": "made one block of its chunks and bias block",
    "pad": "made one block of its chunks and bias block",
    "fused": "joined its chunks for good",
    "decorrelate": "separated its documents from one another",  # of version 0.1
}


def new_provenance(
    documents: Sequence[dict[str, Any]],
    *,
    generator: str | None,
    base_model_name: str | None,
    base_model_fingerprint: str | None,
    joining: Joining | None = None,
) -> dict[str, Any]:
    """What an adapter made now contains and where it comes from, ready for JSON.

    Args:
        documents: one dict per document, in the order of the adapter's chunks: sha256, text_sha256 (of the cleaned
            text without the blanks around it), characters, name; chunks, the [start, end] characters of each chunk; and
            passages, a hash of each chunk's wording.
        generator: fingerprint of the hypernetwork.
        base_model_name: hub name or folder, written to PEFT's adapter_config.json; see `absolute_source`.
        base_model_fingerprint: fingerprint of the base model's weights.
        joining: how the hypernetwork was trained to have its chunks joined.
    """
    import transformers  # seconds, and nothing else here needs it

    from hypernet import __version__

    return {
        "documents": list(documents),
        "generator": generator,
        "base_model": {"name": absolute_source(base_model_name), "fingerprint": base_model_fingerprint},
        "versions": {"hypernet": __version__, "torch": torch.__version__, "transformers": transformers.__version__},
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        **({} if joining is None else {"joining": joining.plain()}),
    }


def warn_of_same(documents: Sequence[Sequence[dict[str, Any]]]) -> None:
    """Names, in one line of the log, documents with the text of one before.

    Args:
        documents: entries of a provenance, in groups; what is the same within a group was named when it was made.
    """
    first: dict[Any, str] = {}
    same = []
    number = 0
    for group in documents:
        new: dict[Any, str] = {}
        for entry in group:
            number += 1
            text, label = entry.get("text_sha256", entry.get("sha256")), f"{number} ({entry.get('name')})"
            if text in first:
                same.append(f"{label} is {first[text]}")
            else:
                new.setdefault(text, label)
        first |= new
    if same:
        more = [f"and {len(same) - MOST_NAMED} more"] if len(same) > MOST_NAMED else []
        named = "; ".join(same[:MOST_NAMED] + more)
        log.warning("Documents given several times count once: %s. Leave them out to save their memory.", named)


def absolute_source(base_model_name: str | None) -> str | None:
    """The name by which a base model is found from any directory: the absolute path of a local
    folder or of a fetched base model, any other as it is.

    As in transformers, a folder comes before a model of that name on the hub.
    """
    if not base_model_name:
        return base_model_name
    folder = Path(base_model_name).expanduser()
    if (folder / "config.json").is_file():
        return str(folder.resolve())
    fetched = base_model_name in KNOWN_BASE_MODELS and is_fetched(base_model_name)
    return str(folder_of(base_model_name)) if fetched else base_model_name


@dataclass(frozen=True, eq=False)
class LoRAAdapter:
    """LoRA weights of one or more documents: C chunks of rank R and one bias block of rank R_b that counts once.

    By itself it adds scaling * (the sum of B_cᵀA_c over the chunks + bias_Bᵀ bias_A) x to a target layer; where it is
    used its chunks can be joined in other ways (`hypernet.adapters.joining`). The order of the chunks is free, and the
    total rank is C * R + R_b. R_b is R, or 0 where the hypernetwork has no block that documents share.

    Attributes:
        targets: the layers it is for.
        A, B: target name to [C, L, R, d_in] and [C, L, R, d_out]; zero beyond the width of a narrower layer.
        bias_A, bias_B: target name to [L, R_b, d_in] and [L, R_b, d_out]; the hypernetwork's, the same for all its
            adapters.
        scaling: factor on BA, not divided by the rank.
        provenance: what `new_provenance` returns.

    Raises:
        ValueError: if a name or shape does not fit the targets, or provenance lacks a key.
    """

    targets: tuple[LoRATarget, ...]
    A: dict[str, Tensor]
    B: dict[str, Tensor]
    bias_A: dict[str, Tensor]
    bias_B: dict[str, Tensor]
    scaling: float
    provenance: dict[str, Any]

    def __post_init__(self) -> None:
        object.__setattr__(self, "targets", tuple(self.targets))
        base_model = self.provenance.get("base_model")
        if not set(PROVENANCE_KEYS) <= set(self.provenance) or not {"name", "fingerprint"} <= set(base_model or ()):
            raise ValueError(
                f"Expected provenance with {', '.join(PROVENANCE_KEYS)}, and name and fingerprint in base_model, "
                f"got {self.provenance}. Make it with new_provenance()."
            )
        names = [target.name for target in self.targets]
        for field, tensors in self._tensors().items():
            if not names or set(tensors) != set(names):
                raise ValueError(
                    f"Expected {field} for the targets {names}, got {list(tensors)}. Give one tensor per target."
                )
        num_chunks, _, rank, _ = self.A[names[0]].shape if self.A[names[0]].ndim == 4 else (0, 0, 0, 0)
        for target in self.targets:
            bias_rank = 0 if self.bias_A[names[0]].shape[1:2] == (0,) else rank
            expected = _shapes(target, num_chunks=num_chunks, rank=rank, bias_rank=bias_rank)
            shapes = {field: tuple(tensors[target.name].shape) for field, tensors in self._tensors().items()}
            if shapes != expected:
                raise ValueError(
                    f"The weights of {target.name} do not fit: expected A [C, L, R, d_in], B [C, L, R, d_out] and bias "
                    f"blocks without C, or with 0 for R, with L {len(target.paths)}, d_in {target.d_in}, d_out "
                    f"{target.d_out}, and C and R the same for all targets; got {shapes}."
                )

    @property
    def num_chunks(self) -> int:
        """C."""
        return next(iter(self.A.values())).shape[0]

    @property
    def rank_per_chunk(self) -> int:
        """R."""
        return next(iter(self.A.values())).shape[2]

    @property
    def bias_rank(self) -> int:
        """R_b: that of the bias block, 0 where there is none."""
        return next(iter(self.bias_A.values())).shape[1]

    @property
    def rank(self) -> int:
        """Total rank C * R + R_b of the concatenated chunks and bias block."""
        return self.num_chunks * self.rank_per_chunk + self.bias_rank

    @property
    def num_bytes(self) -> int:
        """Bytes of the weights, with the bias block; as they are on disk, without the padding of narrower layers."""
        return sum(
            self.rank * (module.d_in * self.A[target.name].itemsize + module.d_out * self.B[target.name].itemsize)
            for target in self.targets
            for module in target.modules()
        )

    def __add__(self, other: Self) -> Self:
        """Both adapters' chunks, this one's first, in one adapter; the bias block still counts once.

        Raises:
            ValueError: as `with_chunks_of`.
        """
        return self.with_chunks_of([other]) if isinstance(other, LoRAAdapter) else NotImplemented

    def with_chunks_of(self, others: Sequence[Self], *, warn_of_copies: bool = True) -> Self:
        """This adapter's chunks, then each other's, in one adapter; the bias block still counts once.

        Args:
            warn_of_copies: whether the log names documents with the text of one before.

        Raises:
            TypeError: one is no adapter.
            ValueError: if they come from different hypernetworks, base models or targets, or one of FINAL_OPERATIONS
                was done.
        """
        adapters = [self, *others]
        for adapter in adapters:
            check_is_adapter(adapter)
            adapter.check_open("added to others")
        for other in others:
            self._check_same_generator(other)
        provenance = new_provenance(
            [document for adapter in adapters for document in adapter.provenance["documents"]],
            generator=self.provenance["generator"],
            base_model_name=self.provenance["base_model"]["name"],
            base_model_fingerprint=self.provenance["base_model"]["fingerprint"],
        )
        if warn_of_copies:
            warn_of_same([adapter.provenance["documents"] for adapter in adapters])
        if "joining" in self.provenance:
            provenance["joining"] = self.provenance["joining"]
        if operations := [entry for adapter in adapters for entry in adapter.provenance.get("operations", ())]:
            provenance["operations"] = operations
        return replace(
            self,
            A={name: torch.cat([adapter.A[name] for adapter in adapters]) for name in self.A},
            B={name: torch.cat([adapter.B[name] for adapter in adapters]) for name in self.B},
            provenance=provenance,
        )

    def check_open(self, action: str) -> None:
        """Refuses what needs documents that do not depend on one another, after one of FINAL_OPERATIONS.

        Args:
            action: what was to be done: "added to others".

        Raises:
            ValueError: one of them was done.
        """
        done = [entry.get("operation") for entry in self.provenance.get("operations", ())]
        if operation := next((name for name in done if name in FINAL_OPERATIONS), None):
            raise ValueError(
                f"This adapter cannot be {action}: {operation}() {FINAL_OPERATIONS[operation]}. "
                f"Do that first, with the adapter as it was before {operation}()."
            )

    def chunk_spans(self) -> list[tuple[int, int]]:
        """First chunk and one after the last of each document.

        Raises:
            ValueError: the provenance counts other chunks than the weights hold.
        """
        spans, start = [], 0
        for entry in self.provenance["documents"]:
            end = start + len(entry.get("chunks") or ())
            spans.append((start, end))
            start = end
        if start != self.num_chunks:
            raise ValueError(
                f"The provenance counts {start} chunks in {len(spans)} documents, the weights hold {self.num_chunks}: "
                "it is unknown whose they are. Generate the adapter again."
            )
        return spans

    def of_chunks(self, chunks: Sequence[int]) -> Self:
        """Some chunks alone; every document stays in the provenance, with what is left of its chunks.

        Args:
            chunks: ascending, each once.

        Raises:
            ValueError: as `chunk_spans`.
        """
        documents = []
        for entry, (start, end) in zip(self.provenance["documents"], self.chunk_spans(), strict=True):
            own = [chunk - start for chunk in chunks if start <= chunk < end]
            per_chunk = {key: [entry[key][chunk] for chunk in own] for key in PER_CHUNK if key in entry}
            documents.append({**entry, **per_chunk})
        return replace(
            self,
            A={name: rows[chunks] for name, rows in self.A.items()},
            B={name: rows[chunks] for name, rows in self.B.items()},
            provenance={**self.provenance, "documents": documents},
        )

    def without_copies(self, *, within: bool = False) -> Self:
        """Of a passage that several documents have, one copy is left (`hypernet.adapters.joining.distinct`).

        Args:
            within: also of one that a document has several times.

        Returns:
            This adapter where there are no copies, or its chunks are not as they were generated any more. Adapters made
            by version 0.1 do not say the wording of their chunks, and keep all.

        Raises:
            ValueError: as `chunk_spans`.
        """
        entries = self.provenance["documents"]
        if self.is_fused or not any("passages" in entry for entry in entries):
            return self
        chunks = distinct(
            self.A,
            self.B,
            self.targets,
            passages=[text for entry in entries for text in entry.get("passages", [None] * len(entry["chunks"]))],
            documents=[number for number, (start, end) in enumerate(self.chunk_spans()) for _ in range(start, end)],
            weights=[float(entry.get("weight", 1)) for entry in entries],
            within=within,
        )
        return self if len(chunks) == self.num_chunks else self.of_chunks(chunks)

    @property
    def is_fused(self) -> bool:
        """Whether its chunks are no longer as they were generated, so that only their sum is left to be used."""
        final = any(entry.get("operation") in FINAL_OPERATIONS for entry in self.provenance.get("operations", ()))
        return final or any(self._separated_before())

    def _separated_before(self) -> list[bool]:
        """For each document whether its chunks were separated when they were generated, as version 0.1 did it."""
        entries = self.provenance["documents"]
        return [entry.get("ridge") is not None and len(entry["chunks"]) > 1 for entry in entries]

    def check_keys(self, action: str) -> None:
        """Refuses what takes the rows of A for the keys of their chunks, where they are not as they were generated.

        Args:
            action: what was to be done: "routed".

        Raises:
            ValueError: as `check_open`; or its chunks were separated by version 0.1, when they were generated.
        """
        self.check_open(action)
        if any(self._separated_before()):
            raise ValueError(
                f"This adapter cannot be {action}: version 0.1 separated its chunks when it made it. Internalize the "
                "document again."
            )

    def fused(self, way: str | None = None, *, ridge: float | None = None) -> Self:
        """The chunks joined for good: one plain LoRA that any program uses as this one does.

        Args:
            way: "sum" or "ridge" (see `hypernet.adapters.joining`); None: as the hypernetwork was trained, which the
                provenance says.
            ridge: of "ridge"; None: the one that the hypernetwork was trained with.

        Returns:
            An adapter whose documents can neither come nor go any more, which is used as it is whatever the
            hypernetwork was trained for. Of copies of a passage one is in it. With a single chunk, or by "sum" where it
            was trained so and there are no copies: this one.

        Raises:
            ValueError: an unknown way; "gate" or "route", which choose for every question; no ridge is known; or the
                chunks are not as they were generated any more.
        """
        trained = self.provenance.get("joining", {"way": "sum"})
        if way is None and ridge is None and self.is_fused:
            return self
        way = way or ("ridge" if ridge is not None else trained["way"])
        if way in ("gate", "route"):
            raise ValueError(
                f"join={way} chooses chunks for every question, so it is no one LoRA. Fuse with sum or ridge, or save "
                "the adapter as it is and give join where it is used."
            )
        joining = Joining(way, ridge=trained.get("ridge") if way == "ridge" and ridge is None else ridge)
        plain_sum = joining.plain() == {"way": "sum"} == trained
        if not plain_sum:
            self.check_open("fused")
        if self.num_chunks < 2:
            return self
        adapter = self.without_copies()
        if plain_sum and adapter is self:
            return self
        A = adapter.A
        if joining.ridge is not None:
            counts = [end - start for start, end in adapter.chunk_spans()]
            done = self._separated_before()
            A = {name: separated(rows, counts, ridge=joining.ridge, done=done) for name, rows in A.items()}
        provenance = {
            **adapter.provenance,
            "operations": [
                *self.provenance.get("operations", ()),
                {
                    "operation": "fused",
                    **joining.plain(),
                    "documents": [entry.get("sha256") for entry in self.provenance["documents"]],
                },
            ],
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        return replace(adapter, A=A, provenance=provenance)

    def content_id(self) -> str:
        """SHA-256 of what the adapter is: its weights, targets, ranks, scaling, documents, base model and hypernetwork.

        The date, the versions and the documents' names do not count, nor what lies beyond a narrower layer's width.
        """
        structure = {
            "targets": [target.plain() for target in self.targets],
            "scaling": float(self.scaling),
            "num_chunks": self.num_chunks,
            "rank_per_chunk": self.rank_per_chunk,
            "documents": [document.get("sha256") for document in self.provenance["documents"]],
            "base_model": self.provenance["base_model"]["fingerprint"],
            "generator": self.provenance["generator"],
        }
        digest = hashlib.sha256(json.dumps(structure, sort_keys=True).encode())
        concatenated = self.concatenated()
        for target in self.targets:
            A, B = concatenated[target.name]
            for module in target.modules():
                for rows in (A[module.layer, :, : module.d_in], B[module.layer, :, : module.d_out]):
                    digest.update(f"{module.path} {rows.dtype} {list(rows.shape)}".encode())
                    digest.update(rows.detach().cpu().contiguous().view(torch.uint8).numpy().data)
        return digest.hexdigest()

    def to(self, device: torch.device | str | None = None, *, dtype: torch.dtype | None = None) -> Self:
        """The same adapter on another device or in another dtype."""
        moved: dict[str, Any] = {
            field: {name: tensor.to(device=device, dtype=dtype) for name, tensor in tensors.items()}
            for field, tensors in self._tensors().items()
        }
        return replace(self, **moved)

    def concatenated(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Target name to (A [L, rank, d_in], B [L, rank, d_out]): chunk after chunk, the bias block last."""

        def join(chunks: Tensor, bias: Tensor) -> Tensor:
            return torch.cat([rearrange(chunks, "c l r d -> l (c r) d"), bias], dim=1)

        return {name: (join(self.A[name], self.bias_A[name]), join(self.B[name], self.bias_B[name])) for name in self.A}

    def save(self, directory: str | Path, *, overwrite: bool = False) -> None:
        """Writes a folder that PEFT can load and `load` gives back exactly. All of it or, on any failure, nothing.

        Args:
            directory: the folder to make; folders above it are made too.
            overwrite: replace an adapter folder that is there.

        Raises:
            FileExistsError: if the folder exists, is not empty, and overwrite is False.
            ValueError: if overwrite is True and the folder holds other files than an adapter's, or if there are neither
                chunks nor a bias block to be written.
            OSError: if it cannot be written, for example for lack of space.
        """
        directory = Path(directory).expanduser().resolve()
        check_destination(directory, overwrite=overwrite)
        with replaced_folder(directory) as folder:
            self.write_files(folder)

    def write_files(self, folder: Path) -> None:
        """Writes the adapter's files into a folder that is there; `save` is the one that never leaves half of them."""
        if not self.rank:
            raise ValueError(
                "This adapter is empty: it has no documents, and its hypernetwork no block that documents share. PEFT "
                "has no LoRA of rank 0; use the base model as it is."
            )
        state_dict = {}
        concatenated = self.concatenated()
        for target in self.targets:
            A, B = concatenated[target.name]
            for module in target.modules():
                A_l, B_l = A[module.layer, :, : module.d_in], B[module.layer, :, : module.d_out]
                state_dict[f"base_model.model.{module.path}.lora_A.weight"] = A_l.detach().cpu().contiguous()
                state_dict[f"base_model.model.{module.path}.lora_B.weight"] = B_l.detach().cpu().T.contiguous()
        config = self._peft_config()
        structure = {
            "format_version": _FORMAT_VERSION,
            "rank_per_chunk": self.rank_per_chunk,
            "num_chunks": self.num_chunks,
            "rank": self.rank,
            "scaling": self.scaling,
            "targets": [target.plain() for target in self.targets],
        }
        (folder / _CONFIG_FILE).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        (folder / PROVENANCE_FILE).write_text(
            json.dumps(self.provenance | structure, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
        )
        save_tensors(state_dict, folder / _WEIGHTS_FILE, metadata={"format": "pt"})
        # safetensors writes with mode 0600, whatever the umask.
        shutil.copymode(folder / _CONFIG_FILE, folder / _WEIGHTS_FILE)

    @classmethod
    def load(cls, directory: str | Path, *, base_model_fingerprint: str | None = None) -> Self:
        """Reads a folder that `save` wrote: chunks, bias block, dtype and provenance exactly, on the CPU.

        Args:
            directory: the adapter folder.
            base_model_fingerprint: fingerprint of the base model it is meant for; None skips the check.

        Raises:
            ValueError: if something is missing, damaged, from elsewhere, or made for another base model.
        """
        directory = Path(directory).expanduser()
        provenance = _read_provenance(directory)
        try:
            targets = tuple(LoRATarget.of(fields) for fields in provenance.pop("targets"))
            num_chunks, rank = int(provenance.pop("num_chunks")), int(provenance.pop("rank_per_chunk"))
            total_rank, scaling = int(provenance.pop("rank")), float(provenance.pop("scaling"))
            name, fingerprint = provenance["base_model"]["name"], provenance["base_model"]["fingerprint"]
            bias_rank = total_rank - num_chunks * rank
            if rank < 1 or bias_rank not in (0, rank):
                raise ValueError(f"rank {total_rank} is not {num_chunks} chunks * {rank}, with or without {rank} more")
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{directory / PROVENANCE_FILE} is damaged ({_one_line(error)}). Generate the adapter again."
            ) from error
        if base_model_fingerprint not in (None, fingerprint):
            raise ValueError(
                f"The adapter in {directory} was made for the base model {name} with fingerprint {fingerprint}, but "
                f"this base model has {base_model_fingerprint}. Load the right one, or generate the adapter again."
            )
        try:
            state_dict = load_file(directory / _WEIGHTS_FILE)
        except (SafetensorError, OSError) as error:
            raise ValueError(
                f"{directory / _WEIGHTS_FILE} cannot be read ({_one_line(error)}); it is probably cut off. "
                "Copy or generate the adapter again."
            ) from error

        fields: dict[str, dict[str, Tensor]] = {"A": {}, "B": {}, "bias_A": {}, "bias_B": {}}
        for target in targets:
            for letter, widest, transposed in (("A", target.d_in, False), ("B", target.d_out, True)):
                layers: list[Tensor | None] = [None] * len(target.paths)
                for module in target.modules():
                    d = module.d_out if transposed else module.d_in
                    expected = (d, total_rank) if transposed else (total_rank, d)
                    key = f"base_model.model.{module.path}.lora_{letter}.weight"
                    weight = state_dict.pop(key, None)
                    if weight is None or weight.shape != expected:
                        raise ValueError(
                            f"{directory / _WEIGHTS_FILE} does not fit {PROVENANCE_FILE}: expected {key} "
                            f"{list(expected)}, got {'nothing' if weight is None else list(weight.shape)}. "
                            "Generate the adapter again."
                        )
                    weight = weight.T if transposed else weight
                    layers[module.layer] = weight if d == widest else F.pad(weight, (0, widest - d))
                zeros = torch.zeros_like(next(layer for layer in layers if layer is not None))
                stacked = torch.stack([zeros if layer is None else layer for layer in layers])
                chunks, bias = stacked.split([num_chunks * rank, bias_rank], dim=1)
                fields[letter][target.name] = rearrange(chunks, "l (c r) d -> c l r d", r=rank)
                fields[f"bias_{letter}"][target.name] = bias
        if state_dict:
            raise ValueError(
                f"{directory / _WEIGHTS_FILE} holds weights that {PROVENANCE_FILE} does not name, such as "
                f"{min(state_dict)}. Generate the adapter again."
            )
        return cls(targets=targets, scaling=scaling, provenance=provenance, **fields)

    def _tensors(self) -> dict[str, dict[str, Tensor]]:
        return {"A": self.A, "B": self.B, "bias_A": self.bias_A, "bias_B": self.bias_B}

    def _check_same_generator(self, other: Self) -> None:
        def identity(adapter: Self) -> dict[str, Any]:
            return {
                "hypernetwork": adapter.provenance["generator"],
                "base model": adapter.provenance["base_model"]["fingerprint"],
                "targets": adapter.targets,
                "scaling": adapter.scaling,
                "rank per chunk": adapter.rank_per_chunk,
                "rank of the bias block": adapter.bias_rank,
            }

        theirs = identity(other)
        differing = [
            f"{what} {mine} and {theirs[what]}" for what, mine in identity(self).items() if mine != theirs[what]
        ]
        for name in () if differing else self.bias_A:
            for a, b in ((self.bias_A[name], other.bias_A[name]), (self.bias_B[name], other.bias_B[name])):
                if (a.dtype, a.device) != (b.dtype, b.device):
                    raise ValueError(
                        f"Adapters to be added must agree in dtype and device, got {a.dtype} on {a.device} and "
                        f"{b.dtype} on {b.device}. Move one with .to() first."
                    )
                if not torch.equal(a, b):
                    differing = [f"different bias blocks for {name}"]
                    if self.provenance.get("operations") or other.provenance.get("operations"):
                        differing.append("been scaled differently (scale the sum instead)")
        if differing:
            raise ValueError(
                f"Only adapters of one hypernetwork can be added; these have {', '.join(differing)}. "
                "Generate both with one checkpoint."
            )

    def _peft_config(self) -> dict[str, Any]:
        from peft import LoraConfig  # seconds, and only saving needs it

        config = LoraConfig(
            r=self.rank,
            # PEFT divides by r.
            lora_alpha=self.scaling * self.rank,  # type: ignore[arg-type]  # any number; declared as int
            # Whole paths: a bare name could also match modules outside the targets, such as a vision tower's.
            target_modules=[module.path for target in self.targets for module in target.modules()],
            task_type="CAUSAL_LM",
            base_model_name_or_path=absolute_source(self.provenance["base_model"]["name"]),
            inference_mode=True,
        ).to_dict()
        # PEFT keeps some lists as sets, whose order changes from process to process.
        return {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}


def check_is_adapter(value: Any) -> None:
    """Raises TypeError of one line for anything but a `LoRAAdapter`, such as the path of one."""
    if not isinstance(value, LoRAAdapter):
        raise TypeError(
            f"Expected a LoRAAdapter, got {reprlib.repr(value)} of type {type(value).__name__}. A folder becomes one "
            "by LoRAAdapter.load(folder)."
        )


def check_destination(directory: str | Path, *, overwrite: bool = False) -> None:
    """Refuses a folder that `LoRAAdapter.save` would refuse; to be called before the work that leads there.

    Raises:
        FileExistsError: if the folder exists, is not empty, and overwrite is False; or if it is a file.
        ValueError: if overwrite is True and the folder holds other files than an adapter's.
    """
    directory = Path(directory).expanduser()
    if not directory.exists():
        return
    if not directory.is_dir():
        raise FileExistsError(f"{directory} is a file. Name a folder for the adapter.")
    found = {path.name for path in directory.iterdir()}
    if not found:
        return
    foreign = sorted(found - set(ADAPTER_FILES))
    is_adapters = not foreign and _CONFIG_FILE in found
    if not overwrite:
        replace_it = ", or set overwrite=True" if is_adapters else ""
        raise FileExistsError(f"{directory} exists and is not empty. Name another folder{replace_it}.")
    if not is_adapters:
        reason = f"it also holds {foreign[:3]}" if _CONFIG_FILE in found else f"it has no {_CONFIG_FILE}"
        raise ValueError(
            f"{directory} is not replaced: it should hold nothing but an adapter, but {reason}. Name another folder."
        )


def _shapes(target: LoRATarget, *, num_chunks: int, rank: int, bias_rank: int) -> dict[str, tuple[int, ...]]:
    num_layers = len(target.paths)
    return {
        "A": (num_chunks, num_layers, rank, target.d_in),
        "B": (num_chunks, num_layers, rank, target.d_out),
        "bias_A": (num_layers, bias_rank, target.d_in),
        "bias_B": (num_layers, bias_rank, target.d_out),
    }


def _read_provenance(directory: Path) -> dict[str, Any]:
    if not directory.is_dir():
        raise ValueError(f"No adapter folder at {directory}. Check the path, or generate the adapter first.")
    missing = [name for name in ADAPTER_FILES if not (directory / name).is_file()]
    if missing == [PROVENANCE_FILE]:
        raise ValueError(
            f"{directory} is a PEFT adapter without {PROVENANCE_FILE}, so its chunks are unknown. "
            "Load it with peft.PeftModel.from_pretrained instead."
        )
    if missing:
        raise ValueError(f"{directory} is not a complete adapter folder: {', '.join(missing)} missing. Copy it again.")
    try:
        provenance = json.loads((directory / PROVENANCE_FILE).read_bytes())  # bytes: with any mark
        version = provenance.pop("format_version")
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise ValueError(
            f"{directory / PROVENANCE_FILE} is damaged ({_one_line(error)}). Generate the adapter again."
        ) from error
    if version != _FORMAT_VERSION:
        raise ValueError(
            f"{directory} has adapter format {version}, this version reads format {_FORMAT_VERSION}. "
            "Generate the adapter again, or use the version that wrote it."
        )
    return provenance


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
