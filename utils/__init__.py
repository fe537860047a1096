"""Small helpers that know nothing of the rest of the project: errors, files, downloads, schedules, checkpoints."""
