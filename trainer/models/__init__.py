"""Networks, their precision and compilation."""
