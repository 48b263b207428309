"""The images of this version, one for each variant, pinned by digest.

The release workflow writes this file. The references are empty in a commit that is not a release.
"""

CPU = ""
CUDA = ""
