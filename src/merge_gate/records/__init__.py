"""The values that travel between stages: frozen, slotted, keyword-only dataclasses of hashable fields.

So they can be sent to a worker, compared, and cached. They import only the standard library, and have no logic
beyond properties of their own fields.

A record whose fields have `reported` is part of report.json. Its sentence describes the field. The file, its JSON
Schema, the tables of docs/reference/report.md, and the reader are made from these fields (report/formats/fields.py).
"""
