"""Hyperparameter search with Optuna: the search space, the study shared by processes, its trials and its page."""
