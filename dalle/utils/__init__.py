"""Helpers under the names that minDALL-E's users know; see dalle.utils.utils."""
