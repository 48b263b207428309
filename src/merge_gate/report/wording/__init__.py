"""Sentences, maps and tables that several formats share, and the escaping of foreign text."""
