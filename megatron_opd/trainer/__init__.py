"""The loop and what it is made of: preflight, experience, updates, evaluation, saving."""
