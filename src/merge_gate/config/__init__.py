"""YAML → `Config`, strict; every key keeps its line."""
