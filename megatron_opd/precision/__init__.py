"""FP8: formats and recipes, rounding, which module computes in what, what is installed, and when FP8 is too coarse."""
