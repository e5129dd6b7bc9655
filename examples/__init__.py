"""Worked examples on real data, one command each; docs/examples.md says what they show."""
