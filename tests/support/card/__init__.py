"""Simulated CUDA cards for torch's CPU build: a C++ library, an import hook, and the fleets that run on them.

`build.library()` compiles the library, `build.environment()` gives a process the cards. What they can show, and what
they cannot, is in docs/evidence/truth.md.
"""
