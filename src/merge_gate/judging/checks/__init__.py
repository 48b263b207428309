"""The checks: each is a module of its name, whose docstring is its page. `table` finds and orders them."""
