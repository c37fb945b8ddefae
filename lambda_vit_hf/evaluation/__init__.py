"""Metrics, parameters and MACs, throughput, plots."""
