"""Suites of ablations: variants that are trained with equal seeds and compared in pairs."""
