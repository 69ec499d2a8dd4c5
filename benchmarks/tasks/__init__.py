"""What the benchmark asks, one file per task: benchmarks.tasks.base says what a task is."""
