"""Renders a `records.Report` in each output format (`formats`), with shared sentences (`wording`).

`stored` writes reports to disk, reads them, and compares them. No format imports another.
"""
