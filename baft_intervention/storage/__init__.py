"""Adapters on disk and on the hub: the exchange folder, its log and lock, compatibility checks, merging."""
