"""The packed set as training reads it."""
