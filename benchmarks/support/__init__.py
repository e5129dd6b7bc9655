"""The support matrix: every feature on every backend in every type, as a check that runs.

    python -m benchmarks.support --json benchmarks/results/support/support.json --update README.md

``tests/test_support_matrix.py`` runs the same checks, and holds the README's table to that file. Where there is no GPU
the CUDA kernels run on the emulated device and Triton's in its interpreter; the file says so.
"""
