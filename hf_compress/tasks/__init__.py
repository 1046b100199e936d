"""Tasks: one file each, readable from top to bottom. A task gives model, data sets, collator, metrics."""
