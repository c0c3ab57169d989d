"""`make gpu-check`: everything that only a GPU can show, each part in a process of its own."""
