"""Edits on a running model: hooks, the adapter, the stack of many edits, partial forward passes, generation."""
