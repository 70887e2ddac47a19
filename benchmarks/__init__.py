"""What does it cost?

Every benchmark uses the public interfaces of the other folders and one harness: warm-up excluded, several runs, median
and spread, rivals measured in turn, an environment stamp, JSON lines, a plot and a Markdown table.
"""
