"""What measured rates come to for many documents and users, on paper: documents x seconds, bytes and prices.

projection(ingest, load, store, gpu).markdown()
"""

from collections.abc import Sequence

from benchmarks.measuring.rows import Row
from benchmarks.report.tables import Table

DOCUMENTS, USERS = 100_000_000, 1_000_000
TOKENS = 500  # of a document
MEMORIES, QUESTIONS = 200, 10  # of a user, altogether and a day
CORE_HOUR, GPU_HOUR, TB_MONTH = 0.04, 3.0, 20.0  # dollars; assumed, not measured
WEEK = 7 * 86_400  # seconds


def projection(ingest: Sequence[Row], load: Sequence[Row], store: Sequence[Row], gpu: Sequence[Row]) -> Table:
    """Every line is a measured rate, what it is multiplied with, and what that comes to.

    Args:
        ingest: rows of `benchmarks.serving.ingest`. load: of `benchmarks.serving`. store: of `benchmarks.memory.store`.
        gpu: of `benchmarks.training_speed` on one GPU.
    """
    (alone,) = (row for row in ingest if row["workers"] == 0)
    most = max(ingest, key=lambda row: row["documents_per_s"])
    size = alone["adapter_bytes"] / alone["documents"]
    hours = DOCUMENTS / most["documents_per_s"] / 3600
    own = max((row for row in load if row["way"] == "own adapters"), key=lambda row: row["requests_per_s"])
    text = max((row for row in load if row["way"] == "document"), key=lambda row: row["requests_per_s"])
    of_store = {row["kind"]: row for row in store}
    (step,) = (row for row in gpu if row["method"] == "ours" and row["stage"] == "stage_1")
    asked = USERS * QUESTIONS / 86_400
    gpu_hours = DOCUMENTS * TOKENS / step["p50_context_tokens_per_s"] / 3600
    lines = [
        [
            "adapters of 100M documents, tiny model",
            f"{most['documents_per_s']:.0f} documents/s on one machine ({most['way']})",
            f"{hours:,.0f} machine hours: {3600 * hours / WEEK:,.0f} machines for a week",
            _dollars(hours * 2 * CORE_HOUR),
        ],
        [
            "their bytes",
            f"{size / 1e3:,.0f} kB a document",
            f"{size * DOCUMENTS / 1e12:,.1f} TB",
            f"{_dollars(size * DOCUMENTS / 1e12 * TB_MONTH)} a month",
        ],
        [
            f"100M documents of {TOKENS} tokens at gemma-2-2b's shape",
            f"{step['p50_context_tokens_per_s']:,.0f} tokens/s in a training step, {step['run']['hardware']}",
            f"at most {gpu_hours:,.0f} GPU hours: {3600 * gpu_hours / WEEK:,.1f} GPUs for a week",
            _dollars(gpu_hours * GPU_HOUR),
        ],
        [
            f"{MEMORIES} memories of 1M users written",
            f"{of_store['ingest']['per_second']:,.0f} a second, one writer",
            f"{USERS * MEMORIES / of_store['ingest']['per_second'] / 3600:,.1f} hours",
            "",
        ],
        [
            f"{QUESTIONS} searches a user and day",
            f"{of_store['search']['p50_ms']:.1f} ms of one core",
            f"{asked:,.0f} a second: {asked * of_store['search']['p50_ms'] / 1000:.1f} cores",
            "",
        ],
        [
            "their answers by own adapters, tiny model",
            f"{own['requests_per_s']:.0f} requests/s at {own['users']} users, one machine",
            f"{asked / own['requests_per_s']:,.1f} machines",
            f"{_dollars(asked / own['requests_per_s'] * 2 * CORE_HOUR * 24)} a day",
        ],
        [
            "the same with the document in each prompt",
            f"{text['requests_per_s']:.0f} requests/s at {text['users']} users",
            f"{asked / text['requests_per_s']:,.1f} machines",
            f"{_dollars(asked / text['requests_per_s'] * 2 * CORE_HOUR * 24)} a day",
        ],
    ]
    return Table("", ["what", "measured", "comes to", "price"], lines)


def _dollars(value: float) -> str:
    return f"${value:,.0f}" if value >= 10 else f"${value:.2f}"
