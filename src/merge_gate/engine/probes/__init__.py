"""What a merge alone does not show: unused tensors, unread layers, layers with a forward of their own."""
