"""Writes reports to the output directory, reads them back, and compares them."""
