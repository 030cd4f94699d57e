"""Fidelity against speed: metrics, experiments, kernel benchmarks, reports."""
