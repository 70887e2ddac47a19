"""The packed data set of a run, and its resolution schedule."""
