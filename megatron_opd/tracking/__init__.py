"""What a run writes for people: metrics, logs, tables, plots."""
