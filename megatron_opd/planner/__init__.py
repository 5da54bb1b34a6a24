"""What a run needs and how long a step takes, from config.json alone: no weights, no GPU, no torch. See `plan.py`."""
