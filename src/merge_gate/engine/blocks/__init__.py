"""Low-rank merges in blocks of rows, with PEFT's bits. Imports no PEFT."""
