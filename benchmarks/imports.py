"""What any script pays before its first merge: import torch, transformers and peft, load the base, nothing else.

In: a base directory, or nothing for the imports alone. Timed from outside, as a whole process, by run.py.
"""

from __future__ import annotations

import sys

import peft  # noqa: F401
import torch  # noqa: F401
from transformers import AutoModelForCausalLM

if __name__ == "__main__":
    for base in sys.argv[1:]:
        AutoModelForCausalLM.from_pretrained(base, dtype="auto")
