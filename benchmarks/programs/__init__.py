"""Published programs that use ``nn.LSTM``, run with it and with ``fusedreg.LSTM`` in its place.

    python -m benchmarks.programs --environment build/programs --json benchmarks/results/programs/cpu.json
    python -m benchmarks.programs --update docs/programs.md benchmarks/results/programs/cpu.json

The first command makes an environment of its own (the torch of the interpreter that runs it, and the packages that
:mod:`benchmarks.programs.catalogue` pins), runs each package's own tests and one example twice over, and writes what
came out. The second writes the tables of the page from such a file.
"""
