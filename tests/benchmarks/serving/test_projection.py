"""The projection multiplies what was measured, and nothing else."""

from benchmarks.serving.projection import projection


def test_projection_is_of_the_measured_rates():
    ingest = [
        {"workers": 0, "way": "one process", "documents_per_s": 5.0, "documents": 10, "adapter_bytes": 1_000_000},
        {"workers": 2, "way": "Ray, workers=2", "documents_per_s": 10.0, "documents": 10, "adapter_bytes": 1_000_000},
    ]
    load = [
        {"way": way, "users": users, "requests_per_s": rate}
        for way, users, rate in (("own adapters", 1, 5.0), ("own adapters", 8, 20.0), ("document", 8, 2.0))
    ]
    store = [{"kind": "ingest", "per_second": 10_000.0}, {"kind": "search", "p50_ms": 3.0}]
    step = {"method": "ours", "stage": "stage_1", "p50_context_tokens_per_s": 10_000.0, "run": {"hardware": "a GPU"}}
    lines = [line.split(" | ") for line in projection(ingest, load, store, [step]).markdown().splitlines()[2:]]
    # 1e8 documents at 10/s are 1e7 s; two cores at $0.04 an hour.
    assert lines[0][1:] == [
        "10 documents/s on one machine (Ray, workers=2)",
        "2,778 machine hours: 17 machines for a week",
        "$222 |",
    ]
    assert lines[1][1:] == ["100 kB a document", "10.0 TB", "$200 a month |"]
    assert lines[2][2:] == ["at most 1,389 GPU hours: 8.3 GPUs for a week", "$4,167 |"]
    assert lines[3][2].startswith("5.6 hours") and lines[4][2].startswith("116 a second: 0.3 cores")
    assert lines[5][2:] == ["5.8 machines", "$11 a day |"] and lines[6][2:] == ["57.9 machines", "$111 a day |"]
