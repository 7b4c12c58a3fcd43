"""What a model is made of, and how its weights come and go."""
