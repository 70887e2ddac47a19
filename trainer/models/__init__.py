"""Networks, their initial weights, precision, memory format and compilation. Read factory first."""
