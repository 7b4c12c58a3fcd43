"""Where text, sound and images lie, and how they are read."""
