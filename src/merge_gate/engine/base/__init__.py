"""A base model: loaded, measured, in another class or dtype. Imports no PEFT."""
