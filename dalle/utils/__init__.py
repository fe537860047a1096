"""Helpers with minDALL-E's names; see dalle.utils.utils."""
