"""The bytes of a base that is not mapped into memory: pieces of its files, in the order in which they are used."""
