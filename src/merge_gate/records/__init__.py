"""The values that travel between stages: frozen, slotted, keyword-only dataclasses of hashable fields.

So they can be pickled to a worker, compared, and cached. They import only the standard library, and have no logic
beyond properties of their own fields.

A record whose fields have `told` is part of report.json. The sentence is the field's description: the file, its JSON
Schema, the tables of docs/report.md, and the reader are made from it (report/formats/fields.py).
"""
