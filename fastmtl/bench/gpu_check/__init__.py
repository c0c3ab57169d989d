"""`make gpu-check`: all checks that need a GPU, each part in a separate process."""
