"""Faces over HTTP: the controller, and instances that answer as a model server does."""
