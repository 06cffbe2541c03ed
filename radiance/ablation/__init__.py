"""Suites of ablations: arms that are trained with equal seeds and compared in pairs."""
