"""Shards of self-study: parquet files of stored answers, each with the provenance of its run inside."""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from hypernet.data.records import Question, Record, StoredAnswer
from hypernet.io.files import replaced

PROVENANCE = b"provenance"  # key of the parquet metadata
STORED_KINDS = ("document", "unanswerable")  # of questions; shards from before have the first alone


def _schema() -> Any:
    import pyarrow as pa

    whole, text = pa.int32(), pa.string()
    return pa.schema(
        [("passage", whole), ("document", text), ("source", text), ("source_sha256", text), ("start", whole)]
        + [("end", whole), ("num_tokens", whole), ("question", text), ("kind", text), ("answer", text)]
        + [("answer_ids", pa.list_(whole)), ("top_indices", pa.list_(whole)), ("top_log_probs", pa.list_(pa.float32()))]
    )


def write_shard(path: Path, rows: list[dict[str, Any]], provenance: dict[str, Any]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    metadata = {PROVENANCE: json.dumps(provenance).encode()}
    table = pa.Table.from_pylist(rows, schema=_schema()).replace_schema_metadata(metadata)
    with replaced(path) as temporary:
        pq.write_table(table, temporary, compression="zstd")


def read_provenance(path: Path) -> dict[str, Any]:
    """What a shard says of itself.

    Raises:
        ValueError: it is not one, or damaged.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return dict(json.loads(pq.read_schema(path).metadata[PROVENANCE]))
    except (OSError, pa.ArrowException, KeyError, TypeError, ValueError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise ValueError(f"{path} is no complete shard of self-study ({reason}). Remove it, make it again.") from error


def check_same(path: Path, provenance: dict[str, Any]) -> None:
    found = read_provenance(path)
    found.pop("sources")
    if found != provenance:
        differing = [key for key in provenance if found.get(key) != provenance[key]]
        if "settings" in differing:
            own, other = provenance["settings"], found["settings"]
            differing += [key for key in own if other.get(key) != own[key]]
        raise ValueError(
            f"{path} was made otherwise: {', '.join(differing)} differ. Name another output_dir, or remove its shards."
        )


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 of the vocabulary: stored token ids mean something with this one alone."""
    return hashlib.sha256(json.dumps(sorted(tokenizer.get_vocab().items())).encode()).hexdigest()


def read_shard(path: Path) -> tuple[dict[int, Record], tuple[str, ...]]:
    """passage → record, and what is wrong with each row that is left out."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        rows = pq.read_table(path).to_pylist()
    except (OSError, pa.ArrowException) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise ValueError(f"{path} is damaged ({reason}). Remove it, make it again.") from error
    found: dict[int, tuple[str, list[Question]]] = {}
    reasons = []
    for number, row in enumerate(rows):
        if (wrong := _what_is_wrong(row)) is not None:
            reasons.append(f"Row {number} of {path.name} {wrong}.")
            continue
        ids = tuple(row["answer_ids"])
        indices, log_probs = (np.array(row[key]).reshape(len(ids), -1) for key in ("top_indices", "top_log_probs"))
        stored = StoredAnswer(ids, indices.astype(np.int32), log_probs.astype(np.float32))
        question = Question(row["question"], row["answer"], row.get("kind", STORED_KINDS[0]), "study", stored)
        found.setdefault(row["passage"], (row["document"], []))[1].append(question)
    records = {passage: Record((document,), tuple(questions)) for passage, (document, questions) in found.items()}
    return records, tuple(reasons)


def _what_is_wrong(row: dict[str, Any]) -> str | None:
    """Why a stored answer cannot be used; None if it can."""
    if empty := [key for key, value in row.items() if value is None or value == [] or value == ""]:
        # What the base model said may come to no text, a lone closing token.
        empty = [key for key in empty if key != "answer" or row[key] is None]
    if empty:
        return f"has no {empty[0]}"
    if row.get("kind", STORED_KINDS[0]) not in STORED_KINDS:
        return f"is of the kind {row['kind']!r}"
    ids, indices, log_probs = (row[key] for key in ("answer_ids", "top_indices", "top_log_probs"))
    if None in ids or None in indices or None in log_probs:
        return "has gaps in its tokens"
    if len(indices) != len(log_probs) or len(indices) % len(ids):
        return f"has {len(indices)} tokens with {len(log_probs)} probabilities for an answer of {len(ids)} tokens"
    if min(ids) < 0 or min(indices) < 0:
        return "has a negative token"
    # A sum a little over 1 is rounding, and -inf is a token that cannot come.
    if not np.array(log_probs).max() <= 1e-3 or np.isnan(log_probs).any():
        return "has probabilities that are none"
    return None
