"""Attestations: in-toto statements about verdicts and published models, signed and checked."""
