"""One run from configuration to report: its flow, its progress on the terminal, its report on disk."""
