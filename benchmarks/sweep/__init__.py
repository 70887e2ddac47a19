"""Resolution sweep: plan -> point -> stats -> text -> charts -> page; compare for two result files."""
