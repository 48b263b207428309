"""Publishing: merged models, written from the base's own files and from the tensors that were judged."""
