"""Zip, tar and compressed files, read within limits on members, sizes and names."""
