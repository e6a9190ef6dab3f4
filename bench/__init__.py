"""Benchmarks and measurements. Nothing in sana/ or nodes/ imports them."""

import sana  # noqa: F401 - first: Ctrl-C stops `python -m bench` quietly while the rest is imported
