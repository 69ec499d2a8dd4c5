"""LoRAAdapter: what a document became, one LoRA block per chunk, and its folder on disk (PEFT's format).

    targets = find_targets(base_model, ["down_proj"])
    both = adapter_of_document_1 + adapter_of_document_2  # the chunks of both; the shared bias block stays single
    both.save("adapters/both")  # PeftModel.from_pretrained(base_model, "adapters/both") works
    again = LoRAAdapter.load("adapters/both", base_model_fingerprint=fingerprint)

An adapter says what it contains: `provenance` names its documents with their hashes and chunk spans, the generator, the
base model and the versions, and travels with it through + and the disk. Axis letters: hypernet/__init__.py.
"""

import json
import re
import shutil
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from einops import rearrange
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from hypernet.files import save_tensors

FORMAT_VERSION = 1
CONFIG_FILE, WEIGHTS_FILE, PROVENANCE_FILE = "adapter_config.json", "adapter_model.safetensors", "provenance.json"
PROVENANCE_KEYS = ("documents", "generator", "base_model", "versions", "created")
ADAPTER_FILES = (CONFIG_FILE, WEIGHTS_FILE, PROVENANCE_FILE)


class LoRATarget(NamedTuple):
    """One kind of linear layer that gets LoRA weights, in every layer of the base model."""

    name: str  # last part of the module path: "down_proj"
    paths: tuple[str, ...]  # module path in each layer, in layer order
    d_in: int
    d_out: int


def find_targets(base_model: nn.Module, target_modules: Sequence[str]) -> list[LoRATarget]:
    """The nn.Linear modules with these names, one per layer, sorted by name.

    Args:
        base_model: the model to look through.
        target_modules: last parts of module paths, such as "down_proj".

    Raises:
        ValueError: for a name that no nn.Linear has, or whose modules are not one per layer, all of one shape.
    """
    by_name: dict[str, dict[str, nn.Linear]] = {}
    for path, module in base_model.named_modules():
        if isinstance(module, nn.Linear):
            by_name.setdefault(path.rpartition(".")[2], {})[path] = module
    # A string is a sequence of letters, and each would be looked up as a name.
    names = [target_modules] if isinstance(target_modules, str) else sorted(set(target_modules))
    if not names:
        raise ValueError(f"No target modules given. Set target_modules to some of {sorted(by_name)}.")

    targets = []
    for name in names:
        if name not in by_name:
            raise ValueError(
                f"No nn.Linear named {name!r} in {type(base_model).__name__}; it has {sorted(by_name)}. "
                "Set target_modules to some of these."
            )
        shapes = {(module.in_features, module.out_features) for module in by_name[name].values()}
        if len(shapes) > 1:
            raise ValueError(
                f"The modules named {name!r} have different shapes (d_in, d_out): {sorted(shapes)}. "
                "Set target_modules to names whose modules have one shape in all layers."
            )
        ((d_in, d_out),) = shapes
        stems = {re.sub(r"(?<![^.])\d+(?![^.])", "*", path) for path in by_name[name]}
        if len(stems) > 1 or min(stems).count("*") != 1:
            raise ValueError(
                f"The modules named {name!r} are not one per layer: {sorted(stems)}. "
                "Set target_modules to names that occur once in each layer."
            )
        targets.append(LoRATarget(name, tuple(by_name[name]), d_in, d_out))
    num_layers = {target.name: len(target.paths) for target in targets}
    if len(set(num_layers.values())) > 1:
        raise ValueError(
            f"All targets must be in the same number of layers, got {num_layers}. "
            "Leave out the names that some layers lack."
        )
    return targets


def new_provenance(
    documents: Sequence[dict[str, Any]],
    *,
    generator: str | None,
    base_model_name: str | None,
    base_model_fingerprint: str | None,
) -> dict[str, Any]:
    """What an adapter made now contains and where it comes from, ready for JSON.

    Args:
        documents: one dict per document, in the order of the adapter's chunks: sha256, characters, name and
            chunks, the [start, end] characters of each chunk.
        generator: fingerprint of the hypernetwork.
        base_model_name: hub name or folder, written to PEFT's adapter_config.json.
        base_model_fingerprint: fingerprint of the base model's weights.
    """
    import transformers  # seconds, and nothing else here needs it

    from hypernet import __version__

    return {
        "documents": list(documents),
        "generator": generator,
        "base_model": {"name": base_model_name, "fingerprint": base_model_fingerprint},
        "versions": {"hypernet": __version__, "torch": torch.__version__, "transformers": transformers.__version__},
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }


@dataclass(frozen=True, eq=False)
class LoRAAdapter:
    """LoRA weights of one or more documents: C chunks of rank R and one bias block of rank R that counts once.

    On a target layer it adds scaling * (the sum of B_cᵀA_c over the chunks + bias_Bᵀ bias_A) x: the order of the chunks
    is free, and the total rank is (C + 1) * R.

    Attributes:
        targets: the layers it is for.
        A, B: target name to [C, L, R, d_in] and [C, L, R, d_out].
        bias_A, bias_B: target name to [L, R, d_in] and [L, R, d_out]; the generator's, the same for all its adapters.
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
            expected = _shapes(target, num_chunks=num_chunks, rank=rank)
            shapes = {field: tuple(tensors[target.name].shape) for field, tensors in self._tensors().items()}
            if shapes != expected:
                raise ValueError(
                    f"The weights of {target.name} do not fit: expected A [C, L, R, d_in], B [C, L, R, d_out] and bias "
                    f"blocks without C, with L {len(target.paths)}, d_in {target.d_in}, d_out {target.d_out}, and C "
                    f"and R the same for all targets; got {shapes}."
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
    def rank(self) -> int:
        """Total rank (C + 1) * R of the concatenated chunks and bias block."""
        return (self.num_chunks + 1) * self.rank_per_chunk

    @property
    def num_bytes(self) -> int:
        """Bytes of the weights, with the bias block."""
        return sum(tensor.nbytes for tensors in self._tensors().values() for tensor in tensors.values())

    def __add__(self, other: Self) -> Self:
        """Both adapters' chunks, this one's first, in one adapter; the bias block still counts once.

        Raises:
            ValueError: if the two come from different generators, base models or targets.
        """
        if not isinstance(other, LoRAAdapter):
            return NotImplemented
        self._check_same_generator(other)
        return replace(
            self,
            A={name: torch.cat([A, other.A[name]]) for name, A in self.A.items()},
            B={name: torch.cat([B, other.B[name]]) for name, B in self.B.items()},
            provenance=new_provenance(
                [*self.provenance["documents"], *other.provenance["documents"]],
                generator=self.provenance["generator"],
                base_model_name=self.provenance["base_model"]["name"],
                base_model_fingerprint=self.provenance["base_model"]["fingerprint"],
            ),
        )

    def to(self, device: torch.device | str | None = None, *, dtype: torch.dtype | None = None) -> Self:
        """The same adapter on another device or in another dtype."""
        moved = {
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
            ValueError: if overwrite is True and the folder holds other files than an adapter's.
            OSError: if it cannot be written, for example for lack of space.
        """
        directory = Path(directory).expanduser().resolve()
        check_destination(directory, overwrite=overwrite)
        state_dict = {}
        for target in self.targets:
            A, B = self.concatenated()[target.name]
            for path, A_l, B_l in zip(target.paths, A, B, strict=True):
                state_dict[f"base_model.model.{path}.lora_A.weight"] = A_l.detach().cpu().contiguous()
                state_dict[f"base_model.model.{path}.lora_B.weight"] = B_l.detach().cpu().T.contiguous()
        config = self._peft_config()
        structure = {
            "format_version": FORMAT_VERSION,
            "rank_per_chunk": self.rank_per_chunk,
            "num_chunks": self.num_chunks,
            "rank": self.rank,
            "scaling": self.scaling,
            "targets": [target._asdict() for target in self.targets],
        }
        with _atomic_folder(directory) as folder:
            (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
            (folder / PROVENANCE_FILE).write_text(
                json.dumps(self.provenance | structure, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
            )
            save_tensors(state_dict, folder / WEIGHTS_FILE, metadata={"format": "pt"})
            # safetensors writes with mode 0600, whatever the umask.
            shutil.copymode(folder / CONFIG_FILE, folder / WEIGHTS_FILE)

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
            targets = tuple(
                LoRATarget(str(t["name"]), tuple(t["paths"]), int(t["d_in"]), int(t["d_out"]))
                for t in provenance.pop("targets")
            )
            num_chunks, rank = int(provenance.pop("num_chunks")), int(provenance.pop("rank_per_chunk"))
            total_rank, scaling = int(provenance.pop("rank")), float(provenance.pop("scaling"))
            name, fingerprint = provenance["base_model"]["name"], provenance["base_model"]["fingerprint"]
            if rank < 1 or total_rank != (num_chunks + 1) * rank:
                raise ValueError(f"rank {total_rank} is not ({num_chunks} chunks + 1) * {rank}")
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
            state_dict = load_file(directory / WEIGHTS_FILE)
        except (SafetensorError, OSError) as error:
            raise ValueError(
                f"{directory / WEIGHTS_FILE} cannot be read ({_one_line(error)}); it is probably cut off. "
                "Copy or generate the adapter again."
            ) from error

        fields: dict[str, dict[str, Tensor]] = {"A": {}, "B": {}, "bias_A": {}, "bias_B": {}}
        for target in targets:
            for letter, d, transposed in (("A", target.d_in, False), ("B", target.d_out, True)):
                expected = (d, total_rank) if transposed else (total_rank, d)
                layers = []
                for path in target.paths:
                    key = f"base_model.model.{path}.lora_{letter}.weight"
                    weight = state_dict.pop(key, None)
                    if weight is None or weight.shape != expected:
                        raise ValueError(
                            f"{directory / WEIGHTS_FILE} does not fit {PROVENANCE_FILE}: expected {key} "
                            f"{list(expected)}, got {'nothing' if weight is None else list(weight.shape)}. "
                            "Generate the adapter again."
                        )
                    layers.append(weight.T if transposed else weight)
                rows = rearrange(torch.stack(layers), "l (c r) d -> c l r d", r=rank)
                fields[letter][target.name] = rows[:-1]
                fields[f"bias_{letter}"][target.name] = rows[-1]
        if state_dict:
            raise ValueError(
                f"{directory / WEIGHTS_FILE} holds weights that {PROVENANCE_FILE} does not name, such as "
                f"{min(state_dict)}. Generate the adapter again."
            )
        return cls(targets=targets, scaling=scaling, provenance=provenance, **fields)

    def _tensors(self) -> dict[str, dict[str, Tensor]]:
        return {"A": self.A, "B": self.B, "bias_A": self.bias_A, "bias_B": self.bias_B}

    def _check_same_generator(self, other: Self) -> None:
        def identity(adapter: Self) -> dict[str, Any]:
            return {
                "generator": adapter.provenance["generator"],
                "base model": adapter.provenance["base_model"]["fingerprint"],
                "targets": adapter.targets,
                "scaling": adapter.scaling,
                "rank per chunk": adapter.rank_per_chunk,
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
        if differing:
            raise ValueError(
                f"Only adapters of one generator can be added; these have {', '.join(differing)}. "
                "Generate both with one checkpoint."
            )

    def _peft_config(self) -> dict[str, Any]:
        from peft import LoraConfig  # seconds, and only saving needs it

        config = LoraConfig(
            r=self.rank,
            # PEFT divides by r.
            lora_alpha=self.scaling * self.rank,
            # Whole paths: a bare name could also match modules outside the targets, such as a vision tower's.
            target_modules=[path for target in self.targets for path in target.paths],
            task_type="CAUSAL_LM",
            base_model_name_or_path=self.provenance["base_model"]["name"],
            inference_mode=True,
        ).to_dict()
        # PEFT keeps some lists as sets, whose order changes from process to process.
        return {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}


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
    if not overwrite:
        raise FileExistsError(f"{directory} exists and is not empty. Name another folder, or set overwrite=True.")
    foreign = sorted(found - set(ADAPTER_FILES))
    if foreign or CONFIG_FILE not in found:
        reason = f"it also holds {foreign[:3]}" if CONFIG_FILE in found else f"it has no {CONFIG_FILE}"
        raise ValueError(
            f"{directory} is not replaced: it should hold nothing but an adapter, but {reason}. Name another folder."
        )


def _shapes(target: LoRATarget, *, num_chunks: int, rank: int) -> dict[str, tuple[int, ...]]:
    num_layers = len(target.paths)
    return {
        "A": (num_chunks, num_layers, rank, target.d_in),
        "B": (num_chunks, num_layers, rank, target.d_out),
        "bias_A": (num_layers, rank, target.d_in),
        "bias_B": (num_layers, rank, target.d_out),
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
        provenance = json.loads((directory / PROVENANCE_FILE).read_text(encoding="utf-8"))
        version = provenance.pop("format_version")
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise ValueError(
            f"{directory / PROVENANCE_FILE} is damaged ({_one_line(error)}). Generate the adapter again."
        ) from error
    if version != FORMAT_VERSION:
        raise ValueError(
            f"{directory} has adapter format {version}, this version reads format {FORMAT_VERSION}. "
            "Generate the adapter again, or use the version that wrote it."
        )
    return provenance


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


@contextmanager
def _atomic_folder(directory: Path) -> Iterator[Path]:
    """A folder beside `directory` that takes its place once the block is done, and vanishes if it fails."""
    made = [parent for parent in directory.parents if not parent.exists()]
    token = uuid.uuid4().hex
    new, old = (directory.with_name(f".{directory.name}.{token}.{suffix}") for suffix in ("new", "old"))
    try:
        new.mkdir(parents=True)
        yield new
        if directory.exists():
            directory.rename(old)
        new.rename(directory)
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        if old.exists():
            old.rename(directory)
        for parent in made:
            # Only what is still empty: another process may have used it meanwhile.
            if parent.is_dir() and not any(parent.iterdir()):
                parent.rmdir()
        raise
    shutil.rmtree(old, ignore_errors=True)
