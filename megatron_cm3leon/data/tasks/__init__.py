"""Instruction tuning: the templates of tasks, and readers of records, conversations and annotated data sets."""
