"""The package's version, read by the build, the compiled extensions and Python alike."""

__version__ = "0.1.0"
