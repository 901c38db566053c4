"""Frozen features judged: kNN, linear probes, few labels, counting, collapse."""
