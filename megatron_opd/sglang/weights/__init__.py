"""The student's weights on their way to the servers: how they travel is `broadcast`, `tensor` or `disk`."""
