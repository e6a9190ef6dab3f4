"""Benchmarks and measurements. Nothing in sana/ or nodes/ imports them."""
