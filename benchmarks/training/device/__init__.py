"""Parts of `device_check.py`: its cases, their measurement in a worker process, and its report."""
