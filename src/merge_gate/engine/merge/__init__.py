"""The merge of each layer, by PEFT or in blocks, and the account of its results."""
