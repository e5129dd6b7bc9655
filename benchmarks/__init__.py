"""Benchmarks: cases as data, a command line, numbers that are checked before they are timed."""
