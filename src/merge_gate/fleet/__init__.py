"""A fleet: what lets thousands of adapters be judged once, by one machine or several.

In: entries whose names became files, reports of earlier runs. Out: which of them need no judging, and the reports of
several runs as one. Sits between the run and the stages: it uses all of them, and none of them knows it. Imports no
torch.
"""
