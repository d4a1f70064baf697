"""Plugins that other packages load by their names; nothing here imports a plugin."""
