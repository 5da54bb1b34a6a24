"""What a policy acts on between its turns, by name: tools, their sessions, environments of the user's own."""
