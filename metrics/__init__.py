"""Metrics and thresholds: pure functions on numpy arrays; higher scores mean more anomalous."""
