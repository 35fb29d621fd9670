"""Old names of two commands, kept for job scripts that were submitted before 0.1.0; to be removed in 0.3.0."""
