"""HTML reports: one page about a run, or one that compares several runs."""
