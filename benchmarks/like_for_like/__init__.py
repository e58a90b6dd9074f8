"""What `benchmarks/systems.py` compares, and how it shows what came out."""
