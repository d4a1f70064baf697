"""The parts of `python -m benchmarks.gpu`; `run` of each writes a CSV and a picture."""
