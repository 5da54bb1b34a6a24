"""What the loss is a sum of: distillation, policy gradient, cross-entropy. `objective.py` adds them up."""
