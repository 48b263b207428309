"""One file per output format; each renders a `records.Report` and none knows another.

`words` holds the sentences they share and `untrusted` makes foreign text harmless; `files` writes them to disk.
"""
