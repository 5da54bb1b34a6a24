"""Environments by name: tools with their sessions, classes of the user's own, those of aviary."""
