"""Parity and speed of llava_st_ops on a real clip, against PyTorch: `python -m benchmarks`."""
