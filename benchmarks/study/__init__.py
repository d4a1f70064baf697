"""What is each start worth? A study with the learning rate tuned: `python -m benchmarks.study`."""
