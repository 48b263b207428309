"""Names → commits → directories → what the files say. No torch."""
