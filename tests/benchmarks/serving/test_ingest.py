"""benchmarks.serving.ingest: a short run in one process; test_on_ray.py has the cluster."""

from benchmarks.serving.ingest import IngestBenchmarkSettings, measure


def test_rates_and_ids_of_one_process():
    settings = {"checkpoint": "assets/tiny", "documents": 5, "workers": [0], "threads": 1, "repeats": 2, "seed": 0}
    (row,) = measure(IngestBenchmarkSettings(**settings, output=None))
    assert row["same_ids"] and row["way"] == "one process" and row["chunks"] > 5
    assert 0 < row["documents_per_s_min"] <= row["documents_per_s"] <= row["documents_per_s_max"]
    # What a document takes, and the rate, are of the same work.
    assert row["documents_per_s_min"] < 1.5 / row["work_s_per_document"] and row["start_s"] < row["seconds"]
