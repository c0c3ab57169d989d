"""Serving of a trained model over HTTP, with one packed batch for many requests and all tasks."""
