"""The benchmark's report: rows → tables and one HTML page with plots. `python -m benchmarks.report` writes it."""
