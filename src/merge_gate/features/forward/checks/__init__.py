"""The checks of what modules return when base and adapter run as models."""
