"""Settings: types, defaults, descriptions, checks and recipes. Read schema, then load."""
