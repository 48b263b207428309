"""The values that travel between the stages, in the order of the flow.

In: nothing but the standard library. Out: frozen, slotted, keyword-only dataclasses of hashable fields, so that
they can be pickled to a worker, compared and cached. They hold no logic beyond what follows from their own fields.

Where a field has `told`, the record is part of report.json, and the sentence is the field's description: the file, its
JSON Schema, the tables of docs/report.md and the reader are all made from it (report/formats/fields.py).
"""
