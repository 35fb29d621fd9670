"""Former names of two commands, for job scripts that were submitted before 0.1.0; removed in 0.3.0."""
