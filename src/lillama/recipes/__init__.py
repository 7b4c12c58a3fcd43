"""What is computed: the recipe, its options, and the recipes that come with lillama."""
