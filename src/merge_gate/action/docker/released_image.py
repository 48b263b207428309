"""The images that belong to this version. Written by the release workflow; empty in a commit that is no release.

In: nothing. Out: one reference for each variant, pinned by digest. Knows nothing else.
"""

CPU = ""
CUDA = ""
