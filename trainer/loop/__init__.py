"""The training loop: state, steps, epochs, resuming, and the check for losses that are not finite."""
