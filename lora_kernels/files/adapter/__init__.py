"""The folder of an adapter."""
