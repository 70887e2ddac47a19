"""HTML reports of one run or several runs, and the console output of a run."""
