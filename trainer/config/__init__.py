"""Settings: recipes, types, defaults and checks."""
