"""The table of checks, in the order of blame: `table` lists them, the other modules define them."""
