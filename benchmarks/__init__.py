"""Benchmarks: ratios measured in one run, with the machine's own counters beside them."""
