"""Helpers that do not depend on the rest of the project: errors, files, downloads, schedules, options."""
